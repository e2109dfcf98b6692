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

The segments that see a key are an interval, given by two integers per key that are compared with the segments' first
frames: that is the mask. Lengths and history move the ends of a list, so hidden keys are not read. ``queries`` leaves
maximum, 1 / sum and D of each row for ``keys``, which owns its rows of dk and dv: memory is O(T), without atomics. What
a program does depends on the shapes alone: results repeat bit for bit. The host reads nothing back.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import exp_nonpositive
from fastasr.kernels._attention_tiles import NONE, load_rows, products, running, sums
from fastasr.kernels._launch import (
    cdiv,
    contiguous_like,
    dot_options,
    generation,
    launch,
    next_power_of_2,
    rounded,
)

MEMORY, RIGHT, FRAME = (tl.constexpr(number) for number in range(3))  # kinds of keys
NOWHERE = tl.constexpr(1 << 30)  # the first frame of a segment that sees nothing
SIZES = [
    "frames", "segments", "segment", "left", "right", "memory", "past_frames", "past_memory", "queries", "lanes",
    "memory_lane", "frame_lane", "heads", "per", "group", "parts", "blocks", "past", "reach",
]  # fmt: skip


# --------------------------------------------------------------------------- lanes
# sizes: frames, segments, segment, left, right, memory, past_frames, past_memory
@triton.jit
def place(program, blocks, heads, group, parts, per, ROWS: tl.constexpr):
    """Returns (sequence, head, first segment of the block, its lanes counted from that segment's first,
    their mask).
    """
    pair, block = program // blocks, program % blocks
    lane = block % parts * ROWS + tl.arange(0, ROWS)
    return (
        (pair // heads).to(tl.int64),
        (pair % heads).to(tl.int64),
        block // parts * group,
        lane,
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
def queries_at(first, lane, keep, per, sizes):
    """Returns (row, segment, its first frame, whether a summary, whether there is such a row) of lanes behind
    ``first``.
    """
    frames, segments, segment, _left, right, _memory, _past_frames, _past_memory = sizes
    s, at = first + lane // per, lane % per
    t = s * segment + at - right
    summary = at >= right + segment
    row = segments * right + tl.where(summary, frames + s, t)
    row = tl.where(at < right, s * right + at, row)
    keep = keep & (s < segments) & (summary | (at < right) | (t < frames))
    return row, s, tl.where(keep, s * segment, NOWHERE), summary, keep


@triton.jit
def described(kind, x, sizes, HAS_MEMORY: tl.constexpr):
    """Returns (row, begin of the last segment that sees it, a frame before the first one's) of keys, by their kind and
    number within it.
    """
    _frames, segments, segment, left, right, memory, past_frames, past_memory = sizes
    remembered = 0
    if HAS_MEMORY:
        remembered = past_memory + segments - 1
    row = remembered + x + tl.where(kind == RIGHT, 0, segments * right + past_frames)
    block = x // tl.maximum(right, 1) * segment
    last = tl.where(kind == RIGHT, block, x + left)
    before = tl.where(kind == RIGHT, block - 1, x - segment)
    if HAS_MEMORY:
        row = tl.where(kind == MEMORY, past_memory + x, row)
        last = tl.where(kind == MEMORY, (x + memory) * segment, last)
        before = tl.where(kind == MEMORY, x * segment, before)
    return row, last, before


@triton.jit
def listed(bounds, first, group, sizes, HAS_MEMORY: tl.constexpr):
    """Lists the keys that a block's segments see: (first row of memory, rows of memory, end of the right context, first
    frame, end of the list, first row of right context).
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
    return (
        m,
        memories,
        contexts,
        t,
        contexts + tl.maximum(tl.minimum(end * segment, stop) - t, 0),
        first * right,
    )


@triton.jit
def keys_at(k, window, sizes, HAS_MEMORY: tl.constexpr):
    """Returns (kind, number, row, last, before, whether there is such a lane) of lanes of a list."""
    m, memories, contexts, t, count, context = window
    kind = tl.where(k < contexts, RIGHT, FRAME)
    x = k + tl.where(k < contexts, context - memories, t - contexts)
    if HAS_MEMORY:
        kind = tl.where(k < memories, MEMORY, kind)
        x = tl.where(k < memories, m + k, x)
    row, last, before = described(kind, x, sizes, HAS_MEMORY)
    return kind, x, row, last, before, k < count


@triton.jit
def sees(u, last, before, summary, kind, HAS_MEMORY: tl.constexpr):
    """Says which queries, of segments that begin at u, see which keys; one of the two is a row, the other
    a column.
    """
    seen = (u <= last) & (u > before)
    if HAS_MEMORY:
        seen = seen & ~(summary & (kind == MEMORY))
    return seen


@triton.jit
def sees_any(s, u, summary, keep, bounds, sizes, HAS_MEMORY: tl.constexpr):
    """Says which queries see a key."""
    _frames, _segments, segment, left, right, memory, _past_frames, _past_memory = sizes
    begin, stop, begin_memory = bounds
    seen = (right > 0) | (tl.minimum(u + segment, stop) > tl.maximum(u - left, begin))
    if HAS_MEMORY:
        seen = seen | ((s > tl.maximum(s - memory, begin_memory)) & ~summary)
    return seen & keep


@triton.jit
def dropout_of(DROPOUT, pair, i, s, kind, x, seen, mask_sizes, sizes):
    """Returns M, whose rows hold the windows of queries; it is 1 without dropout."""
    factors = 1.0
    if DROPOUT is not None:
        _frames, _segments, segment, _left, right, _memory, _past_frames, _past_memory = sizes
        queries, lanes, memory_lane, frame_lane = mask_sizes
        lane = x + tl.where(kind == FRAME, frame_lane, memory_lane)
        lane -= s * tl.where(kind == MEMORY, 1, tl.where(kind == RIGHT, right, segment))
        factors = tl.load(DROPOUT + (pair * queries + i) * lanes + lane, mask=seen, other=0.0)
    return factors


@triton.jit
def products_of(
    query, key, Q, i, q_time, keep_i, K, j, k_time, keep_j, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Returns [queries, keys]; ``query`` and ``key`` hold the rows if they fit a block."""
    total = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    if DIM <= BLOCK_D:
        total = tl.dot(query, tl.trans(key), total)
    else:
        total = products(total, Q, i, q_time, keep_i, K, j, k_time, keep_j, DIM, BLOCK_D)
    return total


# --------------------------------------------------------------------------- forward
@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, LENGTHS, HISTORY, DROPOUT, Y,
    frames, segments, segment, left, right, memory, past_frames, past_memory, queries, lanes, memory_lane, frame_lane,
    heads, per, group, parts, blocks, q_time, q_batch, k_time, k_batch, v_time, v_batch, y_time, scale,
    DIM: tl.constexpr, HAS_MEMORY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes y of a block of queries and of columns."""
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    sizes = (frames, segments, segment, left, right, memory, past_frames, past_memory)
    mask_sizes = (queries, lanes, memory_lane, frame_lane)
    sequence, head, first, lane, keep_i = place(tl.program_id(0), blocks, heads, group, parts, per, BLOCK_M)
    pair = sequence * heads + head
    i, s, u, summary, keep_i = queries_at(first, lane, keep_i, per, sizes)
    bounds = visible(LENGTHS, HISTORY, sequence, sizes)
    window = listed(bounds, first, group, sizes, HAS_MEMORY)
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
    for start in range(0, window[4], BLOCK_N):
        kind, x, j, last, before, keep_j = keys_at(start + tl.arange(0, BLOCK_N), window, sizes, HAS_MEMORY)
        seen = sees(u[:, None], last[None, :], before[None, :], summary[:, None], kind[None, :], HAS_MEMORY)
        seen = seen & keep_j[None, :]
        key = load_rows(K, j, k_time, c, keep_j, DIM)  # [BLOCK_N, BLOCK_D]
        scores = products_of(query, key, Q, i, q_time, keep_i, K, j, k_time, keep_j, DIM, BLOCK_D)
        maximum, factor, e = running(maximum, tl.where(seen, scores * scale, NONE), PRECISE)
        total = total * factor + sums(e, 1, PRECISE)
        e *= dropout_of(
            DROPOUT, pair, i[:, None], s[:, None], kind[None, :], x[None, :], seen, mask_sizes, sizes
        )
        value = load_rows(V, j, v_time, c, keep_j, DIM)  # [BLOCK_N, BLOCK_D]
        y = tl.dot(e.to(value.dtype), value, y * factor[:, None])
    any_seen = sees_any(s, u, summary, keep_i, bounds, sizes, HAS_MEMORY)
    y = y * tl.where(any_seen, tl.div_rn(1.0, total.to(tl.float32)), 0.0)[:, None]
    out = Y + pair * DIM + i.to(tl.int64)[:, None] * y_time + c[None, :]
    tl.store(out, y.to(Y.dtype.element_ty), mask=keep_i[:, None] & (c < DIM)[None, :])


# --------------------------------------------------------------------------- backward
@triton.jit
def scores_and_slopes(
    query, g, key, value, Q, G, K, V, DROPOUT, pair, rows, keys, q_time, g_time, k_time, v_time, scale,
    mask_sizes, sizes, DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MEMORY: tl.constexpr,
):  # fmt: skip
    """Returns (scores, -inf where nothing is seen; dP; M) of queries and keys, as ``queries_at`` and ``keys_at``
    describe them.
    """
    i, s, u, summary, keep_i = rows
    kind, x, j, last, before, keep_j = keys
    seen = sees(u[:, None], last[None, :], before[None, :], summary[:, None], kind[None, :], HAS_MEMORY)
    seen = seen & keep_j[None, :]
    scores = products_of(query, key, Q, i, q_time, keep_i, K, j, k_time, keep_j, DIM, BLOCK_D)
    slopes = products_of(g, value, G, i, g_time, keep_i, V, j, v_time, keep_j, DIM, BLOCK_D)
    factors = dropout_of(
        DROPOUT, pair, i[:, None], s[:, None], kind[None, :], x[None, :], seen, mask_sizes, sizes
    )
    return tl.where(seen, scores * scale, NONE), slopes * factors, factors


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(
    G, Q, K, V, LENGTHS, HISTORY, DROPOUT, DQ, MAXIMUM, INVERSE, DELTA,
    frames, segments, segment, left, right, memory, past_frames, past_memory, queries, lanes, memory_lane, frame_lane,
    heads, per, group, parts, blocks, g_time, g_batch, q_time, q_batch, k_time, k_batch, v_time, v_batch, y_time, scale,
    DIM: tl.constexpr, HAS_MEMORY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dq of a block of queries and of columns; the programs of the first columns store maximum, 1
    / sum and D.
    """
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    sizes = (frames, segments, segment, left, right, memory, past_frames, past_memory)
    mask_sizes = (queries, lanes, memory_lane, frame_lane)
    sequence, head, first, lane, keep_i = place(tl.program_id(0), blocks, heads, group, parts, per, BLOCK_M)
    pair = sequence * heads + head
    rows = queries_at(first, lane, keep_i, per, sizes)
    i, s, u, summary, keep_i = rows
    bounds = visible(LENGTHS, HISTORY, sequence, sizes)
    window = listed(bounds, first, group, sizes, HAS_MEMORY)
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
    for start in range(0, window[4], BLOCK_N):
        keys = keys_at(start + tl.arange(0, BLOCK_N), window, sizes, HAS_MEMORY)
        key = load_rows(K, keys[2], k_time, c, keys[5], DIM)  # [BLOCK_N, BLOCK_D]
        value = load_rows(V, keys[2], v_time, c, keys[5], DIM)
        scores, slopes, _ = scores_and_slopes(
            query, g, key, value, Q, G, K, V, DROPOUT, pair, rows, keys, q_time, g_time, k_time, v_time, scale,
            mask_sizes, sizes, DIM, BLOCK_D, HAS_MEMORY,
        )  # fmt: skip
        maximum, factor, e = running(maximum, scores, PRECISE)
        total = total * factor + sums(e, 1, PRECISE)
        along = along * factor + sums(e * slopes, 1, PRECISE)
    any_seen = sees_any(s, u, summary, keep_i, bounds, sizes, HAS_MEMORY)
    maximum = tl.where(any_seen, maximum, 0.0)
    inverse = tl.where(any_seen, tl.div_rn(1.0, total.to(tl.float32)), 0.0)
    delta = tl.where(any_seen, (along / total).to(tl.float32), 0.0)
    once = keep_i & (tl.program_id(1) == 0)
    tl.store(MAXIMUM + pair * queries + i, maximum, mask=once)
    tl.store(INVERSE + pair * queries + i, inverse, mask=once)
    tl.store(DELTA + pair * queries + i, delta, mask=once)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, window[4], BLOCK_N):
        keys = keys_at(start + tl.arange(0, BLOCK_N), window, sizes, HAS_MEMORY)
        key = load_rows(K, keys[2], k_time, c, keys[5], DIM)  # [BLOCK_N, BLOCK_D]
        value = load_rows(V, keys[2], v_time, c, keys[5], DIM)
        scores, slopes, _ = scores_and_slopes(
            query, g, key, value, Q, G, K, V, DROPOUT, pair, rows, keys, q_time, g_time, k_time, v_time, scale,
            mask_sizes, sizes, DIM, BLOCK_D, HAS_MEMORY,
        )  # fmt: skip
        weights = exp_nonpositive(scores - maximum[:, None], PRECISE) * inverse[:, None]
        ds = weights * (slopes - delta[:, None])
        dq = tl.dot(ds.to(key.dtype), key, dq)
    out = DQ + pair * DIM + i.to(tl.int64)[:, None] * y_time + c[None, :]
    tl.store(out, (dq * scale).to(DQ.dtype.element_ty), mask=keep_i[:, None] & (c < DIM)[None, :])


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(
    G, Q, K, V, LENGTHS, HISTORY, DROPOUT, MAXIMUM, INVERSE, DELTA, DK, DV,
    frames, segments, segment, left, right, memory, past_frames, past_memory, queries, lanes, memory_lane, frame_lane,
    heads, per, group, parts, blocks, past, reach,
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
    sequence, head, first, lane, keep_j = place(tl.program_id(0), blocks, heads, group, parts, per, BLOCK_N)
    pair = sequence * heads + head
    first -= past
    begin, stop, begin_memory = visible(LENGTHS, HISTORY, sequence, sizes)
    own, at = first + lane // per, lane % per
    kind = tl.where(at < right, RIGHT, FRAME)
    x = tl.where(at < right, own * right + at, own * segment + at - right)
    keep_j = keep_j & tl.where(at < right, (own >= 0) & (own < segments), (x >= -past_frames) & (x < frames))
    shown = (at < right) | ((x >= begin) & (x < stop))
    if HAS_MEMORY:
        is_memory = at >= right + segment
        kind = tl.where(is_memory, MEMORY, kind)
        x = tl.where(is_memory, own, x)
        # the frame of that lane is the next segment's first, so these rows are tested again
        keep_j = tl.where(
            is_memory, (lane < group * per) & (own >= -past_memory) & (own < segments - 1), keep_j
        )
        shown = tl.where(is_memory, own >= begin_memory, shown)
    shown = shown & keep_j
    j, last, before = described(kind, x, sizes, HAS_MEMORY)
    keys = (kind, x, j, last, before, shown)
    G += sequence * g_batch + head * DIM
    Q += sequence * q_batch + head * DIM
    K += sequence * k_batch + head * DIM
    V += sequence * v_batch + head * DIM
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    key = load_rows(K, j, k_time, c, shown, DIM)  # [BLOCK_N, BLOCK_D]
    value = load_rows(V, j, v_time, c, shown, DIM)
    dk = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    dv = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    end = tl.minimum(first + group + reach, segments) * per
    for start in range(tl.maximum(first, 0) * per, end, BLOCK_M):
        asking = start + tl.arange(0, BLOCK_M)
        rows = queries_at(0, asking, asking < end, per, sizes)
        i, keep_i = rows[0], rows[4]
        maximum = tl.load(MAXIMUM + pair * queries + i, mask=keep_i, other=0.0)
        inverse = tl.load(INVERSE + pair * queries + i, mask=keep_i, other=0.0)
        delta = tl.load(DELTA + pair * queries + i, mask=keep_i, other=0.0)
        query = load_rows(Q, i, q_time, c, keep_i, DIM)  # [BLOCK_M, BLOCK_D]
        g = load_rows(G, i, g_time, c, keep_i, DIM)
        scores, slopes, factors = scores_and_slopes(
            query, g, key, value, Q, G, K, V, DROPOUT, pair, rows, keys, q_time, g_time, k_time, v_time, scale,
            mask_sizes, sizes, DIM, BLOCK_D, HAS_MEMORY,
        )  # fmt: skip
        weights = exp_nonpositive(scores - maximum[:, None], PRECISE) * inverse[:, None]
        ds = weights * (slopes - delta[:, None])
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
        if rounded(
            dtype
        ):  # with two warps, which would compute nothing twice, the keys kernel spills 104 bytes
            return {"forward": high, "queries": high, "keys": keys}
        return {"forward": common, "queries": half if dropout else common, "keys": keys}
    keys = common | {"num_stages": 1}
    if lanes <= 32:
        return {"forward": common, "queries": common, "keys": keys}
    rows = common | {"BLOCK_M": 64}
    if dropout and block_d <= 64:
        return {"forward": high if generation == 120 else rows, "queries": high, "keys": keys}
    if dim > block_d:
        return {
            "forward": rows | ({"num_stages": 1} if generation == 120 else {}),
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
        strides = [stride for t in strided for stride in (t.stride(0), t.stride(1))]
        grid = blocks * self.batch * self.heads, cdiv(self.dim, tile["BLOCK_D"])
        launch(kernel, grid,
            *before, *self.tensors, *after, *self.sizes, *self.mask_sizes, self.heads, self.per, group, parts, blocks,
            *more, *strides, self.y_time, self.scale, **self.constants, **tile,
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
    rows = query.shape[1] * heads, query.shape[0]
    statistics = tuple(torch.empty(rows, dtype=torch.float32, device=query.device) for _ in range(3))
    plan.launch(queries_kernel, "queries", (grad,), (dquery, *statistics), strided)
    plan.launch(keys_kernel, "keys", (grad,), (*statistics, dkey, dvalue), strided, plan.past, plan.reach)
    return dquery, dkey, dvalue
