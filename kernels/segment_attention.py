# SPDX-License-Identifier: Apache-2.0
"""Attention of segments over memory, right context, left context and themselves; neither scores nor masks reach memory.

    P = softmax(q k^T / sqrt(d)) over what a segment sees, y = (P M) v
    With dP = (g v^T) M: D = sum P dP, dS = P (dP - D), dq = dS k / sqrt(d), dk = dS^T q / sqrt(d), dv = (P M)^T g

Lanes: the rows of a segment, [right context | frames | summary], then those of the next. As queries these are rows of
q; as keys the summary's lane is the row of memory that became of it. Segments before 0 hold a stream's past. A block is
as many whole segments as fit its rows, or a part of one. Products per pair of a query and a key, of d channels:

    kernel    program             sweeps                                          products
    forward   a block of queries  the keys that its segments see, as one list     2 d
    queries   a block of queries  the same list twice: statistics, then dq        5 d
    keys      a block of keys     the queries of all segments that may see them   4 d

A query sees an interval of each kind of keys in its block's list: in a tile these are the bits of one integer. A key
is seen by an interval of lanes. So masks cost one or two instructions per pair. Lengths and history move the ends of a
list, so hidden keys are not read. ``queries`` leaves D of each lane for ``keys``, and its log-sum-exp; in float32,
where rounding that number would move the weights' sum from 1, maximum and 1 / sum. ``keys`` owns its rows of dk and
dv: memory is O(T), without atomics. What a program does depends on the shapes and the generation of the GPU alone:
results repeat bit for bit. The host reads nothing back.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import exp_nonpositive
from fastasr.kernels._attention_tiles import NONE, load_rows, products, running, running_in_bits, sums
from fastasr.kernels._launch import (
    cdiv,
    contiguous_like,
    dot_options,
    generation,
    launch,
    next_power_of_2,
    rounded,
)
from fastasr.kernels._special import LOG2_E, bits_from, exp2

NOWHERE = tl.constexpr(1 << 30)  # a place behind every list
MEMORY, RIGHT, FRAME = (tl.constexpr(number) for number in range(3))  # kinds of keys
SIZES = [
    "frames", "segments", "segment", "left", "right", "memory", "past_frames", "past_memory", "queries", "lanes",
    "memory_lane", "frame_lane", "heads", "per", "group", "parts", "blocks", "share", "past", "reach",
]  # fmt: skip


# --------------------------------------------------------------------------- lanes
# sizes: frames, segments, segment, left, right, memory, past_frames, past_memory
@triton.jit
def _divided(a, b):
    """Returns quotient and remainder of numbers that are not negative, which takes half as many instructions."""
    quotient = (a.to(tl.uint32) // b.to(tl.uint32)).to(tl.int32)
    return quotient, a - quotient * b


@triton.jit
def place(program, blocks, heads, group, parts, per, share, ROWS: tl.constexpr):
    """Returns (sequence, head, first segment of the block; of its lanes the segment counted from that one, the number
    in the segment, their mask). ``share`` is 2^16 / per, rounded up, and 0 for blocks of one segment.
    """
    pair, block = _divided(program, blocks)
    sequence, head = _divided(pair, heads)
    number, part = _divided(block, parts)
    lane = part * ROWS + tl.arange(0, ROWS)
    own = lane * share >> 16
    return (
        sequence.to(tl.int64),
        head.to(tl.int64),
        number * group,
        own,
        lane - own * per,
        lane < group * per,
    )


@triton.jit
def visible(LENGTHS, HISTORY, sequence, sizes):
    """Returns (first frame, end of the frames, first row of memory) that a sequence may see at all; the past is
    negative.
    """
    frames, segments, _segment, _left, _right, _memory, past_frames, past_memory = sizes
    first, first_memory, end = -past_frames, -past_memory, frames
    if HISTORY is not None:
        first = -tl.maximum(tl.minimum(tl.load(HISTORY), past_frames), -frames).to(tl.int32)
        first_memory = -tl.maximum(tl.minimum(tl.load(HISTORY + 1), past_memory), -segments).to(tl.int32)
    if LENGTHS is not None:
        end = tl.maximum(tl.minimum(tl.load(LENGTHS + sequence), frames), 0).to(tl.int32)
    return first, end, first_memory


@triton.jit
def queries_at(s, at, keep, sizes):
    """Returns (row, whether a summary, whether there is such a row) of the lanes ``at`` of segments s."""
    frames, segments, segment, _left, right, _memory, _past_frames, _past_memory = sizes
    summary = at >= right + segment
    row = tl.where(at < right, s * right, s * segment + (segments - 1) * right) + at
    keep = keep & (s < segments) & (summary | (row < segments * right + frames))
    return tl.where(summary, segments * right + frames + s, row), summary, keep


@triton.jit
def row_of(kind, x, sizes, HAS_MEMORY: tl.constexpr):
    """Returns the row of keys by their kind and number within it."""
    _frames, segments, _segment, _left, right, _memory, past_frames, past_memory = sizes
    remembered = 0
    if HAS_MEMORY:
        remembered = past_memory + segments - 1
    row = remembered + x + tl.where(kind == RIGHT, 0, segments * right + past_frames)
    if HAS_MEMORY:
        row = tl.where(kind == MEMORY, past_memory + x, row)
    return row


# --------------------------------------------------------------------------- lists of keys
@triton.jit
def listed(bounds, first, group, sizes, HAS_MEMORY: tl.constexpr):
    """Lists the keys that a block's segments see, [memory | right context | frames]: (end of the memory, end of the
    right context, end of the list, and what to add to a key's place in the list for its number as each kind).
    """
    _frames, segments, segment, left, right, memory, _past_frames, _past_memory = sizes
    begin, stop, begin_memory = bounds
    end = tl.minimum(first + group, segments)
    m, memories = 0, 0
    if HAS_MEMORY:
        m = tl.maximum(first - memory, begin_memory)
        memories = tl.maximum(end - 1 - m, 0)
    t = tl.maximum(first * segment - left, begin)
    contexts = memories + (end - first) * right
    count = contexts + tl.maximum(tl.minimum(end * segment, stop) - t, 0)
    return memories, contexts, count, m, first * right - memories, t - contexts


@triton.jit
def keys_at(k, window, HAS_MEMORY: tl.constexpr):
    """Returns (kind, number) of places in a list."""
    memories, contexts, _count, of_memory, of_context, of_frame = window
    kind = tl.where(k < contexts, RIGHT, FRAME)
    x = k + tl.where(k < contexts, of_context, of_frame)
    if HAS_MEMORY:
        kind = tl.where(k < memories, MEMORY, kind)
        x = tl.where(k < memories, of_memory + k, x)
    return kind, x


@triton.jit
def listed_keys(start, window, sizes, ROWS: tl.constexpr, HAS_MEMORY: tl.constexpr):
    """Returns (kind, number, row, whether there is such a place) of the places of a list from ``start`` on."""
    k = start + tl.arange(0, ROWS)
    kind, x = keys_at(k, window, HAS_MEMORY)
    return kind[None, :], x[None, :], row_of(kind, x, sizes, HAS_MEMORY), k < window[2]


@triton.jit
def anchors(X, stride, window, sizes, HAS_MEMORY: tl.constexpr):
    """Returns a pointer per kind of keys: to where place 0 of a list would be if all places were of that kind."""
    _memories, _contexts, _count, of_memory, of_context, of_frame = window
    context = X + row_of(RIGHT, of_context, sizes, HAS_MEMORY).to(tl.int64) * stride
    pointers = context, X + row_of(FRAME, of_frame, sizes, HAS_MEMORY).to(tl.int64) * stride
    if HAS_MEMORY:
        pointers += (X + row_of(MEMORY, of_memory, sizes, HAS_MEMORY).to(tl.int64) * stride,)
    return pointers


@triton.jit
def advanced(pointers, step, HAS_MEMORY: tl.constexpr):
    """Returns the pointers, ``step`` elements further."""
    moved = pointers[0] + step, pointers[1] + step
    if HAS_MEMORY:
        moved += (pointers[2] + step,)
    return moved


@triton.jit
def load_listed(pointers, start, stride, c, window, width, ROWS: tl.constexpr, HAS_MEMORY: tl.constexpr):
    """Loads the rows of a list from place ``start`` on, where ``pointers`` are, with zeros outside. Offsets behind a
    pointer have 32 bits.
    """
    memories, contexts, count, _of_memory, _of_context, _of_frame = window
    lanes = tl.arange(0, ROWS)
    first = tl.where(start + lanes < contexts, pointers[0], pointers[1])
    if HAS_MEMORY:
        first = tl.where(start + lanes < memories, pointers[2], first)
    keep = (start + lanes < count)[:, None] & (c < width)[None, :]
    return tl.load(first[:, None] + ((lanes * stride)[:, None] + c[None, :]), mask=keep, other=0.0)


@triton.jit
def spans_of(s, summary, keep, bounds, window, sizes, HAS_MEMORY: tl.constexpr):
    """Returns where a list's places begin, by kind, that queries of segments s see, and end for frames and memory, and
    whether the queries see any.
    """
    _frames, _segments, segment, left, right, memory, _past_frames, _past_memory = sizes
    begin, stop, begin_memory = bounds
    _memories, _contexts, _count, of_memory, of_context, of_frame = window
    context = tl.where(keep, s * right - of_context, NOWHERE)
    frame = tl.where(keep, tl.maximum(s * segment - left, begin) - of_frame, NOWHERE)
    end = tl.minimum((s + 1) * segment, stop) - of_frame
    spans = context, frame, end
    any_seen = (keep & (right > 0)) | (frame < end)
    if HAS_MEMORY:
        remembered = tl.where(keep & ~summary, tl.maximum(s - memory, begin_memory) - of_memory, NOWHERE)
        spans += (remembered, s - of_memory)
        any_seen = any_seen | (remembered < s - of_memory)
    return spans, any_seen


@triton.jit
def _inside(start, begin, end):
    """Returns the bits, of 32 places from ``start`` on, of those in [begin, end)."""
    return bits_from(tl.maximum(begin - start, 0)) & ~bits_from(tl.maximum(end - start, 0))


@triton.jit
def seen_from(start, spans, right, COUNT: tl.constexpr, HAS_MEMORY: tl.constexpr):
    """Says which queries see which of the keys at COUNT <= 32 places from ``start`` on. A query has a bit per key: a
    pair costs one instruction, where comparisons with the ends of the spans would cost four or six.
    """
    bits = _inside(start, spans[0], spans[0] + right) | _inside(start, spans[1], spans[2])
    if HAS_MEMORY:
        bits |= _inside(start, spans[3], spans[4])
    return (bits[:, None] & (1 << tl.arange(0, COUNT))[None, :]) != 0


# --------------------------------------------------------------------------- tiles
# rows: (row, segment, whether there is such a row, spans) of queries; keys: (kind, number, row, whether there is such a
# key), of which the first two are a row of a tile
@triton.jit
def dropout_of(DROPOUT, pair, rows, keys, scores, mask_sizes, sizes):
    """Returns M, whose rows hold the windows of queries, 0 for hidden keys; it is 1 without dropout."""
    factors = 1.0
    if DROPOUT is not None:
        _frames, _segments, segment, _left, right, _memory, _past_frames, _past_memory = sizes
        queries, lanes, memory_lane, frame_lane = mask_sizes
        kind, x = keys[0], keys[1]
        lane = x + tl.where(kind == FRAME, frame_lane, memory_lane)
        lane -= rows[1][:, None] * tl.where(kind == MEMORY, 1, tl.where(kind == RIGHT, right, segment))
        row = DROPOUT + (pair * queries + rows[0]) * lanes
        # what is seen would be found out once more, in the layout of this load
        inside = rows[2][:, None] & (lane.to(tl.uint32) < lanes.to(tl.uint32))
        factors = tl.load(row[:, None] + lane, mask=inside, other=0.0)
        factors = tl.where(scores == NONE, 0.0, factors)
    return factors


@triton.jit
def products_of(query, key, Q, rows, q_time, K, keys, k_time, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns [queries, keys]; ``query`` and ``key`` hold the rows if they fit a block."""
    total = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    if DIM <= BLOCK_D:
        total = tl.dot(query, tl.trans(key), total)
    else:
        total = products(total, Q, rows[0], q_time, rows[2], K, keys[2], k_time, keys[3], DIM, BLOCK_D)
    return total


# --------------------------------------------------------------------------- forward
@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, LENGTHS, HISTORY, DROPOUT, Y,
    frames, segments, segment, left, right, memory, past_frames, past_memory, queries, lanes, memory_lane, frame_lane,
    heads, per, group, parts, blocks, share, q_time, q_batch, k_time, k_batch, v_time, v_batch, y_time, scale,
    DIM: tl.constexpr, HAS_MEMORY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes y of a block of queries and of columns."""
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    sizes = (frames, segments, segment, left, right, memory, past_frames, past_memory)
    mask_sizes = (queries, lanes, memory_lane, frame_lane)
    sequence, head, first, own, at, keep_i = place(
        tl.program_id(0), blocks, heads, group, parts, per, share, BLOCK_M
    )
    pair = sequence * heads + head
    i, summary, keep_i = queries_at(first + own, at, keep_i, sizes)
    bounds = visible(LENGTHS, HISTORY, sequence, sizes)
    window = listed(bounds, first, group, sizes, HAS_MEMORY)
    spans, any_seen = spans_of(first + own, summary, keep_i, bounds, window, sizes, HAS_MEMORY)
    rows = (i, first + own, keep_i, spans)
    Q += sequence * q_batch + head * DIM
    K += sequence * k_batch + head * DIM
    V += sequence * v_batch + head * DIM
    query = tl.zeros([BLOCK_M, BLOCK_D], Q.dtype.element_ty)
    if DIM <= BLOCK_D:
        query = load_rows(Q, i, q_time, tl.arange(0, BLOCK_D), keep_i, DIM)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], SUM)
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_rows = anchors(K, k_time, window, sizes, HAS_MEMORY)
    value_rows = anchors(V, v_time, window, sizes, HAS_MEMORY)
    for start in range(0, window[2], BLOCK_N):
        key = load_listed(key_rows, start, k_time, c, window, DIM, BLOCK_N, HAS_MEMORY)  # [BLOCK_N, BLOCK_D]
        keys = listed_keys(start, window, sizes, BLOCK_N, HAS_MEMORY)
        seen = seen_from(start, spans, right, BLOCK_N, HAS_MEMORY)
        scores = products_of(query, key, Q, rows, q_time, K, keys, k_time, DIM, BLOCK_D)
        scores = tl.where(seen, scores, NONE)
        if PRECISE:
            maximum, factor, e = running(maximum, scores * scale, True)
        else:
            maximum, factor, e = running_in_bits(maximum, scores, scale * LOG2_E)
        total = total * factor + sums(e, 1, PRECISE)
        e *= dropout_of(DROPOUT, pair, rows, keys, scores, mask_sizes, sizes)
        value = load_listed(
            value_rows, start, v_time, c, window, DIM, BLOCK_N, HAS_MEMORY
        )  # [BLOCK_N, BLOCK_D]
        y = tl.dot(e.to(value.dtype), value, y * factor[:, None])
        key_rows = advanced(key_rows, BLOCK_N * k_time, HAS_MEMORY)
        value_rows = advanced(value_rows, BLOCK_N * v_time, HAS_MEMORY)
    y = y * tl.where(any_seen, tl.div_rn(1.0, total.to(tl.float32)), 0.0)[:, None]
    out = Y + pair * DIM + i.to(tl.int64)[:, None] * y_time + c[None, :]
    tl.store(out, y.to(Y.dtype.element_ty), mask=keep_i[:, None] & (c < DIM)[None, :])


# --------------------------------------------------------------------------- backward
@triton.jit
def weights_of(scores, maximum, inverse, scale, PRECISE: tl.constexpr):
    """Returns P from what ``queries_kernel`` stored: in 16 bits the log-sum-exp, in powers of 2, takes the place of
    both numbers.
    """
    if PRECISE:
        weights = exp_nonpositive(scores * scale - maximum[:, None], True) * inverse[:, None]
    else:
        weights = exp2(tl.fma(scores, scale * LOG2_E, -maximum[:, None]))
    return weights


@triton.jit
def _scores_and_slopes(
    query, g, key_rows, value_rows, Q, G, K, V, DROPOUT, pair, rows, window, start, c, q_time, g_time, k_time, v_time,
    mask_sizes, sizes, DIM: tl.constexpr, HAS_MEMORY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns (rows of k, scores, -inf where nothing is seen; dP; M) of the keys at a list's places from ``start``."""
    key = load_listed(key_rows, start, k_time, c, window, DIM, BLOCK_N, HAS_MEMORY)  # [BLOCK_N, BLOCK_D]
    value = load_listed(value_rows, start, v_time, c, window, DIM, BLOCK_N, HAS_MEMORY)
    keys = listed_keys(start, window, sizes, BLOCK_N, HAS_MEMORY)
    seen = seen_from(start, rows[3], sizes[4], BLOCK_N, HAS_MEMORY)
    scores = products_of(query, key, Q, rows, q_time, K, keys, k_time, DIM, BLOCK_D)
    scores = tl.where(seen, scores, NONE)
    slopes = products_of(g, value, G, rows, g_time, V, keys, v_time, DIM, BLOCK_D)
    return key, scores, slopes, dropout_of(DROPOUT, pair, rows, keys, scores, mask_sizes, sizes)


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(
    G, Q, K, V, LENGTHS, HISTORY, DROPOUT, DQ, MAXIMUM, INVERSE, DELTA,
    frames, segments, segment, left, right, memory, past_frames, past_memory, queries, lanes, memory_lane, frame_lane,
    heads, per, group, parts, blocks, share,
    g_time, g_batch, q_time, q_batch, k_time, k_batch, v_time, v_batch, y_time, scale,
    DIM: tl.constexpr, HAS_MEMORY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dq of a block of queries and of columns; the programs of the first columns store maximum, 1
    / sum and D, see ``weights_of``.
    """
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    sizes = (frames, segments, segment, left, right, memory, past_frames, past_memory)
    mask_sizes = (queries, lanes, memory_lane, frame_lane)
    sequence, head, first, own, at, in_block = place(
        tl.program_id(0), blocks, heads, group, parts, per, share, BLOCK_M
    )
    pair = sequence * heads + head
    i, summary, keep_i = queries_at(first + own, at, in_block, sizes)
    bounds = visible(LENGTHS, HISTORY, sequence, sizes)
    window = listed(bounds, first, group, sizes, HAS_MEMORY)
    spans, any_seen = spans_of(first + own, summary, keep_i, bounds, window, sizes, HAS_MEMORY)
    rows = (i, first + own, keep_i, spans)
    G += sequence * g_batch + head * DIM
    Q += sequence * q_batch + head * DIM
    K += sequence * k_batch + head * DIM
    V += sequence * v_batch + head * DIM
    query = tl.zeros([BLOCK_M, BLOCK_D], Q.dtype.element_ty)
    g = tl.zeros([BLOCK_M, BLOCK_D], Q.dtype.element_ty)
    if DIM <= BLOCK_D:
        query = load_rows(Q, i, q_time, tl.arange(0, BLOCK_D), keep_i, DIM)
        g = load_rows(G, i, g_time, tl.arange(0, BLOCK_D), keep_i, DIM)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], SUM)
    along = tl.zeros([BLOCK_M], SUM)
    key_rows = anchors(K, k_time, window, sizes, HAS_MEMORY)
    value_rows = anchors(V, v_time, window, sizes, HAS_MEMORY)
    for start in range(0, window[2], BLOCK_N):
        _key, scores, slopes, factors = _scores_and_slopes(
            query, g, key_rows, value_rows, Q, G, K, V, DROPOUT, pair, rows, window, start, c, q_time, g_time, k_time,
            v_time, mask_sizes, sizes, DIM, HAS_MEMORY, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if PRECISE:
            maximum, factor, e = running(maximum, scores * scale, True)
        else:
            maximum, factor, e = running_in_bits(maximum, scores, scale * LOG2_E)
        total = total * factor + sums(e, 1, PRECISE)
        along = along * factor + sums(e * slopes * factors, 1, PRECISE)
        key_rows = advanced(key_rows, BLOCK_N * k_time, HAS_MEMORY)
        value_rows = advanced(value_rows, BLOCK_N * v_time, HAS_MEMORY)
    inverse = tl.where(any_seen, tl.div_rn(1.0, total.to(tl.float32)), 0.0)
    delta = tl.where(any_seen, (along / total).to(tl.float32), 0.0)
    once = in_block & (first + own < segments) & (tl.program_id(1) == 0)
    lane = pair * segments * per + (first + own) * per + at
    if PRECISE:
        maximum = tl.where(any_seen, maximum, 0.0)
        tl.store(INVERSE + lane, inverse, mask=once)
    else:
        maximum = tl.where(any_seen, maximum + tl.log2(total), float("inf"))
    tl.store(MAXIMUM + lane, maximum, mask=once)
    tl.store(DELTA + lane, delta, mask=once)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_rows = anchors(K, k_time, window, sizes, HAS_MEMORY)
    value_rows = anchors(V, v_time, window, sizes, HAS_MEMORY)
    for start in range(0, window[2], BLOCK_N):
        key, scores, slopes, factors = _scores_and_slopes(
            query, g, key_rows, value_rows, Q, G, K, V, DROPOUT, pair, rows, window, start, c, q_time, g_time, k_time,
            v_time, mask_sizes, sizes, DIM, HAS_MEMORY, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        weights = weights_of(scores, maximum, inverse, scale, PRECISE)
        ds = weights * (slopes * factors - delta[:, None])
        dq = tl.dot(ds.to(key.dtype), key, dq)
        key_rows = advanced(key_rows, BLOCK_N * k_time, HAS_MEMORY)
        value_rows = advanced(value_rows, BLOCK_N * v_time, HAS_MEMORY)
    out = DQ + pair * DIM + i.to(tl.int64)[:, None] * y_time + c[None, :]
    tl.store(out, (dq * scale).to(DQ.dtype.element_ty), mask=keep_i[:, None] & (c < DIM)[None, :])


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(
    G, Q, K, V, LENGTHS, HISTORY, DROPOUT, MAXIMUM, INVERSE, DELTA, DK, DV,
    frames, segments, segment, left, right, memory, past_frames, past_memory, queries, lanes, memory_lane, frame_lane,
    heads, per, group, parts, blocks, share, past, reach,
    g_time, g_batch, q_time, q_batch, k_time, k_batch, v_time, v_batch, y_time, scale,
    DIM: tl.constexpr, HAS_MEMORY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of a block of keys and of columns. ``past`` counts the segments before 0; ``reach`` says how
    many segments behind its own may see a key.
    """
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    sizes = (frames, segments, segment, left, right, memory, past_frames, past_memory)
    mask_sizes = (queries, lanes, memory_lane, frame_lane)
    sequence, head, first, own, at, keep_j = place(
        tl.program_id(0), blocks, heads, group, parts, per, share, BLOCK_N
    )
    pair = sequence * heads + head
    first -= past
    own += first
    begin, stop, begin_memory = visible(LENGTHS, HISTORY, sequence, sizes)
    kind = tl.where(at < right, RIGHT, FRAME)
    x = tl.where(at < right, own * right, own * segment - right) + at
    behind = tl.where(at < right, 0, (at - right + left) // segment)  # its last segment, from its own on
    exists = tl.where(at < right, (own >= 0) & (own < segments), (x >= -past_frames) & (x < frames))
    shown = (at < right) | ((x >= begin) & (x < stop))
    begun = own
    if HAS_MEMORY:
        is_memory = at >= right + segment
        kind = tl.where(is_memory, MEMORY, kind)
        x = tl.where(is_memory, own, x)
        # the frame of that lane is the next segment's first, so these rows are tested again
        exists = tl.where(is_memory, (own >= -past_memory) & (own < segments - 1), exists)
        shown = tl.where(is_memory, own >= begin_memory, shown)
        behind = tl.where(is_memory, memory, behind)
        begun = tl.where(is_memory, own + 1, begun)
    keep_j = keep_j & exists
    shown = shown & keep_j
    j = row_of(kind, x, sizes, HAS_MEMORY)
    keys = (kind[None, :], x[None, :], j, shown)
    zero = tl.maximum(first, 0)
    met = (begun - zero) * per  # the first lane of those that see it, from segment ``zero`` on
    lanes_met = tl.where(shown, (tl.minimum(own + behind + 1, segments) - begun) * per, 0).to(tl.uint32)
    G += sequence * g_batch + head * DIM
    Q += sequence * q_batch + head * DIM
    K += sequence * k_batch + head * DIM
    V += sequence * v_batch + head * DIM
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    key = load_rows(K, j, k_time, c, shown, DIM)  # [BLOCK_N, BLOCK_D]
    value = load_rows(V, j, v_time, c, shown, DIM)
    dk = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    dv = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    end = (tl.minimum(first + group + reach, segments) - zero) * per
    MAXIMUM += (pair * segments + zero) * per
    DELTA += (pair * segments + zero) * per
    if PRECISE:
        INVERSE += (pair * segments + zero) * per
    segment_share = 0xFFFFFFFF // per.to(tl.uint32)
    for start in range(0, end, BLOCK_M):
        lane = start + tl.arange(0, BLOCK_M)
        s = tl.umulhi(lane.to(tl.uint32), segment_share).to(tl.int32)  # lane / per, or one less
        s = tl.where(lane - s * per >= per, s + 1, s)
        i, summary, keep_i = queries_at(zero + s, lane - s * per, lane < end, sizes)
        rows = (i, zero + s, keep_i, 0)
        maximum = tl.load(MAXIMUM + lane, mask=lane < end, other=float("inf"))
        inverse = maximum
        if PRECISE:
            inverse = tl.load(INVERSE + lane, mask=lane < end, other=0.0)
        delta = tl.load(DELTA + lane, mask=lane < end, other=0.0)
        query = load_rows(Q, i, q_time, c, keep_i, DIM)  # [BLOCK_M, BLOCK_D]
        g = load_rows(G, i, g_time, c, keep_i, DIM)
        seen = (lane[:, None] - met[None, :]).to(tl.uint32) < lanes_met[None, :]
        if HAS_MEMORY:
            seen = seen & ~(summary[:, None] & (kind == MEMORY)[None, :])
        scores = products_of(query, key, Q, rows, q_time, K, keys, k_time, DIM, BLOCK_D)
        scores = tl.where(seen, scores, NONE)
        slopes = products_of(g, value, G, rows, g_time, V, keys, v_time, DIM, BLOCK_D)
        factors = dropout_of(DROPOUT, pair, rows, keys, scores, mask_sizes, sizes)
        weights = weights_of(scores, maximum, inverse, scale, PRECISE)
        ds = weights * (slopes * factors - delta[:, None])
        weights = weights * factors
        # one chain of float32 would have an error 40 % above eager's, which adds sums of segments
        if PRECISE:
            dv += tl.dot(tl.trans(weights), g).to(tl.float64)
            dk += tl.dot(tl.trans(ds), query).to(tl.float64)
        else:
            dv = tl.dot(tl.trans(weights.to(g.dtype)), g, dv)
            dk = tl.dot(tl.trans(ds.to(query.dtype)), query, dk)
    out = pair * DIM + j.to(tl.int64)[:, None] * y_time + c[None, :]
    whole = keep_j[:, None] & (c < DIM)[None, :]
    tl.store(DK + out, (dk * scale).to(DK.dtype.element_ty), mask=whole)
    tl.store(DV + out, dv.to(DV.dtype.element_ty), mask=whole)


# --------------------------------------------------------------------------- launchers
def tiles(dim: int, dtype: torch.dtype, generation: int, lanes: int, dropout: bool) -> dict[str, dict]:
    """Returns tile shapes, warps and stages by kernel; ``lanes`` counts those of all segments.

    The tiles are the largest that do not spill (tests/kernels/budgets.toml). Products of float32 run without tensor
    cores unless TF32 is allowed, and need small tiles. A step of a stream is one block of 32 rows per head.
    """
    wide = dtype == torch.float32
    block_d = min(64 if wide else 128, max(16, next_power_of_2(dim)))
    warps = 8 if wide or block_d > 64 else 4
    common = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}
    common |= dot_options(dtype)
    # 64 rows of a product are 16 for each of four warps; they would compute 32 rows twice
    high = common | {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4}
    if wide:
        half = common | {"BLOCK_M": 16}
        keys = half | {"num_stages": 1}
        # with two warps, which would compute nothing twice, the keys kernel spills 104 bytes
        if rounded(dtype):
            crowded = {"num_stages": 1} if dropout and generation == 120 else {}  # loads ahead would spill
            return {"forward": high, "queries": high | crowded, "keys": keys}
        return {"forward": common, "queries": half if dropout else common, "keys": keys}
    keys = common | {"num_stages": 1}
    if lanes <= 32:
        return {"forward": common, "queries": common, "keys": keys}
    rows = common | {"BLOCK_M": 64}
    if dropout and block_d <= 64:
        # three programs on a multiprocessor: left alone, the assembler takes more registers, or spills for four
        queries = high | ({"maxnreg": 168} if generation == 90 else {})
        keys |= {"maxnreg": 144} if generation in (100, 120) else {}
        return {"forward": high if generation == 120 else rows, "queries": queries, "keys": keys}
    if dim > block_d:
        return {
            "forward": rows | ({"num_stages": 1} if generation in (80, 120) else {}),
            "queries": common,
            "keys": keys,
        }
    return {"forward": rows, "queries": common if dropout else rows, "keys": keys}


class _Plan:
    """The operands and sizes that the launches of one call share."""

    def __init__(self, query, key, value, lengths, history, dropout, heads: int, *sizes: int):
        frames, segment, left, right, memory, past_frames, past_memory = sizes
        self.heads, self.dim, self.batch = heads, query.shape[2] // heads, query.shape[1]
        self.segments = segments = cdiv(frames, segment)
        self.queries, self.has_memory = query.shape[0], memory > 0
        self.mask_sizes = self.queries, memory + right + left + segment, memory, memory + right + left
        # The same windows in numbers that fit 32 bits.
        self.segment = segment = min(segment, frames) if segments == 1 else segment
        self.left, self.memory = min(left, past_frames + frames), min(memory, past_memory + segments)
        self.per = right + segment + self.has_memory
        self.sizes = frames, segments, segment, self.left, right, self.memory, past_frames, past_memory
        self.past = max(past_memory, cdiv(past_frames, segment))
        self.reach = max(self.memory, cdiv(self.left, segment))
        self.tiles = tiles(self.dim, query.dtype, generation(query), segments * self.per, dropout is not None)
        self.tensors = query, key, value, lengths, history, dropout
        self.constants = {"DIM": self.dim, "HAS_MEMORY": self.has_memory}
        self.y_time, self.scale = self.batch * query.shape[2], self.dim**-0.5

    def launch(self, kernel, name: str, before: tuple, after: tuple, strided: tuple, *more: int) -> None:
        """Launches ``kernel`` over blocks of queries, or of keys where ``more`` are the segments of the past and the
        reach.
        """
        tile = self.tiles[name]
        rows, segments = (
            (tile["BLOCK_N"], self.segments + more[0]) if more else (tile["BLOCK_M"], self.segments)
        )
        group = max(1, rows // self.per)
        parts = cdiv(group * self.per, rows)
        blocks = cdiv(segments, group) * parts
        share = (1 << 16) // self.per + 1 if group > 1 else 0
        strides = [stride for t in strided for stride in (t.stride(0), t.stride(1))]
        grid = blocks * self.batch * self.heads, cdiv(self.dim, tile["BLOCK_D"])
        launch(kernel, grid,
            *before, *self.tensors, *after, *self.sizes, *self.mask_sizes, self.heads, self.per, group, parts, blocks,
            share, *more, *strides, self.y_time, self.scale, **self.constants, **tile,
        )  # fmt: skip


def segment_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    history: torch.Tensor | None,
    dropout: torch.Tensor | None,
    heads: int,
    *sizes: int,
) -> torch.Tensor:
    """Returns y. The channels of the first three are dense; lengths and history are contiguous int64, dropout is
    contiguous float32. The sizes are the op's: frames, segment, left, right, memory, past frames, past memory.
    """
    y = contiguous_like(query)
    if y.numel():
        plan = _Plan(query, key, value, lengths, history, dropout, heads, *sizes)
        plan.launch(forward_kernel, "forward", (), (y,), (query, key, value))
    return y


def segment_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    history: torch.Tensor | None,
    dropout: torch.Tensor | None,
    heads: int,
    *sizes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dquery, dkey, dvalue); ``grad`` has dense channels."""
    if not query.numel():
        return tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    dquery, dkey, dvalue = map(contiguous_like, (query, key, value))
    plan = _Plan(query, key, value, lengths, history, dropout, heads, *sizes)
    strided = grad, query, key, value
    lanes = query.shape[1] * heads, plan.segments * plan.per
    maximum, delta = (torch.empty(lanes, dtype=torch.float32, device=query.device) for _ in range(2))
    inverse = torch.empty_like(maximum) if query.dtype == torch.float32 else None
    statistics = maximum, inverse, delta
    plan.launch(queries_kernel, "queries", (grad,), (dquery, *statistics), strided)
    plan.launch(keys_kernel, "keys", (grad,), (*statistics, dkey, dvalue), strided, plan.past, plan.reach)
    return dquery, dkey, dvalue
