"""2-D local attention as Triton kernels: scores never reach memory, the backward pass computes them again.

One program attends for a block of queries of one chunk (FlashAttention, Dao et al., 2022, on the keys of
nine chunks). It goes through the global keys, then through the local ones in blocks; where a key lies on the
map is computed from its number, so nothing is cut into chunks or padded in memory. What is added to the
scores of a chunk's queries (position biases, −inf outside the exact window) is the same for every chunk and
image: it is laid out once per call by place (`geometry.window_bias`), and read from cache.

The backward pass has four kernels, each of which sums in a fixed order and writes every element once, so that
equal inputs give equal gradients: of queries; of local keys and values, for which a program goes through the
queries that see a block of keys; of global keys, values and their biases; and of the places of `window_bias`.

Legend: w window, t = w² tokens of a chunk, places 9w², M queries and K keys of a block, D head width, H × W
the map. Scores are multiplied by log₂e, as the hardware knows powers of two.
"""

# Compiled by Triton: types of kernels' parameters are pointers, integers and tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vil.attention.local.geometry import Inputs, Window, fold_window_bias, window_bias
from vil.attention.local.operator import empty_gradients, like_tokens, register

LOG2E = tl.constexpr(1.4426950408889634)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_WIDTH = 128
MAX_GLOBAL_TOKENS = 256
PROGRAMS = 1024
"""Programs that keep a large GPU busy: sums over images are split into so many parts."""
PLACES_MULTIPLE = 128
"""The places of a query are padded to a multiple of this, so that blocks of them are read without a check."""


@triton.jit
def _matrix(pointer, rows, stride, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of vectors of width D; 0 where there is none."""
    columns = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=keep[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _write(pointer, rows, stride, keep, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `_matrix`."""
    columns = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=keep[:, None] & (columns < D)[None, :])


@triton.jit
def _step(neighbor, NEIGHBORS: tl.constexpr):
    """(row, column) step to the chunk that is seen beside the own one."""
    if NEIGHBORS == "one":
        number = tl.load(neighbor)
        number = (number + (number >= 4)).to(tl.int32)
        return number // 3 - 1, number % 3 - 1
    return 0, 0


@triton.jit
def _block(heads, rows, columns, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """What this program works on: numbers of tokens in a chunk, the chunk's row and column, image, head."""
    blocks: tl.constexpr = (WINDOW * WINDOW + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    chunk = program // blocks % (rows * columns)
    image_head = program // blocks // (rows * columns)
    tokens = program % blocks * BLOCK + tl.arange(0, BLOCK)
    image = (image_head // heads).to(tl.int64)  # what it is multiplied by may exceed 32 bits
    return tokens, chunk // columns, chunk % columns, image, image_head % heads


@triton.jit
def _place(n, row_step, column_step, WINDOW: tl.constexpr, NEIGHBORS: tl.constexpr):
    """Row and column, in the nine chunks, of the n-th token of those that are seen."""
    if NEIGHBORS == "all":
        return n // (3 * WINDOW), n % (3 * WINDOW)
    chunk = n // (WINDOW * WINDOW)  # 0: the own one
    inside = n % (WINDOW * WINDOW)
    return (
        (1 + chunk * row_step) * WINDOW + inside // WINDOW,
        (1 + chunk * column_step) * WINDOW + inside % WINDOW,
    )


@triton.jit
def _on_map(position, length, chunks, WINDOW: tl.constexpr, CYCLIC: tl.constexpr):
    """Along one axis, for positions that may lie off the map: where on the map, is it on it, does it count.

    Where chunks wrap, the padding of the last chunk counts as a key of 0 for the first, looking back.
    """
    if CYCLIC:
        padded = chunks * WINDOW
        wrapped = tl.where(position < 0, position + padded, position)
        wrapped = tl.where(wrapped >= padded, wrapped - padded, wrapped)
        real = wrapped < length
        return wrapped, real, real | (position < 0)
    real = (position >= 0) & (position < length)
    return position, real, real


@triton.jit
def _keys(
    n, row_step, column_step, chunk_row, chunk_column, H, W, rows, columns,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr,
):  # fmt: skip
    """For keys number n of a chunk: token on the map, is it on it, does it count, and its place."""
    row, column = _place(n, row_step, column_step, WINDOW, NEIGHBORS)
    place = row * (3 * WINDOW) + column
    row, real_row, seen_row = _on_map((chunk_row - 1) * WINDOW + row, H, rows, WINDOW, CYCLIC)
    column, real_column, seen_column = _on_map(
        (chunk_column - 1) * WINDOW + column, W, columns, WINDOW, CYCLIC
    )
    real = real_row & real_column & (n < KEYS)
    return row * W + column, real, seen_row & seen_column & (n < KEYS), place


@triton.jit
def _queries(m, chunk_row, chunk_column, H, W, WINDOW: tl.constexpr):
    """For queries number m of a chunk: token on the map, and whether it is one."""
    row, column = chunk_row * WINDOW + m // WINDOW, chunk_column * WINDOW + m % WINDOW
    return row * W + column, (m < WINDOW * WINDOW) & (row < H) & (column < W)


@triton.jit
def _local_scores(
    query, key, scale, bias, m, place, seen, HAS_BIAS: tl.constexpr, WINDOW: tl.constexpr,
    NEIGHBORS: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M, K) scores of queries m of a chunk and keys at `place`, times log₂e; −inf where not seen."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if HAS_BIAS:
        keep = (m < WINDOW * WINDOW)[:, None]
        if NEIGHBORS != "all":
            keep = keep & seen[None, :]
        scores += tl.load(bias + m[:, None] * PLACES + place[None, :], mask=keep, other=0.0).to(tl.float32)
    return tl.where(seen[None, :], scores, float("-inf"))


@triton.jit
def _global_scores(
    query,
    key,
    scale,
    global_bias,
    g,
    HAS_GLOBAL_BIAS: tl.constexpr,
    GLOBALS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(M, K) scores with global keys number g, times log₂e; −inf where there is none."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if HAS_GLOBAL_BIAS:
        scores += (tl.load(global_bias + g, mask=g < GLOBALS, other=0.0).to(tl.float32) * LOG2E)[None, :]
    return tl.where((g < GLOBALS)[None, :], scores, float("-inf"))


@triton.jit
def _accumulate(scores, value, top, total, output, PRECISION: tl.constexpr):
    """One step of the running softmax: maximum and sum of exponentials so far, and the weighted sum."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key was seen yet
    weights = tl.exp2(scores - safe_top[:, None])
    shrink = tl.exp2(top - safe_top)
    total = total * shrink + tl.sum(weights, axis=1)
    output = output * shrink[:, None]
    output = tl.dot(weights.to(value.dtype), value, output, input_precision=PRECISION)
    return new_top, total, output


@triton.jit
def _score_gradient(scores, logsum, value, gradient, delta, PRECISION: tl.constexpr):
    """Weights and the gradient of scores (before the scale), from the output's gradient (M, D)."""
    weights = tl.exp2(scores - logsum[:, None])
    of_weights = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    return weights, weights * (of_weights - delta[:, None])


@triton.jit
def _forward_kernel(
    query, key, value, global_key, global_value, bias, global_bias, neighbor, output, sums,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    gk_image, gk_head, gk_token, gv_image, gv_head, gv_token, o_image, o_head, o_token,
    b_head, heads, H, W, rows, columns, scale,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, PLACES: tl.constexpr, GLOBALS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GLOBAL_BIAS: tl.constexpr, NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and logarithm of the sum of exponentials, for a block of queries of one chunk."""
    m, row, column, image, head = _block(heads, rows, columns, WINDOW, BLOCK_M)
    token, is_query = _queries(m, row, column, H, W, WINDOW)
    queries = _matrix(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for first in range(0, GLOBALS, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        keys = _matrix(global_key + image * gk_image + head * gk_head, g, gk_token, g < GLOBALS, D, BLOCK_D)
        values = _matrix(
            global_value + image * gv_image + head * gv_head, g, gv_token, g < GLOBALS, D, BLOCK_D
        )
        scores = _global_scores(
            queries, keys, scale, global_bias + head * GLOBALS, g, HAS_GLOBAL_BIAS, GLOBALS, PRECISION
        )
        top, total, result = _accumulate(scores, values, top, total, result, PRECISION)

    row_step, column_step = _step(neighbor, NEIGHBORS)
    for first in range(0, KEYS, BLOCK_K):
        n = first + tl.arange(0, BLOCK_K)
        at, real, seen, place = _keys(
            n, row_step, column_step, row, column, H, W, rows, columns, KEYS, WINDOW, NEIGHBORS, CYCLIC
        )
        keys = _matrix(key + image * k_image + head * k_head, at, k_token, real, D, BLOCK_D)
        values = _matrix(value + image * v_image + head * v_head, at, v_token, real, D, BLOCK_D)
        scores = _local_scores(
            queries,
            keys,
            scale,
            bias + head * b_head,
            m,
            place,
            seen,
            HAS_BIAS,
            WINDOW,
            NEIGHBORS,
            PLACES,
            PRECISION,
        )
        top, total, result = _accumulate(scores, values, top, total, result, PRECISION)

    result = result / total[:, None]
    _write(output + image * o_image + head * o_head, token, o_token, is_query, result, D, BLOCK_D)
    tl.store(sums + (image * heads + head) * H * W + token, (top + tl.log2(total)) / LOG2E, mask=is_query)


@triton.jit
def _query_kernel(
    query, key, value, global_key, global_value, bias, global_bias, neighbor, output, sums, gradient,
    delta, of_query,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    gk_image, gk_head, gk_token, gv_image, gv_head, gv_token, o_image, o_head, o_token,
    d_image, d_head, d_token, b_head, heads, H, W, rows, columns, scale, scale_of_query,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, PLACES: tl.constexpr, GLOBALS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GLOBAL_BIAS: tl.constexpr, NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries; and `delta`, each query's sum of output × gradient, for the others."""
    m, row, column, image, head = _block(heads, rows, columns, WINDOW, BLOCK_M)
    token, is_query = _queries(m, row, column, H, W, WINDOW)
    queries = _matrix(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
    outputs = _matrix(output + image * o_image + head * o_head, token, o_token, is_query, D, BLOCK_D)
    upstream = _matrix(gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D)
    at_query = (image * heads + head) * H * W + token
    logsum = tl.load(sums + at_query, mask=is_query, other=0.0) * LOG2E
    dot = tl.sum(outputs.to(tl.float32) * upstream.to(tl.float32), axis=1)
    tl.store(delta + at_query, dot, mask=is_query)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for first in range(0, GLOBALS, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        keys = _matrix(global_key + image * gk_image + head * gk_head, g, gk_token, g < GLOBALS, D, BLOCK_D)
        values = _matrix(
            global_value + image * gv_image + head * gv_head, g, gv_token, g < GLOBALS, D, BLOCK_D
        )
        scores = _global_scores(
            queries, keys, scale, global_bias + head * GLOBALS, g, HAS_GLOBAL_BIAS, GLOBALS, PRECISION
        )
        _, of_scores = _score_gradient(scores, logsum, values, upstream, dot, PRECISION)
        result = tl.dot(of_scores.to(keys.dtype), keys, result, input_precision=PRECISION)

    row_step, column_step = _step(neighbor, NEIGHBORS)
    for first in range(0, KEYS, BLOCK_K):
        n = first + tl.arange(0, BLOCK_K)
        at, real, seen, place = _keys(
            n, row_step, column_step, row, column, H, W, rows, columns, KEYS, WINDOW, NEIGHBORS, CYCLIC
        )
        keys = _matrix(key + image * k_image + head * k_head, at, k_token, real, D, BLOCK_D)
        values = _matrix(value + image * v_image + head * v_head, at, v_token, real, D, BLOCK_D)
        scores = _local_scores(
            queries,
            keys,
            scale,
            bias + head * b_head,
            m,
            place,
            seen,
            HAS_BIAS,
            WINDOW,
            NEIGHBORS,
            PLACES,
            PRECISION,
        )
        _, of_scores = _score_gradient(scores, logsum, values, upstream, dot, PRECISION)
        result = tl.dot(of_scores.to(keys.dtype), keys, result, input_precision=PRECISION)

    result *= scale_of_query
    _write(of_query + image * o_image + head * o_head, token, o_token, is_query, result, D, BLOCK_D)


@triton.jit
def _key_kernel(
    query, key, value, bias, neighbor, sums, delta, gradient, of_key, of_value,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    d_image, d_head, d_token, o_image, o_head, o_token,
    b_head, heads, H, W, rows, columns, scale, scale_of_query,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, PLACES: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys of one chunk and of their values.

    The queries that see them stand around the chunk as the keys of a query do; a query `step` chunks away
    sees them `−step` chunks away.
    """
    n, row, column, image, head = _block(heads, rows, columns, WINDOW, BLOCK_K)
    token, is_key = _queries(n, row, column, H, W, WINDOW)
    keys = _matrix(key + image * k_image + head * k_head, token, k_token, is_key, D, BLOCK_D)
    values = _matrix(value + image * v_image + head * v_head, token, v_token, is_key, D, BLOCK_D)
    of_keys = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    of_values = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    key_place = n // WINDOW * (3 * WINDOW) + n % WINDOW  # in its own chunk

    row_step, column_step = _step(neighbor, NEIGHBORS)
    for first in range(0, KEYS, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        around_row, around_column = _place(m, -row_step, -column_step, WINDOW, NEIGHBORS)
        chunk_place = (2 - around_row // WINDOW) * (3 * WINDOW) + 2 - around_column // WINDOW
        in_chunk = around_row % WINDOW * WINDOW + around_column % WINDOW
        at_row, real_row, _ = _on_map((row - 1) * WINDOW + around_row, H, rows, WINDOW, CYCLIC)
        at_column, real_column, _ = _on_map((column - 1) * WINDOW + around_column, W, columns, WINDOW, CYCLIC)
        is_query = real_row & real_column & (m < KEYS)
        at = at_row * W + at_column
        queries = _matrix(query + image * q_image + head * q_head, at, q_token, is_query, D, BLOCK_D)
        upstream = _matrix(gradient + image * d_image + head * d_head, at, d_token, is_query, D, BLOCK_D)
        at_query = (image * heads + head) * H * W + at
        # A sum of +∞ makes the weights of queries that are none 0.
        logsum = tl.load(sums + at_query, mask=is_query, other=float("inf")) * LOG2E
        dot = tl.load(delta + at_query, mask=is_query, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if HAS_BIAS:
            pointers = bias + head * b_head + in_chunk[:, None] * PLACES
            pointers += chunk_place[:, None] * WINDOW + key_place[None, :]
            keep = is_query[:, None] & is_key[None, :]
            scores += tl.load(pointers, mask=keep, other=0.0).to(tl.float32)
        weights, of_scores = _score_gradient(scores, logsum, values, upstream, dot, PRECISION)
        of_values = tl.dot(
            tl.trans(weights.to(upstream.dtype)), upstream, of_values, input_precision=PRECISION
        )
        of_keys = tl.dot(tl.trans(of_scores.to(queries.dtype)), queries, of_keys, input_precision=PRECISION)

    of_keys *= scale_of_query
    _write(of_key + image * o_image + head * o_head, token, o_token, is_key, of_keys, D, BLOCK_D)
    _write(of_value + image * o_image + head * o_head, token, o_token, is_key, of_values, D, BLOCK_D)


@triton.jit
def _global_kernel(
    query, global_key, global_value, global_bias, sums, delta, gradient, of_key, of_value, of_bias,
    q_image, q_head, q_token, gk_image, gk_head, gk_token, gv_image, gv_head, gv_token,
    d_image, d_head, d_token, heads, tokens, tokens_of_part, scale, scale_of_query,
    GLOBALS: tl.constexpr, HAS_GLOBAL_BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of global keys, their values and biases, from a part of the queries.

    Written to (images · heads, parts, GLOBALS, D), and (…, GLOBALS) for the biases, float32.
    """
    head, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = head.to(tl.int64) * tl.num_programs(1) + part
    image, head = (head // heads).to(tl.int64), head % heads
    g = block * BLOCK_G + tl.arange(0, BLOCK_G)
    is_key = g < GLOBALS
    keys = _matrix(global_key + image * gk_image + head * gk_head, g, gk_token, is_key, D, BLOCK_D)
    values = _matrix(global_value + image * gv_image + head * gv_head, g, gv_token, is_key, D, BLOCK_D)
    of_keys = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    of_values = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    of_biases = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, tokens_of_part, BLOCK_M):
        token = part * tokens_of_part + first + tl.arange(0, BLOCK_M)
        is_query = token < tokens
        queries = _matrix(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
        upstream = _matrix(gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D)
        at_query = (image * heads + head) * tokens + token
        logsum = tl.load(sums + at_query, mask=is_query, other=float("inf")) * LOG2E
        dot = tl.load(delta + at_query, mask=is_query, other=0.0)
        scores = _global_scores(
            queries, keys, scale, global_bias + head * GLOBALS, g, HAS_GLOBAL_BIAS, GLOBALS, PRECISION
        )
        weights, of_scores = _score_gradient(scores, logsum, values, upstream, dot, PRECISION)
        of_values = tl.dot(
            tl.trans(weights.to(upstream.dtype)), upstream, of_values, input_precision=PRECISION
        )
        of_keys = tl.dot(tl.trans(of_scores.to(queries.dtype)), queries, of_keys, input_precision=PRECISION)
        of_biases += tl.sum(of_scores, axis=0)
    of_keys *= scale_of_query
    _write(of_key + target * GLOBALS * D, g, D, is_key, of_keys, D, BLOCK_D)
    _write(of_value + target * GLOBALS * D, g, D, is_key, of_values, D, BLOCK_D)
    tl.store(of_bias + target * GLOBALS + g, of_biases, mask=is_key)


@triton.jit
def _bias_kernel(
    query, key, value, bias, neighbor, sums, delta, gradient, of_places,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    d_image, d_head, d_token, b_head, heads, images, H, W, rows, columns, scale,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, PLACES: tl.constexpr, NEIGHBORS: tl.constexpr,
    CYCLIC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of a head's places, summed over a part of all chunks of all images.

    Written to (parts, heads, t, PLACES), float32.
    """
    part, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks: tl.constexpr = (KEYS + BLOCK_K - 1) // BLOCK_K
    m = block // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    row_step, column_step = _step(neighbor, NEIGHBORS)
    result = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for index in range(part, images * rows * columns, tl.num_programs(0)):
        image = (index // (rows * columns)).to(tl.int64)
        chunk = index % (rows * columns)
        row, column = chunk // columns, chunk % columns
        token, is_query = _queries(m, row, column, H, W, WINDOW)
        at, real, seen, place = _keys(
            n, row_step, column_step, row, column, H, W, rows, columns, KEYS, WINDOW, NEIGHBORS, CYCLIC
        )
        queries = _matrix(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
        keys = _matrix(key + image * k_image + head * k_head, at, k_token, real, D, BLOCK_D)
        values = _matrix(value + image * v_image + head * v_head, at, v_token, real, D, BLOCK_D)
        upstream = _matrix(gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D)
        at_query = (image * heads + head) * H * W + token
        logsum = tl.load(sums + at_query, mask=is_query, other=float("inf")) * LOG2E
        dot = tl.load(delta + at_query, mask=is_query, other=0.0)
        scores = _local_scores(
            queries,
            keys,
            scale,
            bias + head * b_head,
            m,
            place,
            seen,
            True,
            WINDOW,
            NEIGHBORS,
            PLACES,
            PRECISION,
        )
        _, of_scores = _score_gradient(scores, logsum, values, upstream, dot, PRECISION)
        result += of_scores
    row, column = _place(n, row_step, column_step, WINDOW, NEIGHBORS)
    place = row * (3 * WINDOW) + column
    target = of_places + (part.to(tl.int64) * heads + head) * WINDOW * WINDOW * PLACES
    keep = (m < WINDOW * WINDOW)[:, None] & (n < KEYS)[None, :]
    tl.store(target + m[:, None] * PLACES + place[None, :], result, mask=keep)


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)
"""TRITON_INTERPRET=1: the kernels run on the CPU, for tests."""


def unsupported(
    device: torch.device, dtype: torch.dtype, head_width: int, globals_: int, dropout: float
) -> str | None:
    """Why the kernels cannot do this, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a GPU, this is {device}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or higher"
    if dtype not in DTYPES:
        return f"computes in {', '.join(map(str, DTYPES))}, the query is {dtype}"
    if head_width > MAX_HEAD_WIDTH:
        return f"has a head width of {MAX_HEAD_WIDTH} at most, got {head_width}"
    if globals_ > MAX_GLOBAL_TOKENS:
        return f"has {MAX_GLOBAL_TOKENS} global tokens at most, got {globals_}"
    if dropout:
        return f"has no dropout of attention weights, got {dropout}"
    return None


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, inputs: Inputs, window: Window) -> None:
        self.inputs, self.window = inputs, window
        self.query, self.key, self.value, self.global_key, self.global_value = map(
            _with_unit_stride, inputs[:5]
        )
        self.batch, self.heads, self.tokens, self.width = inputs.query.shape
        self.globals_ = inputs.global_key.shape[2]
        self.rows, self.columns = (-(-length // window.side) for length in window.size)
        self.per_chunk = window.side**2
        self.keys = {"all": 9, "self": 1, "one": 2}[window.neighbors] * self.per_chunk
        bias = self._bias()
        self.has_bias, self.has_global_bias = bias is not None, inputs.global_bias is not None
        self.bias_stride = bias.stride(0) if bias is not None and bias.shape[0] > 1 else 0
        # Kernels that have none still take a pointer.
        self.bias = self.query if bias is None else bias
        self.global_bias = self.query if inputs.global_bias is None else inputs.global_bias
        self.block_m, self.block_k, self.stages = _blocks(
            self.per_chunk, self.keys, self.width, self.query.dtype
        )

    def _bias(self) -> Tensor | None:
        """`window_bias`, times log₂e, in the inputs' precision: (h or 1, t, 9w² padded)."""
        bias = window_bias(self.inputs, self.window)
        if bias is None:
            return None
        bias = bias.flatten(3).flatten(1, 2)
        padded = bias.new_zeros(*bias.shape[:2], self.places, dtype=self.query.dtype)
        padded[..., : bias.shape[2]] = bias * LOG2E.value
        return padded

    @property
    def places(self) -> int:
        """Places of the nine chunks, padded."""
        return triton.cdiv(self.window.places, PLACES_MULTIPLE) * PLACES_MULTIPLE

    @property
    def scale(self) -> float:
        """By which products of queries and keys are multiplied."""
        return self.width**-0.5 * LOG2E.value

    def common(self) -> dict[str, Any]:
        """Arguments of every kernel."""
        return {
            "D": self.width,
            "BLOCK_D": max(16, triton.next_power_of_2(self.width)),
            "PRECISION": _precision(),
            "num_warps": 4,
            "num_stages": self.stages,
        }

    def of_window(self) -> dict[str, Any]:
        """Arguments of the kernels that go through chunks."""
        return {
            "WINDOW": self.window.side,
            "KEYS": self.keys,
            "PLACES": self.places,
            "NEIGHBORS": self.window.neighbors,
            "CYCLIC": self.window.mask == "cyclic",
            "BLOCK_M": self.block_m,
            "BLOCK_K": self.block_k,
            **self.common(),
        }

    def of_globals(self) -> dict[str, Any]:
        """Arguments of the kernels that meet the global keys."""
        return {
            "GLOBALS": self.globals_,
            "HAS_GLOBAL_BIAS": self.has_global_bias,
            "BLOCK_G": min(self.block_k, max(16, triton.next_power_of_2(self.globals_))),
        }

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.query.device) if self.query.is_cuda else contextlib.nullcontext()

    def programs(self, block: int) -> int:
        """Of a kernel that takes blocks of a chunk's tokens."""
        return self.batch * self.heads * self.rows * self.columns * triton.cdiv(self.per_chunk, block)


def _forward(inputs: Inputs, window: Window, _: Tensor | None) -> tuple[Tensor, Tensor]:
    call = _Call(inputs, window)
    output = like_tokens(inputs.query)
    sums = inputs.query.new_empty(inputs.query.shape[:3], dtype=torch.float32)
    tensors = (call.query, call.key, call.value, call.global_key, call.global_value)
    with call.on_device():
        _forward_kernel[(call.programs(call.block_m),)](
            *tensors, call.bias, call.global_bias, inputs.neighbor, output, sums,
            *_strides(*tensors, output),
            call.bias_stride, call.heads, *window.size, call.rows, call.columns, call.scale,
            HAS_BIAS=call.has_bias, **call.of_globals(), **call.of_window(),
        )  # fmt: skip
    return output, sums


def _backward(
    inputs: Inputs,
    window: Window,
    _: Tensor | None,
    output: Tensor,
    sums: Tensor,
    gradient: Tensor,
    of_biases: bool,
) -> tuple[Tensor, ...]:
    call = _Call(inputs, window)
    gradients = empty_gradients(inputs, of_biases)
    gradient, output = _with_unit_stride(gradient), _with_unit_stride(output)
    delta = torch.empty_like(sums)
    tensors = (call.query, call.key, call.value, call.global_key, call.global_value)
    place = (*window.size, call.rows, call.columns, call.scale)
    true_scale = call.width**-0.5
    with call.on_device():
        _query_kernel[(call.programs(call.block_m),)](
            *tensors, call.bias, call.global_bias, inputs.neighbor, output, sums, gradient,
            delta, gradients[0],
            *_strides(*tensors, output, gradient),
            call.bias_stride, call.heads, *place, true_scale,
            HAS_BIAS=call.has_bias, **call.of_globals(), **call.of_window(),
        )  # fmt: skip
        blocks = {"BLOCK_M": call.block_k, "BLOCK_K": call.block_m}
        _key_kernel[(call.programs(call.block_m),)](
            *tensors[:3], call.bias, inputs.neighbor, sums, delta, gradient, gradients[1], gradients[2],
            *_strides(*tensors[:3], gradient, gradients[1]),
            call.bias_stride, call.heads, *place, true_scale,
            HAS_BIAS=call.has_bias, **(call.of_window() | blocks),
        )  # fmt: skip
        if call.globals_:
            _differentiate_globals(call, sums, delta, gradient, gradients)
        if gradients[5].numel():
            gradients[5].copy_(_differentiate_table(call, sums, delta, gradient))
    return gradients


def _differentiate_globals(
    call: _Call, sums: Tensor, delta: Tensor, gradient: Tensor, gradients: tuple[Tensor, ...]
) -> None:
    """Fills the gradients of global keys, values and biases."""
    arguments = call.of_globals()
    blocks = triton.cdiv(call.globals_, arguments["BLOCK_G"])
    parts = _parts(call.batch * call.heads * blocks, triton.cdiv(call.tokens, 256))
    tokens_of_part = triton.cdiv(triton.cdiv(call.tokens, parts), call.block_m) * call.block_m  # whole blocks
    shape = (call.batch, call.heads, parts, call.globals_)
    of_bias = sums.new_empty(shape)
    of_key, of_value = sums.new_empty(*shape, call.width), sums.new_empty(*shape, call.width)
    tensors = (call.query, call.global_key, call.global_value)
    _global_kernel[(call.batch * call.heads, parts, blocks)](
        *tensors, call.global_bias, sums, delta, gradient, of_key, of_value, of_bias,
        *_strides(*tensors, gradient),
        call.heads, call.tokens, tokens_of_part, call.scale, call.width**-0.5,
        BLOCK_M=call.block_m, **arguments, **call.common(),
    )  # fmt: skip
    gradients[3].copy_(of_key.sum(dim=2))
    gradients[4].copy_(of_value.sum(dim=2))
    if gradients[6].numel():
        gradients[6].copy_(of_bias.sum(dim=(0, 2)))


def _differentiate_table(call: _Call, sums: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """(h, 4w−1, 4w−1), float32."""
    blocks = triton.cdiv(call.per_chunk, call.block_m) * triton.cdiv(call.keys, call.block_k)
    parts = _parts(blocks * call.heads, call.batch * call.rows * call.columns)
    # Where one neighbour is seen, the places of the other seven are not written.
    make = torch.empty if call.window.neighbors == "all" else torch.zeros
    of_places = make(parts, call.heads, call.per_chunk, call.places, device=sums.device)
    tensors = (call.query, call.key, call.value)
    _bias_kernel[(parts, blocks, call.heads)](
        *tensors, call.bias, call.inputs.neighbor, sums, delta, gradient, of_places,
        *_strides(*tensors, gradient),
        call.bias_stride, call.heads, call.batch, *call.window.size, call.rows, call.columns, call.scale,
        **(call.of_window() | {"num_warps": 8}),  # the sum of a block's scores takes many registers
    )  # fmt: skip
    side = call.window.side
    by_place = of_places.sum(dim=0)[..., : call.window.places]
    return fold_window_bias(by_place.unflatten(2, (3 * side, 3 * side)).unflatten(1, (side, side)), side)


def _parts(programs: int, most: int) -> int:
    """Into how many parts a sum is split, so that there are `PROGRAMS` programs."""
    return max(1, min(most, PROGRAMS // max(1, programs)))


def _blocks(per_chunk: int, keys: int, width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Queries and keys of a block, and how many blocks are on their way from memory at a time.

    By what a program's blocks take of the shared memory: less than 100 kB, which every GPU has.
    """
    row = triton.next_power_of_2(width) * dtype.itemsize  # bytes
    queries, local, stages = (64, 64, 3) if row <= 128 else (64, 32, 2) if row <= 256 else (32, 16, 1)
    if dtype == torch.float32:  # whose products keep parts of their factors
        local, stages = min(local, 32), min(stages, 3 if row <= 128 else 1)
    return (
        min(queries, max(16, triton.next_power_of_2(per_chunk))),
        min(local, max(16, triton.next_power_of_2(keys))),
        stages,
    )


def _precision() -> str:
    """How float32 is multiplied: as TF32 where PyTorch may, else as exactly as float32, by three of TF32."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of images, heads and tokens, of one after the other."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


fused_attention = register("fused", _forward, _backward, keeps_sums=True)
