"""The kernels of `fused`: 2-D local attention in Triton, forward and backward.

One program computes a block of queries of one chunk (FlashAttention, Dao et al., 2022, on the global keys
and those of nine chunks). It loops over the keys in blocks, global ones first; the position of a key on the
map is computed from its index, so nothing is split into chunks or padded in memory. The biases of a chunk's
scores (position biases, −∞ for hidden keys) are the same for every image and for all chunks not at a border:
they are computed once per call, by query and key, and read from cache.

The backward pass has four kernels. Each sums in a fixed order and writes every element once, so that equal
inputs give equal gradients: of queries; of local keys and values, with a loop over the queries that see a
block of keys; of global keys, values and their biases; and of the biases of local keys.

Legend: w window, t = w² tokens of a chunk, M queries and K keys of a block, D head width, H × W the map.
Exponents are multiplied by log₂e, since the hardware computes powers of two.
"""

# Triton's parameters are pointers, integers and tl.constexpr, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = (
    "H", "W", "rows", "columns", "row_kinds", "column_kinds", "num_column_kinds", "heads", "images", "tokens",
    "tokens_per_part",
)  # fmt: skip
"""Parameters on whose values kernels are not specialized."""


@triton.jit
def _load_vectors(pointers, is_valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load vectors of width D at `pointers` as (rows, BLOCK_D); 0 where the mask is False."""
    columns = tl.arange(0, BLOCK_D)
    mask = is_valid[:, None] & (columns < D)[None, :]
    return tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_rows(pointer, rows, stride, is_valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of width D as (rows, BLOCK_D); 0 where the mask is False."""
    return _load_vectors(pointer + rows * stride, is_valid, D, BLOCK_D)


@triton.jit
def _store_rows(pointer, rows, stride, is_valid, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows of width D; the inverse of `_load_rows`."""
    columns = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=is_valid[:, None] & (columns < D)[None, :])


@triton.jit
def _neighbor_offset(neighbor, NEIGHBORS: tl.constexpr):
    """Return the (row, column) offset, in chunks, of the visible neighbor; (0, 0) without one."""
    if NEIGHBORS == "one":
        number = tl.load(neighbor)
        number = (number + (number >= 4)).to(tl.int32)
        return number // 3 - 1, number % 3 - 1
    return 0, 0


@triton.jit
def _program_block(heads, rows, columns, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's tokens in their chunk, the chunk's row and column, the image and the head."""
    blocks: tl.constexpr = (WINDOW * WINDOW + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    chunk = program // blocks % (rows * columns)
    image_head = program // blocks // (rows * columns)
    tokens = program % blocks * BLOCK + tl.arange(0, BLOCK)
    image, head = (image_head // heads).to(tl.int64), (image_head % heads).to(tl.int64)  # factors of offsets
    return tokens, chunk // columns, chunk % columns, image, head


@triton.jit
def _chunk_position(n, row_offset, column_offset, WINDOW: tl.constexpr, NEIGHBORS: tl.constexpr):
    """Return the row and column, in the nine chunks, of the n-th visible token."""
    if NEIGHBORS == "all":
        return n // (3 * WINDOW), n % (3 * WINDOW)
    chunk = n // (WINDOW * WINDOW)  # 0: the query's own chunk
    inside = n % (WINDOW * WINDOW)
    return (
        (1 + chunk * row_offset) * WINDOW + inside // WINDOW,
        (1 + chunk * column_offset) * WINDOW + inside % WINDOW,
    )


@triton.jit
def _on_map(position, length, chunks, WINDOW: tl.constexpr, CYCLIC: tl.constexpr):
    """Return positions along one axis, wrapped if cyclic, and a mask of those on the map."""
    if CYCLIC:
        padded = chunks * WINDOW
        position = tl.where(position < 0, position + padded, position)
        position = tl.where(position >= padded, position - padded, position)
    return position, position.to(tl.uint32) < length.to(tl.uint32)  # False for negative positions


@triton.jit
def _visible_tokens(
    n, row_offset, column_offset, chunk_row, chunk_column, H, W, rows, columns,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr,
    LIMIT_ROWS: tl.constexpr,
):  # fmt: skip
    """Return the indices on the map of the n-th visible tokens of a chunk, and a mask of those on the map.

    With LIMIT_ROWS, which saves instructions, tokens from index KEYS on are hidden by their rows if possible.
    """
    row, column = _chunk_position(n, row_offset, column_offset, WINDOW, NEIGHBORS)
    if LIMIT_ROWS and NEIGHBORS == "all" and not CYCLIC:
        H = tl.minimum(H, (chunk_row + 2) * WINDOW)
    row, row_on_map = _on_map((chunk_row - 1) * WINDOW + row, H, rows, WINDOW, CYCLIC)
    column, column_on_map = _on_map((chunk_column - 1) * WINDOW + column, W, columns, WINDOW, CYCLIC)
    is_visible = row_on_map & column_on_map
    if not LIMIT_ROWS or NEIGHBORS != "all" or CYCLIC:
        is_visible = is_visible & (n < KEYS)
    return row * W + column, is_visible


@triton.jit
def _kind(chunk, chunks, kinds):
    """Return the kind of a chunk along one axis: see `borders.border_kinds`."""
    case = tl.where(chunk > 0, 3, 0) + tl.minimum(chunks - 1 - chunk, 2)
    return kinds >> 3 * case & 7


@triton.jit
def _key_block(
    first, key, value, global_key, global_value, k_token, g_token,
    row_offset, column_offset, chunk_row, chunk_column, H, W, rows, columns,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, GLOBALS: tl.constexpr, NEIGHBORS: tl.constexpr,
    CYCLIC: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load the keys and values (K, D) of a chunk from index `first` on, global ones first."""
    n = first + tl.arange(0, BLOCK_K)
    index, is_key = _visible_tokens(
        n - GLOBALS, row_offset, column_offset, chunk_row, chunk_column, H, W, rows, columns,
        KEYS, WINDOW, NEIGHBORS, CYCLIC, LIMIT_ROWS=True,
    )  # fmt: skip
    key_pointers, value_pointers = key + index * k_token, value + index * k_token
    if GLOBALS > 0:
        is_global = n < GLOBALS
        key_pointers = tl.where(is_global, global_key + n * g_token, key_pointers)
        value_pointers = tl.where(is_global, global_value + n * g_token, value_pointers)
        is_key = is_key | is_global
        if ALIGNED:  # tl.where hides the alignment from the compiler
            key_pointers = tl.multiple_of(key_pointers, 16)
            value_pointers = tl.multiple_of(value_pointers, 16)
    return _load_vectors(key_pointers, is_key, D, BLOCK_D), _load_vectors(value_pointers, is_key, D, BLOCK_D)


@triton.jit
def _index_range(
    row, rows, KEYS: tl.constexpr, WINDOW: tl.constexpr, NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr
):
    """Return the range of key indices of a chunk, excluding rows of chunks above and below the map."""
    if NEIGHBORS == "all" and not CYCLIC:
        row_of_chunks: tl.constexpr = 3 * WINDOW * WINDOW
        return tl.where(row == 0, row_of_chunks, 0), tl.where(row == rows - 1, 2, 3) * row_of_chunks
    return 0, KEYS


@triton.jit
def _chunk_tokens(m, chunk_row, chunk_column, H, W, WINDOW: tl.constexpr):
    """Return the indices on the map of the m-th tokens of a chunk, and a mask of those on the map."""
    row, column = chunk_row * WINDOW + m // WINDOW, chunk_column * WINDOW + m % WINDOW
    return row * W + column, (m < WINDOW * WINDOW) & (row < H) & (column < W)


@triton.jit
def _chunk_kind(row, column, rows, columns, row_kinds, column_kinds, num_column_kinds):
    """Return the kind of a chunk, by rows and columns."""
    return _kind(row, rows, row_kinds) * num_column_kinds + _kind(column, columns, column_kinds)


@triton.jit
def _bias_pointer(
    bias, row, column, head, rows, columns, row_kinds, column_kinds, num_column_kinds, b_kind, b_head
):
    """Return the pointer to the biases of a chunk and a head; `head` has 64 bits."""
    kind = _chunk_kind(row, column, rows, columns, row_kinds, column_kinds, num_column_kinds)
    return bias + head * b_head + kind.to(tl.int64) * b_kind


@triton.jit
def _bias_pointers(bias, first, m, ROW: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the pointers (M, K) to the biases of the queries m of a chunk and its keys from `first` on."""
    row = tl.minimum(m, WINDOW * WINDOW - 1)  # rows beyond the last are not stored
    if WINDOW * WINDOW * ROW >= 2**31:
        row = row.to(tl.int64)
    return bias + row[:, None] * ROW + first + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _load_bias(bias, first, m, ROW: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load the biases (M, K) of the queries m of a chunk and its keys from index `first` on."""
    return tl.load(_bias_pointers(bias, first, m, ROW, WINDOW, BLOCK_K)).to(tl.float32)


@triton.jit
def _score_factor(scale, BIAS_IN_ACCUMULATOR: tl.constexpr):
    """Return the factor of `_scores`, with which the exponents are fused multiply-adds."""
    return scale if BIAS_IN_ACCUMULATOR else 1.0


@triton.jit
def _scores(left, right, bias, scale, BIAS_IN_ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr):
    """Return the scores (a, b) of queries and keys (a, D) and (b, D), in either order.

    Multiplied by `_score_factor`, they are scores times log₂e. With BIAS_IN_ACCUMULATOR the accumulator is
    initialized with the biases, which are divided by `scale`.
    """
    if BIAS_IN_ACCUMULATOR:
        return tl.dot(left, tl.trans(right), bias, input_precision=PRECISION)
    return tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale + bias


@triton.jit
def _accumulate(scores, factor, value, maximum, total, output, PRECISION: tl.constexpr):
    """Update the online softmax: maximum of the scores, sum of exponentials, and weighted sum of values."""
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    subtrahend = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * factor  # 0: no visible key yet
    weights = tl.exp2(scores * factor - subtrahend[:, None])
    rescale = tl.exp2(maximum * factor - subtrahend)
    total = total * rescale + tl.sum(weights, axis=1)
    output = output * rescale[:, None]
    output = tl.dot(weights.to(value.dtype), value, output, input_precision=PRECISION)
    return new_maximum, total, output


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, global_key, global_value, bias, neighbor, output, sums,
    q_image, q_head, q_token, k_image, k_head, k_token,
    g_image, g_head, g_token, o_image, o_head, o_token,
    b_kind, b_head, row_kinds, column_kinds, num_column_kinds,
    heads, H, W, rows, columns, scale,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, ROW: tl.constexpr, GLOBALS: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS_IN_ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute output and logarithm of the sum of exponentials for a block of queries of one chunk."""
    m, row, column, image, head = _program_block(heads, rows, columns, WINDOW, BLOCK_M)
    token, is_query = _chunk_tokens(m, row, column, H, W, WINDOW)
    queries = _load_rows(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
    row_offset, column_offset = _neighbor_offset(neighbor, NEIGHBORS)
    bias = _bias_pointer(
        bias, row, column, head, rows, columns, row_kinds, column_kinds, num_column_kinds, b_kind, b_head
    )
    factor = _score_factor(scale, BIAS_IN_ACCUMULATOR)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    _, end = _index_range(row, rows, KEYS, WINDOW, NEIGHBORS, CYCLIC)
    for first in range(0, GLOBALS + end, BLOCK_K):
        keys, values = _key_block(
            first, key + image * k_image + head * k_head, value + image * k_image + head * k_head,
            global_key + image * g_image + head * g_head, global_value + image * g_image + head * g_head,
            k_token, g_token, row_offset, column_offset, row, column, H, W, rows, columns,
            KEYS, WINDOW, GLOBALS, NEIGHBORS, CYCLIC, ALIGNED, D, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        biases = _load_bias(bias, first, m, ROW, WINDOW, BLOCK_K)
        scores = _scores(queries, keys, biases, scale, BIAS_IN_ACCUMULATOR, PRECISION)
        maximum, total, result = _accumulate(scores, factor, values, maximum, total, result, PRECISION)
    result = result / total[:, None]
    logsum = maximum * factor + tl.log2(total)
    _store_rows(output + image * o_image + head * o_head, token, o_token, is_query, result, D, BLOCK_D)
    tl.store(sums + (image * heads + head) * H * W + token, logsum / LOG2E, mask=is_query)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    query, key, value, global_key, global_value, bias, neighbor, output, sums, gradient, statistics,
    grad_query,
    q_image, q_head, q_token, k_image, k_head, k_token,
    g_image, g_head, g_token, o_image, o_head, o_token,
    d_image, d_head, d_token, oq_image, oq_head, oq_token,
    b_kind, b_head, row_kinds, column_kinds, num_column_kinds,
    heads, H, W, rows, columns, scale, true_scale,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, ROW: tl.constexpr, GLOBALS: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS_IN_ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of queries, and the statistics that the other kernels load."""
    m, row, column, image, head = _program_block(heads, rows, columns, WINDOW, BLOCK_M)
    token, is_query = _chunk_tokens(m, row, column, H, W, WINDOW)
    queries = _load_rows(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
    outputs = _load_rows(output + image * o_image + head * o_head, token, o_token, is_query, D, BLOCK_D)
    upstream = _load_rows(gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D)
    query_index = (image * heads + head) * H * W + token
    logsum = tl.load(sums + query_index, mask=is_query, other=float("inf")) * LOG2E
    dot = tl.sum(outputs.to(tl.float32) * upstream.to(tl.float32), axis=1)
    tl.store(statistics + 2 * query_index, logsum, mask=is_query)
    tl.store(statistics + 2 * query_index + 1, dot, mask=is_query)
    row_offset, column_offset = _neighbor_offset(neighbor, NEIGHBORS)
    bias = _bias_pointer(
        bias, row, column, head, rows, columns, row_kinds, column_kinds, num_column_kinds, b_kind, b_head
    )
    factor = _score_factor(scale, BIAS_IN_ACCUMULATOR)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    _, end = _index_range(row, rows, KEYS, WINDOW, NEIGHBORS, CYCLIC)
    for first in range(0, GLOBALS + end, BLOCK_K):
        keys, values = _key_block(
            first, key + image * k_image + head * k_head, value + image * k_image + head * k_head,
            global_key + image * g_image + head * g_head, global_value + image * g_image + head * g_head,
            k_token, g_token, row_offset, column_offset, row, column, H, W, rows, columns,
            KEYS, WINDOW, GLOBALS, NEIGHBORS, CYCLIC, ALIGNED, D, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        biases = _load_bias(bias, first, m, ROW, WINDOW, BLOCK_K)
        scores = _scores(queries, keys, biases, scale, BIAS_IN_ACCUMULATOR, PRECISION)
        weights = tl.exp2(scores * factor - logsum[:, None])
        grad_weights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - dot[:, None])
        result = tl.dot(grad_scores.to(keys.dtype), keys, result, input_precision=PRECISION)
    result *= true_scale
    _store_rows(grad_query + image * oq_image + head * oq_head, token, oq_token, is_query, result, D, BLOCK_D)


@triton.jit
def _statistics(statistics, query_index, is_valid):
    """Load log₂ of the sum of exponentials and the sum of output × gradient per query; 0 where masked.

    The two are adjacent and loaded as one block: Triton 3.6 repeats the load of a vector with fewer elements
    than threads in the layout of the matrices, which doubles the instructions of the loop.
    """
    pointers = statistics + query_index[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(pointers, mask=is_valid[:, None], other=0.0))


@triton.jit
def _accumulate_gradients(
    key, value, query, upstream, logsum, dot, scale, bias, grad_keys, grad_values,
    BIAS_IN_ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients from a block of queries (M, D) to those of keys and values (K, D); bias is (K, M).

    Scores are transposed, (K, M), which is the layout that the following products need.

    Returns:
        The two sums, and the gradients of the scores (K, M) before scaling.
    """
    scores = _scores(key, query, bias, scale, BIAS_IN_ACCUMULATOR, PRECISION)
    weights = tl.exp2(scores * _score_factor(scale, BIAS_IN_ACCUMULATOR) - logsum[None, :])
    grad_values = tl.dot(weights.to(upstream.dtype), upstream, grad_values, input_precision=PRECISION)
    grad_weights = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - dot[None, :])
    grad_keys = tl.dot(grad_scores.to(query.dtype), query, grad_keys, input_precision=PRECISION)
    return grad_keys, grad_values, grad_scores


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    query, key, value, bias, neighbor, statistics, gradient, grad_key, grad_value,
    q_image, q_head, q_token, k_image, k_head, k_token,
    d_image, d_head, d_token, o_image, o_head, o_token,
    b_kind, b_head, row_kinds, column_kinds, num_column_kinds,
    heads, H, W, rows, columns, scale, true_scale,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, ROW: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BIAS_IN_ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of keys of one chunk and of their values.

    The queries that see them are in the chunks around, at the opposite offsets. The bias is stored by key,
    then by query, with −∞ for positions without a query.
    """
    n, row, column, image, head = _program_block(heads, rows, columns, WINDOW, BLOCK_K)
    token, is_key = _chunk_tokens(n, row, column, H, W, WINDOW)
    keys = _load_rows(key + image * k_image + head * k_head, token, k_token, is_key, D, BLOCK_D)
    values = _load_rows(value + image * k_image + head * k_head, token, k_token, is_key, D, BLOCK_D)
    row_offset, column_offset = _neighbor_offset(neighbor, NEIGHBORS)
    bias = _bias_pointer(
        bias, row, column, head, rows, columns, row_kinds, column_kinds, num_column_kinds, b_kind, b_head
    )
    grad_keys = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_values = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    start, end = _index_range(row, rows, KEYS, WINDOW, NEIGHBORS, CYCLIC)
    for first in range(start // BLOCK_M * BLOCK_M, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        index, is_query = _visible_tokens(
            m, -row_offset, -column_offset, row, column, H, W, rows, columns,
            KEYS, WINDOW, NEIGHBORS, CYCLIC, LIMIT_ROWS=False,  # else more registers for compute capability 8
        )  # fmt: skip
        queries = _load_rows(query + image * q_image + head * q_head, index, q_token, is_query, D, BLOCK_D)
        upstream = _load_rows(
            gradient + image * d_image + head * d_head, index, d_token, is_query, D, BLOCK_D
        )
        query_index = (image * heads + head) * H * W + index
        logsum, dot = _statistics(statistics, query_index, is_query)
        biases = _load_bias(bias, first, n, ROW, WINDOW, BLOCK_M)
        grad_keys, grad_values, _ = _accumulate_gradients(
            keys, values, queries, upstream, logsum, dot, scale, biases, grad_keys, grad_values,
            BIAS_IN_ACCUMULATOR, PRECISION,
        )  # fmt: skip
    grad_keys *= true_scale
    _store_rows(grad_key + image * o_image + head * o_head, token, o_token, is_key, grad_keys, D, BLOCK_D)
    _store_rows(grad_value + image * o_image + head * o_head, token, o_token, is_key, grad_values, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def global_kernel(
    query, global_key, global_value, bias, statistics, gradient, grad_key, grad_value, grad_bias,
    q_image, q_head, q_token, g_image, g_head, g_token,
    d_image, d_head, d_token, b_head, heads, tokens, tokens_per_part, scale, true_scale,
    GLOBALS: tl.constexpr, HAS_BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BIAS_IN_ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of global keys, their values and biases, from a part of the queries.

    Written to (images · heads, parts, GLOBALS, D), and (…, GLOBALS) for the biases, float32.
    """
    head, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = head.to(tl.int64) * tl.num_programs(1) + part
    image, head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    g = block * BLOCK_G + tl.arange(0, BLOCK_G)
    is_key = g < GLOBALS
    keys = _load_rows(global_key + image * g_image + head * g_head, g, g_token, is_key, D, BLOCK_D)
    values = _load_rows(global_value + image * g_image + head * g_head, g, g_token, is_key, D, BLOCK_D)
    biases = tl.zeros([BLOCK_G, BLOCK_M], tl.float32)
    if HAS_BIAS:
        biases += tl.load(bias + head * b_head + g, mask=is_key, other=0.0).to(tl.float32)[:, None]
    grad_keys = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    grad_values = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    grad_biases = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, tokens_per_part, BLOCK_M):
        token = part * tokens_per_part + first + tl.arange(0, BLOCK_M)
        is_query = token < tokens
        queries = _load_rows(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
        upstream = _load_rows(
            gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D
        )
        query_index = (image * heads + head) * tokens + token
        logsum, dot = _statistics(statistics, query_index, is_query)
        logsum = tl.where(is_query, logsum, float("inf"))
        grad_keys, grad_values, grad_scores = _accumulate_gradients(
            keys, values, queries, upstream, logsum, dot, scale, biases, grad_keys, grad_values,
            BIAS_IN_ACCUMULATOR, PRECISION,
        )  # fmt: skip
        grad_biases += tl.sum(grad_scores, axis=1)
    grad_keys *= true_scale
    _store_rows(grad_key + target * GLOBALS * D, g, D, is_key, grad_keys, D, BLOCK_D)
    _store_rows(grad_value + target * GLOBALS * D, g, D, is_key, grad_values, D, BLOCK_D)
    tl.store(grad_bias + target * GLOBALS + g, grad_biases, mask=is_key)


@triton.jit(do_not_specialize=SIZES)
def bias_kernel(
    query, key, value, bias, hidden, neighbor, statistics, gradient, grad_bias,
    q_image, q_head, q_token, k_image, k_head, k_token,
    d_image, d_head, d_token, h_kind, images, b_head, row_kinds, column_kinds, num_column_kinds,
    heads, H, W, rows, columns, scale,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, ROW: tl.constexpr, GLOBALS: tl.constexpr,
    NEIGHBORS: tl.constexpr, CYCLIC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BIAS_IN_ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of a head's local biases, summed over a part of all chunks and images.

    Written to (parts, heads, t, KEYS), float32.
    """
    part, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks: tl.constexpr = (KEYS + BLOCK_K - 1) // BLOCK_K
    m = block // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    row_offset, column_offset = _neighbor_offset(neighbor, NEIGHBORS)
    first = GLOBALS + block % blocks * BLOCK_K
    biases = _load_bias(bias + head.to(tl.int64) * b_head, first, m, ROW, WINDOW, BLOCK_K)
    result = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    parts, chunks = tl.num_programs(0), rows * columns
    image, row, column = (part // chunks).to(tl.int64), part // columns % rows, part % columns
    image_step, row_step, column_step = parts // chunks, parts // columns % rows, parts % columns
    for _ in range(part, images * chunks, parts):
        token, is_query = _chunk_tokens(m, row, column, H, W, WINDOW)
        index, is_key = _visible_tokens(
            n, row_offset, column_offset, row, column, H, W, rows, columns,
            KEYS, WINDOW, NEIGHBORS, CYCLIC, LIMIT_ROWS=True,
        )  # fmt: skip
        queries = _load_rows(query + image * q_image + head * q_head, token, q_token, is_query, D, BLOCK_D)
        keys = _load_rows(key + image * k_image + head * k_head, index, k_token, is_key, D, BLOCK_D)
        values = _load_rows(value + image * k_image + head * k_head, index, k_token, is_key, D, BLOCK_D)
        upstream = _load_rows(
            gradient + image * d_image + head * d_head, token, d_token, is_query, D, BLOCK_D
        )
        query_index = (image * heads + head) * H * W + token
        # Loaded one by one: as one block they would need more registers than available in float32.
        logsum = tl.load(statistics + 2 * query_index, mask=is_query, other=float("inf"))
        dot = tl.load(statistics + 2 * query_index + 1, mask=is_query, other=0.0)
        kind = _chunk_kind(row, column, rows, columns, row_kinds, column_kinds, num_column_kinds)
        hidden_bias = tl.load(hidden + kind * h_kind + block % blocks * BLOCK_K + tl.arange(0, BLOCK_K))
        if BIAS_IN_ACCUMULATOR:
            masked = biases + hidden_bias[None, :]
            scores = _scores(queries, keys, masked, scale, BIAS_IN_ACCUMULATOR, PRECISION)
        else:  # needs fewer registers
            scores = _scores(queries, keys, biases, scale, BIAS_IN_ACCUMULATOR, PRECISION)
            scores += hidden_bias[None, :]
        weights = tl.exp2(scores * _score_factor(scale, BIAS_IN_ACCUMULATOR) - logsum[:, None])
        grad_weights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        result += weights * (grad_weights - dot[:, None])
        # The chunk `parts` further: divisions would take more instructions.
        column += column_step
        row += row_step + (column >= columns)
        image += image_step + (row >= rows)
        column = tl.where(column >= columns, column - columns, column)
        row = tl.where(row >= rows, row - rows, row)
    target = grad_bias + (part.to(tl.int64) * heads + head) * WINDOW * WINDOW * KEYS
    is_valid = (m < WINDOW * WINDOW)[:, None] & (n < KEYS)[None, :]
    tl.store(target + m.to(tl.int64)[:, None] * KEYS + n[None, :], result, mask=is_valid)
