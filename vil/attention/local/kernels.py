"""The kernels of `fused`: 2-D local attention in Triton, forward and backward.

One program attends for a block of queries of one chunk (FlashAttention, Dao et al., 2022, on the global keys
and those of nine chunks). It goes through the keys in blocks, global ones first; where a key lies on the map
is computed from its number, so nothing is cut into chunks or padded in memory. What is added to the scores of
a chunk's queries (position biases, −∞ for what they do not see) is the same for every image, and for every
chunk but those at a border: it is laid out once per call by query and key, and read from cache.

The backward pass has four kernels, each of which sums in a fixed order and writes every element once, so that
equal inputs give equal gradients: of queries; of local keys and values, for which a program goes through the
queries that see a block of keys; of global keys, values and their biases; and of the biases of local keys.

Legend: w window, t = w² tokens of a chunk, M queries and K keys of a block, D head width, H × W the map.
Scores are multiplied by log₂e, as the hardware knows powers of two.
"""

# Compiled by Triton: types of kernels' parameters are pointers, integers and tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = (
    "H", "W", "rows", "columns", "row_kinds", "column_kinds", "kinds_of_columns", "heads", "images", "tokens",
    "tokens_of_part",
)  # fmt: skip
"""Parameters for whose values no kernel of its own is compiled."""


@triton.jit
def _vectors(pointers, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D), of vectors of width D that begin at `pointers`; 0 where there is none."""
    columns = tl.arange(0, BLOCK_D)
    mask = keep[:, None] & (columns < D)[None, :]
    return tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _matrix(pointer, rows, stride, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of vectors of width D; 0 where there is none."""
    return _vectors(pointer + rows * stride, keep, D, BLOCK_D)


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
    """Along one axis, for positions that may lie off the map: where on the map, and is it on it."""
    if CYCLIC:
        padded = chunks * WINDOW
        position = tl.where(position < 0, position + padded, position)
        position = tl.where(position >= padded, position - padded, position)
    return position, (position >= 0) & (position < length)


@triton.jit
def _around(
    n, row_step, column_step, chunk_row, chunk_column, H, W, rows, columns,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr,
):  # fmt: skip
    """For the n-th tokens of those that a chunk sees: which on the map, and is it on it."""
    row, column = _place(n, row_step, column_step, WINDOW, NEIGHBORS)
    row, real_row = _on_map((chunk_row - 1) * WINDOW + row, H, rows, WINDOW, CYCLIC)
    column, real_column = _on_map((chunk_column - 1) * WINDOW + column, W, columns, WINDOW, CYCLIC)
    return row * W + column, real_row & real_column & (n < KEYS)


@triton.jit
def _kind(chunk, chunks, kinds):
    """Along one axis, which of the layouts of the bias is that of a chunk: see `fused.border_kinds`."""
    case = tl.where(chunk > 0, 3, 0) + tl.minimum(chunks - 1 - chunk, 2)
    return kinds >> 3 * case & 7


@triton.jit
def _key_block(
    first, key, value, global_key, global_value, k_token, v_token, gk_token, gv_token,
    row_step, column_step, chunk_row, chunk_column, H, W, rows, columns,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, GLOBALS: tl.constexpr, NEIGHBORS: tl.constexpr,
    CYCLIC: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The keys and values (K, D) of a chunk from number `first` on, global ones first."""
    n = first + tl.arange(0, BLOCK_K)
    at, real = _around(
        n - GLOBALS, row_step, column_step, chunk_row, chunk_column, H, W, rows, columns,
        KEYS, WINDOW, NEIGHBORS, CYCLIC,
    )  # fmt: skip
    key_pointers, value_pointers = key + at * k_token, value + at * v_token
    if GLOBALS > 0:
        is_global = n < GLOBALS
        key_pointers = tl.where(is_global, global_key + n * gk_token, key_pointers)
        value_pointers = tl.where(is_global, global_value + n * gv_token, value_pointers)
        real = real | is_global
        if ALIGNED:  # the compiler does not see it through the choice between two
            key_pointers = tl.multiple_of(key_pointers, 16)
            value_pointers = tl.multiple_of(value_pointers, 16)
    return _vectors(key_pointers, real, D, BLOCK_D), _vectors(value_pointers, real, D, BLOCK_D)


@triton.jit
def _queries(m, chunk_row, chunk_column, H, W, WINDOW: tl.constexpr):
    """For tokens number m of a chunk: which on the map, and is it on it."""
    row, column = chunk_row * WINDOW + m // WINDOW, chunk_column * WINDOW + m % WINDOW
    return row * W + column, (m < WINDOW * WINDOW) & (row < H) & (column < W)


@triton.jit
def _bias_of(
    bias, row, column, head, rows, columns, row_kinds, column_kinds, kinds_of_columns, b_kind, b_head
):
    """Where the bias for a chunk and a head begins."""
    kind = _kind(row, rows, row_kinds) * kinds_of_columns + _kind(column, columns, column_kinds)
    return bias + kind * b_kind + head * b_head


@triton.jit
def _biases(bias, first, m, ROW: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr):
    """(M, K): what is added to the scores of queries m of a chunk and its keys from number `first` on."""
    row = tl.minimum(m, WINDOW * WINDOW - 1)  # those beyond the last are not written
    return tl.load(bias + row[:, None] * ROW + first + tl.arange(0, BLOCK_K)[None, :]).to(tl.float32)


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


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, global_key, global_value, bias, neighbor, output, sums,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    gk_image, gk_head, gk_token, gv_image, gv_head, gv_token, o_image, o_head, o_token,
    b_kind, b_head, row_kinds, column_kinds, kinds_of_columns,
    heads, H, W, rows, columns, scale,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, ROW: tl.constexpr, GLOBALS: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and logarithm of the sum of exponentials, for a block of queries of one chunk."""
    m, row, column, image, head = _block(heads, rows, columns, WINDOW, BLOCK_M)
    token, is_query = _queries(m, row, column, H, W, WINDOW)
    queries = _matrix(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
    row_step, column_step = _step(neighbor, NEIGHBORS)
    bias = _bias_of(
        bias, row, column, head, rows, columns, row_kinds, column_kinds, kinds_of_columns, b_kind, b_head
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, GLOBALS + KEYS, BLOCK_K):
        keys, values = _key_block(
            first, key + image * k_image + head * k_head, value + image * v_image + head * v_head,
            global_key + image * gk_image + head * gk_head, global_value + image * gv_image + head * gv_head,
            k_token, v_token, gk_token, gv_token, row_step, column_step, row, column, H, W, rows, columns,
            KEYS, WINDOW, GLOBALS, NEIGHBORS, CYCLIC, ALIGNED, D, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores += _biases(bias, first, m, ROW, WINDOW, BLOCK_K)
        top, total, result = _accumulate(scores, values, top, total, result, PRECISION)
    result = result / total[:, None]
    _write(output + image * o_image + head * o_head, token, o_token, is_query, result, D, BLOCK_D)
    tl.store(sums + (image * heads + head) * H * W + token, (top + tl.log2(total)) / LOG2E, mask=is_query)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    query, key, value, global_key, global_value, bias, neighbor, output, sums, gradient, statistics, of_query,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    gk_image, gk_head, gk_token, gv_image, gv_head, gv_token, o_image, o_head, o_token,
    d_image, d_head, d_token, oq_image, oq_head, oq_token,
    b_kind, b_head, row_kinds, column_kinds, kinds_of_columns,
    heads, H, W, rows, columns, scale, scale_of_query,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, ROW: tl.constexpr, GLOBALS: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries; and what `_statistics` reads, for the other kernels."""
    m, row, column, image, head = _block(heads, rows, columns, WINDOW, BLOCK_M)
    token, is_query = _queries(m, row, column, H, W, WINDOW)
    queries = _matrix(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
    outputs = _matrix(output + image * o_image + head * o_head, token, o_token, is_query, D, BLOCK_D)
    upstream = _matrix(gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D)
    at_query = (image * heads + head) * H * W + token
    logsum = tl.load(sums + at_query, mask=is_query, other=float("inf")) * LOG2E
    dot = tl.sum(outputs.to(tl.float32) * upstream.to(tl.float32), axis=1)
    tl.store(statistics + 2 * at_query, logsum, mask=is_query)
    tl.store(statistics + 2 * at_query + 1, dot, mask=is_query)
    row_step, column_step = _step(neighbor, NEIGHBORS)
    bias = _bias_of(
        bias, row, column, head, rows, columns, row_kinds, column_kinds, kinds_of_columns, b_kind, b_head
    )
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, GLOBALS + KEYS, BLOCK_K):
        keys, values = _key_block(
            first, key + image * k_image + head * k_head, value + image * v_image + head * v_head,
            global_key + image * gk_image + head * gk_head, global_value + image * gv_image + head * gv_head,
            k_token, v_token, gk_token, gv_token, row_step, column_step, row, column, H, W, rows, columns,
            KEYS, WINDOW, GLOBALS, NEIGHBORS, CYCLIC, ALIGNED, D, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores += _biases(bias, first, m, ROW, WINDOW, BLOCK_K)
        weights = tl.exp2(scores - logsum[:, None])
        of_weights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        of_scores = weights * (of_weights - dot[:, None])
        result = tl.dot(of_scores.to(keys.dtype), keys, result, input_precision=PRECISION)
    result *= scale_of_query
    _write(of_query + image * oq_image + head * oq_head, token, oq_token, is_query, result, D, BLOCK_D)


@triton.jit
def _statistics(statistics, at_query, keep):
    """For queries, log₂ of the sum of exponentials and the sum of output × gradient; 0 where there is none.

    They stand side by side and are loaded as one block: Triton 3.6 repeats the load of a vector with fewer
    elements than threads in the layout of the matrices, at twice the instructions of the whole loop.
    """
    pointers = statistics + at_query[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(pointers, mask=keep[:, None], other=0.0))


@triton.jit
def _add_gradients(
    key, value, query, upstream, logsum, dot, scale, bias, of_keys, of_values, PRECISION: tl.constexpr
):
    """Adds what a block of queries (M, D) gives a block of keys and values (K, D); their bias is (K, M).

    Scores stand the other way round here, (K, M): so they come out as the products after them want them.

    Returns:
        The two sums, and the gradients of the scores (K, M) before the scale.
    """
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale + bias
    weights = tl.exp2(scores - logsum[None, :])
    of_values = tl.dot(weights.to(upstream.dtype), upstream, of_values, input_precision=PRECISION)
    of_weights = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
    of_scores = weights * (of_weights - dot[None, :])
    of_keys = tl.dot(of_scores.to(query.dtype), query, of_keys, input_precision=PRECISION)
    return of_keys, of_values, of_scores


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    query, key, value, bias, neighbor, statistics, gradient, of_key, of_value,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    d_image, d_head, d_token, o_image, o_head, o_token,
    b_kind, b_head, row_kinds, column_kinds, kinds_of_columns,
    heads, H, W, rows, columns, scale, scale_of_query,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, ROW: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys of one chunk and of their values.

    The queries that see them stand around the chunk as the keys of a query do; a query `step` chunks away
    sees them `−step` chunks away. The bias is laid out by key, then by query, with −∞ for what is no query.
    """
    n, row, column, image, head = _block(heads, rows, columns, WINDOW, BLOCK_K)
    token, is_key = _queries(n, row, column, H, W, WINDOW)
    keys = _matrix(key + image * k_image + head * k_head, token, k_token, is_key, D, BLOCK_D)
    values = _matrix(value + image * v_image + head * v_head, token, v_token, is_key, D, BLOCK_D)
    row_step, column_step = _step(neighbor, NEIGHBORS)
    bias = _bias_of(
        bias, row, column, head, rows, columns, row_kinds, column_kinds, kinds_of_columns, b_kind, b_head
    )
    of_keys = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    of_values = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(0, KEYS, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        at, is_query = _around(
            m, -row_step, -column_step, row, column, H, W, rows, columns, KEYS, WINDOW, NEIGHBORS, CYCLIC
        )
        queries = _matrix(query + image * q_image + head * q_head, at, q_token, is_query, D, BLOCK_D)
        upstream = _matrix(gradient + image * d_image + head * d_head, at, d_token, is_query, D, BLOCK_D)
        at_query = (image * heads + head) * H * W + at
        logsum, dot = _statistics(statistics, at_query, is_query)
        biases = _biases(bias, first, n, ROW, WINDOW, BLOCK_M)
        of_keys, of_values, _ = _add_gradients(
            keys, values, queries, upstream, logsum, dot, scale, biases, of_keys, of_values, PRECISION
        )
    of_keys *= scale_of_query
    _write(of_key + image * o_image + head * o_head, token, o_token, is_key, of_keys, D, BLOCK_D)
    _write(of_value + image * o_image + head * o_head, token, o_token, is_key, of_values, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def global_kernel(
    query, global_key, global_value, bias, statistics, gradient, of_key, of_value, of_bias,
    q_image, q_head, q_token, gk_image, gk_head, gk_token, gv_image, gv_head, gv_token,
    d_image, d_head, d_token, b_head, heads, tokens, tokens_of_part, scale, scale_of_query,
    GLOBALS: tl.constexpr, HAS_BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
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
    biases = tl.zeros([BLOCK_G, 1], tl.float32)
    if HAS_BIAS:
        biases += tl.load(bias + head * b_head + g, mask=is_key, other=0.0).to(tl.float32)[:, None]
    of_keys = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    of_values = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    of_biases = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, tokens_of_part, BLOCK_M):
        token = part * tokens_of_part + first + tl.arange(0, BLOCK_M)
        is_query = token < tokens
        queries = _matrix(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
        upstream = _matrix(gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D)
        at_query = (image * heads + head) * tokens + token
        logsum, dot = _statistics(statistics, at_query, is_query)
        logsum = tl.where(is_query, logsum, float("inf"))
        of_keys, of_values, of_scores = _add_gradients(
            keys, values, queries, upstream, logsum, dot, scale, biases, of_keys, of_values, PRECISION
        )
        of_biases += tl.sum(of_scores, axis=1)
    of_keys *= scale_of_query
    _write(of_key + target * GLOBALS * D, g, D, is_key, of_keys, D, BLOCK_D)
    _write(of_value + target * GLOBALS * D, g, D, is_key, of_values, D, BLOCK_D)
    tl.store(of_bias + target * GLOBALS + g, of_biases, mask=is_key)


@triton.jit(do_not_specialize=SIZES)
def bias_kernel(
    query, key, value, bias, hidden, neighbor, statistics, gradient, of_bias,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    d_image, d_head, d_token, b_head, row_kinds, column_kinds, kinds_of_columns, heads, images,
    H, W, rows, columns, scale,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, ROW: tl.constexpr, GLOBALS: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of a head's biases of local keys, summed over a part of all chunks of all images.

    Written to (parts, heads, t, KEYS), float32.
    """
    part, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks: tl.constexpr = (KEYS + BLOCK_K - 1) // BLOCK_K
    m = block // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    row_step, column_step = _step(neighbor, NEIGHBORS)
    first = GLOBALS + block % blocks * BLOCK_K
    biases = _biases(bias + head * b_head, first, m, ROW, WINDOW, BLOCK_K)
    result = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for index in range(part, images * rows * columns, tl.num_programs(0)):
        image = (index // (rows * columns)).to(tl.int64)
        chunk = index % (rows * columns)
        row, column = chunk // columns, chunk % columns
        token, is_query = _queries(m, row, column, H, W, WINDOW)
        at, real = _around(
            n, row_step, column_step, row, column, H, W, rows, columns, KEYS, WINDOW, NEIGHBORS, CYCLIC
        )
        queries = _matrix(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
        keys = _matrix(key + image * k_image + head * k_head, at, k_token, real, D, BLOCK_D)
        values = _matrix(value + image * v_image + head * v_head, at, v_token, real, D, BLOCK_D)
        upstream = _matrix(gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D)
        at_query = (image * heads + head) * H * W + token
        # One by one: side by side they would take registers that this kernel lacks in float32.
        logsum = tl.load(statistics + 2 * at_query, mask=is_query, other=float("inf"))
        dot = tl.load(statistics + 2 * at_query + 1, mask=is_query, other=0.0)
        of_chunk = _bias_of(
            hidden, row, column, 0, rows, columns, row_kinds, column_kinds, kinds_of_columns, ROW, 0
        )
        unseen = tl.load(of_chunk + first + tl.arange(0, BLOCK_K)).to(tl.float32)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + biases
        weights = tl.exp2(scores + unseen[None, :] - logsum[:, None])
        of_weights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        result += weights * (of_weights - dot[:, None])
    target = of_bias + (part.to(tl.int64) * heads + head) * WINDOW * WINDOW * KEYS
    keep = (m < WINDOW * WINDOW)[:, None] & (n < KEYS)[None, :]
    tl.store(target + m[:, None] * KEYS + n[None, :], result, mask=keep)
