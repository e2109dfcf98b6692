# SPDX-License-Identifier: Apache-2.0
"""The keys that a query of rel_attention sees, and its scores: see rel_attention.py."""

import triton
import triton.language as tl

from fastasr.kernels._activation import TANH, activate_with_slope
from fastasr.kernels._attention_tiles import NONE, load_rows_from, products
from fastasr.kernels._rel_position_tiles import query_key
from fastasr.kernels._relative_shift import by_key
from fastasr.kernels._special import LOG2_E

SIZES = [
    "frames",
    "keys",
    "chunk",
    "left",
    "right",
    "batch",
    "blocks",
    "heads",
    "threshold",
    "before",
    "behind",
]
UNALIGNED = ["PADDING", "MASK", "BOUNDS", "SEED"]


# --------------------------------------------------------------------------- the keys of a query
# sizes: (frames, keys, chunk, left, right, BOUNDS); negative: no limit. BOUNDS is the table of _recordings.py or None.
# Without WINDOW nothing reads what follows keys.
@triton.jit
def context(i, sizes, WINDOW: tl.constexpr):
    """Returns [first, end) of the keys in the context of queries i; those behind the last one have its context."""
    frames, keys, chunk, left, right, BOUNDS = sizes
    first, end = i, i
    if WINDOW:
        i = tl.minimum(i, frames - 1)
        start = (i + (keys - frames)) // chunk * chunk
        first = tl.where(left < 0, 0, tl.maximum(start - left, 0))
        end = tl.where(right < 0, keys, tl.minimum(start + chunk + right, keys))
        if BOUNDS is not None:
            first = tl.maximum(first, tl.load(BOUNDS + i))
            end = tl.minimum(end, tl.load(BOUNDS + frames + i))
    return first, end


@triton.jit
def keys_of_all(first, last, sizes, WINDOW: tl.constexpr):
    """Returns [begin, end) of the keys in the context of all of the queries [first, last]."""
    begin, end = 0, sizes[1]
    if WINDOW:
        begin, _ = context(last, sizes, WINDOW)
        _, end = context(first, sizes, WINDOW)
    return begin, end


@triton.jit
def _from_block(begin, end, BOUNDS, BLOCK: tl.constexpr):
    """Returns the range [begin, end) from the beginning of a block on, and an empty one as it is."""
    whole = begin // BLOCK * BLOCK
    if BOUNDS is not None:
        end = tl.where(begin < end, end, whole)
    return whole, end


@triton.jit
def keys_seen(first, last, sizes, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns [begin, end) of the keys in the context of any of the queries [first, last]; begin is a multiple of
    BLOCK.
    """
    begin, end = 0, sizes[1]
    if WINDOW:
        begin, _ = context(first, sizes, WINDOW)
        _, end = context(last, sizes, WINDOW)
        begin, end = _from_block(begin, end, sizes[5], BLOCK)
    return begin, end


@triton.jit
def queries_seeing(first, last, sizes, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns [begin, end) of the queries with any of the keys [first, last] in their context; begin is a multiple of
    BLOCK.
    """
    begin, end = _between(first, last, sizes, WINDOW)
    if WINDOW:
        begin, end = _from_block(begin, end, sizes[5], BLOCK)
    return begin, end


@triton.jit
def queries_of_all(first, last, sizes, WINDOW: tl.constexpr):
    """Returns [begin, end) of the queries with all of the keys [first, last] in their context."""
    return _between(tl.minimum(last, sizes[1] - 1), first, sizes, WINDOW)


@triton.jit
def _between(first, last, sizes, WINDOW: tl.constexpr):
    """Returns [begin, end) of the queries from the first one that sees key ``first`` to the last one that sees key
    ``last``."""
    frames, keys, chunk, left, right, BOUNDS = sizes
    begin, end = 0, frames
    if WINDOW:
        cached = keys - frames
        begin = tl.where(right < 0, 0, tl.maximum(tl.maximum(first - right, 0) // chunk * chunk - cached, 0))
        end = tl.where(left < 0, frames, tl.minimum((last + left) // chunk * chunk + chunk - cached, frames))
        if BOUNDS is not None:  # without a cache
            begin = tl.maximum(begin, tl.load(BOUNDS + first))
            end = tl.minimum(end, tl.load(BOUNDS + frames + tl.minimum(last, frames - 1)))
    return begin, end


# --------------------------------------------------------------------------- scores
# tensors: (Q, K, V, POS, U, W, head, span); the first three begin at a head of a sequence, the others may be None,
# because a function returns no None. span: (EDGES, row, side, r_time, r_head, before, behind) with the strides of POS
# between rows and heads, and how many frames before and behind a query have rows; EDGES + row + i is the product of
# query i and the first row, ``side`` further that of the last one; EDGES is None where no query sees keys beyond.
# masks: (PADDING, MASK, sequence, mask_batch, first and end of the keys in the queries' context); each may be None,
# the last two where the queries change with the tile.
# biases: (BIAS, GATE, KEY_BIAS, head, row, heads, c_batch, c_head), where ``row`` is the sequence's first of (sequence,
# frame), and the last two are strides of KEY_BIAS; each may be None
@triton.jit
def of_head(
    Q, K, V, head, sequence, q_batch, k_batch, v_batch, DIM: tl.constexpr, VALUE_DIM: tl.constexpr
):  # fmt: skip
    """Returns q, k and v of a head and a sequence."""
    q = sequence * q_batch + head * DIM
    k = sequence * k_batch + head * DIM
    v = sequence * v_batch + head * VALUE_DIM
    return Q + q, K + k, V + v


@triton.jit
def offset_biases(biases, i, keep_i, j, frames, keys):
    """Returns [queries, keys] numbers of the bias by offset."""
    BIAS, head = biases[0], biases[3]
    at = BIAS + head * (frames + keys - 1) + (frames - 1)
    keep = keep_i[:, None] & (j < keys)[None, :]
    return tl.load(at + (j[None, :] - i[:, None]), mask=keep, other=0.0).to(tl.float32)


@triton.jit
def gates(GATE, row, head, heads, i, keep_i):
    """Returns the factors of the bias by offset of queries i."""
    return tl.load(GATE + (row + i) * heads + head, mask=keep_i, other=0.0).to(tl.float32)


@triton.jit
def key_biases(biases, sequence, j, keys):
    """Returns the bias by key of keys j."""
    _bias, _gate, KEY_BIAS, head, _row, _heads, c_batch, c_head = biases
    at = KEY_BIAS + sequence * c_batch + head * c_head
    return tl.load(at + j, mask=j < keys, other=0.0).to(tl.float32)


@triton.jit
def _biased(
    Q, BIAS, head, first, q_time, keep, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Returns rows of q + bias from ``first`` on, rounded as they are stored, if they fit a block of channels; else
    zeros that nothing reads.
    """
    rows = tl.zeros([BLOCK_M, BLOCK_D], Q.dtype.element_ty)
    if BIAS is not None:
        BIAS += head * DIM
    if DIM <= BLOCK_D:
        rows = load_rows_from(Q, first, q_time, tl.arange(0, BLOCK_D), keep, DIM, BIAS)
    return rows


@triton.jit
def queries(tensors, first, q_time, keep, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns (q + u, q + w) of rows from ``first`` on, see ``_biased``; q + u twice where there are no positions."""
    Q, _k, _v, POS, U, W, head, _span = tensors
    content = _biased(Q, U, head, first, q_time, keep, DIM, BLOCK_M, BLOCK_D)
    position = content
    if POS is not None:
        position = _biased(Q, W, head, first, q_time, keep, DIM, BLOCK_M, BLOCK_D)
    return content, position


@triton.jit
def is_spanned(first, keys, span, BLOCK: tl.constexpr):
    """Says whether any of BLOCK rows of R from ``first`` on, counted as if every key had one, is in the span."""
    _edges, _row, _side, _r_time, _r_head, before, behind = span
    distance = first - (keys - 1)
    return (distance + BLOCK > 1 - before) & (distance < behind)


@triton.jit
def band(
    rows, tensors, i, q_time, keep_i, start, sizes,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns the [BLOCK_M, BLOCK_N] products of q + w and the rows of R from ``start`` on; zeros, which nothing
    reads, where there are no positions. Beyond the span all keys of a query have one product.
    """
    Q, _k, _v, POS, _u, W, head, span = tensors
    EDGES, row, side, r_time, r_head, before, behind = span
    if W is not None:
        W += head * DIM
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if POS is not None:
        POS += head * r_head
        lanes = tl.arange(0, BLOCK_N)
        if EDGES is None:
            rows_of_r = sizes[0] + sizes[1] - 1
            if sizes[5] is not None:
                start -= sizes[1] - 1 - before
                rows_of_r = before + behind + 1
            keep_r = (start + lanes).to(tl.uint32) < rows_of_r.to(tl.uint32)  # not below 0 either
            if DIM <= BLOCK_D:
                # [BLOCK_N, BLOCK_D]
                piece = load_rows_from(POS, start, r_time, tl.arange(0, BLOCK_D), keep_r, DIM)
                scores = tl.dot(rows, tl.trans(piece), scores)
            else:
                scores = products(
                    scores, Q, i, q_time, keep_i, POS, start + lanes, r_time, keep_r, DIM, BLOCK_D, W
                )  # fmt: skip
        else:
            distance = start + lanes - (sizes[1] - 1)
            if is_spanned(start, sizes[1], span, BLOCK_N):
                r = tl.minimum(tl.maximum(distance, -before), behind) + before
                scores = query_key(
                    rows, Q, i, q_time, keep_i, POS, r, r_time, r >= 0, DIM, BLOCK_D, BLOCK_M, BLOCK_N, W
                )  # fmt: skip
            else:
                edge = EDGES + row + tl.where(start - (sizes[1] - 1) >= behind, side, 0)
                scores += tl.load(edge + i, mask=keep_i, other=0.0)[:, None]
    return scores


@triton.jit
def through_cap(slopes, scores, cap):
    """Returns gradients of scores before a soft cap, from those after it."""
    if cap is not None:
        t = tl.maximum(scores, -cap) / cap  # -inf where hidden
        slopes *= tl.fma(-t, t, 1.0)
    return slopes


@triton.jit
def bits_of(biases, scale, cap):
    """Returns the factor that makes scores of 16 bits, as ``scores_of`` leaves them, exponents of 2: log2(e), and the
    scale if nothing is added to scores.
    """
    bits = scale * LOG2_E
    if biases[0] is not None or biases[2] is not None or cap is not None:
        bits = LOG2_E
    return bits


@triton.jit
def _masked(scores, hidden, masks, i, j, sizes, WINDOW: tl.constexpr):
    """Returns -inf for scores of ``hidden`` keys and of those outside of a query's context."""
    hidden = hidden[None, :]
    if WINDOW:
        first, end = masks[4], masks[5]
        if first is None:
            first, end = context(i, sizes, WINDOW)
        hidden = hidden | (j[None, :] < first[:, None]) | (j[None, :] >= end[:, None])
    return tl.where(hidden, NONE, scores)


@triton.jit
def scores_of(
    first, second, rows, key, tensors, biases, masks, i, q_time, keep_i, start, partial, sizes, scale, cap,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    BRANCHES: tl.constexpr = True,
):  # fmt: skip
    """Returns the scores of queries i and keys from ``start`` on, -inf where hidden; of 16 bits without the scale if
    nothing is added to them, see ``bits_of``. The caller passes the two pieces of the band; ``rows`` and ``key`` hold
    q + u and k if they fit a block. ``partial`` says whether the tile has pairs outside of the context.
    """
    Q, K, _v, POS, U, _w, head, _span = tensors
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    BIAS, GATE, KEY_BIAS, _head, row, heads, _c_batch, _c_head = biases
    if U is not None:
        U += head * DIM
    PADDING, MASK, sequence, mask_batch, _first, _end = masks
    frames, keys = sizes[0], sizes[1]
    j = start + tl.arange(0, BLOCK_N)
    keep_j = j < keys
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DIM <= BLOCK_D:
        scores = tl.dot(rows, tl.trans(key), scores)
    else:
        scores = products(scores, Q, i, q_time, keep_i, K, j, q_time, keep_j, DIM, BLOCK_D, U)
    if POS is not None:
        scores += by_key(first, second, BLOCK_M, BLOCK_N)
    if PRECISE or BIAS is not None or KEY_BIAS is not None or cap is not None:
        scores *= scale
    if BIAS is not None:
        bias = offset_biases(biases, i, keep_i, j, frames, keys)  # [BLOCK_M, BLOCK_N]
        if GATE is not None:
            bias *= gates(GATE, row, head, heads, i, keep_i)[:, None]
        scores += bias
    if KEY_BIAS is not None:
        scores += key_biases(biases, sequence, j, keys)[None, :]
    if cap is not None:
        tanh, _ = activate_with_slope(scores / cap, TANH, PRECISE)
        scores = tanh * cap
    if MASK is not None:
        at = MASK + sequence * mask_batch + i.to(tl.int64)[:, None] * keys + j[None, :]
        hides = tl.load(at, mask=keep_i[:, None] & keep_j[None, :], other=0)
        scores = tl.where(hides != 0, NONE, scores)
    hidden = j >= keys
    some = partial | (start + BLOCK_N > keys)
    if PADDING is not None:
        hidden = tl.load(PADDING + sequence * keys + j, mask=keep_j, other=1) != 0
        some = some | (tl.max(hidden.to(tl.int32), axis=0) > 0)
    if BRANCHES and not PRECISE:  # in float32 a branch spills, and products take far longer than masks
        if some:  # few tiles
            scores = _masked(scores, hidden, masks, i, j, sizes, WINDOW)
    else:
        scores = _masked(scores, hidden, masks, i, j, sizes, WINDOW)
    return scores
