# SPDX-License-Identifier: Apache-2.0
"""Attention with the relative positions of Transformer-XL; neither weights nor scores reach memory.

    s[i, j] = ((q[i] + u) . k[j] + (q[i] + w) . R[T - 1 + j - i]) / sqrt(d), W = softmax_j(s), y = W v
    Under dropout y = (W m) v, see _weights_dropout.py; below, W in dv and dW have the factor m as well
    With G = dy: dv = W^T G, dW = G v^T, delta = sum_j W dW, dS = W (dW - delta) / sqrt(d), and by offset dS'[i, r] =
    dS[i, i - (T - 1) + r]: dq = dS k + dS' R, dk = dS^T (q + u), dR = dS'^T (q + w), du = sum of dS k, dw = of dS' R

Per score, with d channels of q and e of v:

    kernel      program                           FLOPs
    forward     BLOCK queries x columns of v      2 (2 d + columns), a running maximum
    delta       BLOCK rows of y, 16 bits          2 e / keys; see below
    statistics  BLOCK queries, float32            2 (2 d + e)
    queries     BLOCK queries x channels of q     2 (2 d + e) + 2 channels
    keys        BLOCK keys x channels of k, v     2 (3 d + e + channels + columns)
    offsets     BLOCK queries x channels          2 channels; of a piece of dS, which ``queries`` left by offset
    positions   offsets x channels                2 channels; of the same, for a group of sequences
    add_parts   1024 numbers                      -; dR over the groups
    biases      channels                          -; sums of the parts of du and dw that ``queries`` left

Scores by offset are products of tensor cores with a band of R; in registers a rotation of rows makes them scores by key
(_relative_shift.py). A walk along the keys is one along the band: each tile needs one new piece of it; ``keys`` meets
other queries in each tile and multiplies two. Weights are e^(s - lse), lse the log-sum-exp that the forward pass kept.
In 16 bits delta is y . G, which costs no sweep over the keys. float32 keeps more digits than y holds: there weights are
divided by their sum, which rounding of lse moves from 1, so that rows of dS add up to zero, and ``statistics`` finds it
and delta. (In one kernel with ``queries`` what either sweep needs is alive in both, and spills.) Rows are worked on in
pieces of PIECE_BYTES of dS, as in zipformer_attention.py: memory is O(T), and dR is summed in their order. What a
program does depends on the shape and the generation of the GPU alone: results repeat bit for bit, without atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import exp_nonpositive
from fastasr.kernels._attention_tiles import NONE, load_rows, products, running, sums
from fastasr.kernels._launch import dot_options, generation, launch, rounded
from fastasr.kernels._rel_position_tiles import head_block, masked, place, query_key
from fastasr.kernels._relative_shift import by_key, by_offset, merged, moved
from fastasr.kernels._weights_dropout import constants as dropout_constants
from fastasr.kernels._weights_dropout import dropped, row_words
from fastasr.kernels.zipformer_attention import PIECE_BYTES, slopes_of
from fastasr.kernels.zipformer_attention_weights import PARTS, _bytes, _mask_batch, add_parts_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ["frames", "keys", "chunk", "left", "right", "batch", "blocks", "heads", "threshold"]
UNALIGNED = ["PADDING", "MASK", "SEED"]


# --------------------------------------------------------------------------- what a query sees
# sizes: (frames, keys, chunk, left, right); negative: all of that side. Without WINDOW nothing reads the last three.
@triton.jit
def _context(i, sizes):
    """Returns [first, end) of the keys in the context of queries i; those behind the last one have its context."""
    frames, keys, chunk, left, right = sizes
    start = (tl.minimum(i, frames - 1) + (keys - frames)) // chunk * chunk
    first = tl.where(left < 0, 0, tl.maximum(start - left, 0))
    return first, tl.where(right < 0, keys, tl.minimum(start + chunk + right, keys))


@triton.jit
def _keys_seen(first, last, sizes, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns [begin, end) of the keys in the context of any of the queries [first, last]; begin is a multiple of
    BLOCK.
    """
    begin, end = 0, sizes[1]
    if WINDOW:
        begin, _ = _context(first, sizes)
        begin = begin // BLOCK * BLOCK
        _, end = _context(last, sizes)
    return begin, end


@triton.jit
def _queries_seeing(first, last, sizes, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns [begin, end) of the queries with any of the keys [first, last] in their context; begin is a multiple of
    BLOCK.
    """
    frames, keys, chunk, left, right = sizes
    begin, end = 0, frames
    if WINDOW:
        cached = keys - frames
        begin = tl.where(right < 0, 0, tl.maximum(tl.maximum(first - right, 0) // chunk * chunk - cached, 0))
        begin = begin // BLOCK * BLOCK
        end = tl.where(left < 0, frames, tl.minimum((last + left) // chunk * chunk + chunk - cached, frames))
    return begin, end


# --------------------------------------------------------------------------- scores
# tensors: (Q, K, V, POS, U, W) of a head and a sequence; masks: (PADDING, MASK, sequence, mask_batch), either or None
@triton.jit
def _of_head(
    Q, K, V, POS, U, W, head, sequence, q_batch, k_batch, v_batch, DIM: tl.constexpr, VALUE_DIM: tl.constexpr
):  # fmt: skip
    """Returns the tensors of a head and a sequence."""
    q = sequence * q_batch + head * DIM
    k = sequence * k_batch + head * DIM
    v = sequence * v_batch + head * VALUE_DIM
    return Q + q, K + k, V + v, POS + head * DIM, U + head * DIM, W + head * DIM


@triton.jit
def _biased(Q, BIAS, i, q_time, keep, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns rows of q + bias, rounded as they are stored, if they fit a block of channels; else zeros that nothing
    reads.
    """
    rows = tl.zeros([BLOCK_M, BLOCK_D], Q.dtype.element_ty)
    if DIM <= BLOCK_D:
        rows = load_rows(Q, i, q_time, tl.arange(0, BLOCK_D), keep, DIM, BIAS)
    return rows


@triton.jit
def _queries(tensors, i, q_time, keep, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns (q + u, q + w) of rows, see ``_biased``."""
    Q, _k, _v, _pos, U, W = tensors
    return (
        _biased(Q, U, i, q_time, keep, DIM, BLOCK_M, BLOCK_D),
        _biased(Q, W, i, q_time, keep, DIM, BLOCK_M, BLOCK_D),
    )


@triton.jit
def _band(
    rows, tensors, i, q_time, keep_i, start, sizes,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns the [BLOCK_M, BLOCK_N] products of q + w and the rows of R from ``start`` on."""
    Q, _k, _v, POS, _u, W = tensors
    r = start + tl.arange(0, BLOCK_N)
    keep_r = (r >= 0) & (r < sizes[0] + sizes[1] - 1)
    return query_key(rows, Q, i, q_time, keep_i, POS, r, q_time, keep_r, DIM, BLOCK_D, BLOCK_M, BLOCK_N, W)


@triton.jit
def _scores(
    first, second, third, rows, key, tensors, masks, i, q_time, keep_i, j, sizes, scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Returns the scores of queries i and keys j, -inf where hidden. The caller passes the first pieces of the band;
    ``rows`` and ``key`` hold q + u and k if they fit a block.
    """
    Q, K, _v, _pos, U, _w = tensors
    PADDING, MASK, sequence, mask_batch = masks
    frames, keys = sizes[0], sizes[1]
    if PADDING is not None:
        PADDING += sequence * keys
    if MASK is not None:
        MASK += sequence * mask_batch
    keep_j = j < keys
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DIM <= BLOCK_D:
        scores = tl.dot(rows, tl.trans(key), scores)
    else:
        scores = products(scores, Q, i, q_time, keep_i, K, j, q_time, keep_j, DIM, BLOCK_D, U)
    scores = (scores + by_key(first, second, third, BLOCK_M, BLOCK_N)) * scale
    seen, end = i, i
    if WINDOW:
        seen, end = _context(i, sizes)
    scores = masked(
        scores, NONE, PADDING, MASK, i[:, None], j[None, :], frames, keys, seen[:, None], end[:, None], WINDOW
    )  # fmt: skip
    return tl.where(keep_j[None, :], scores, NONE)


# --------------------------------------------------------------------------- forward
@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    Q, K, V, POS, U, W, PADDING, MASK, SEED, Y, LSE,
    frames, keys, chunk, left, right, batch, blocks, heads, q_time, v_time, q_batch, k_batch, v_batch, g_batch,
    mask_batch, threshold, scale, factor, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes y of a block of queries and of columns, and the queries' lse, which is inf without a key."""
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    sizes = frames, keys, chunk, left, right
    head, sequence, block = place(tl.program_id(0), blocks, batch)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    keep_i = i < frames
    tensors = _of_head(Q, K, V, POS, U, W, head, sequence, q_batch, k_batch, v_batch, DIM, VALUE_DIM)
    masks = (PADDING, MASK, sequence, mask_batch)
    content, position = _queries(tensors, i, q_time, keep_i, DIM, BLOCK_M, BLOCK_D)
    base = frames - (block + 1) * BLOCK_M  # row of R of the last query and key 0
    begin, end = _keys_seen(block * BLOCK_M, (block + 1) * BLOCK_M - 1, sizes, BLOCK_N, WINDOW)
    first = _band(position, tensors, i, q_time, keep_i, base + begin, sizes, DIM, BLOCK_M, BLOCK_N, BLOCK_D)
    second = first
    if BLOCK_M > BLOCK_N:
        second = _band(
            position, tensors, i, q_time, keep_i, base + begin + BLOCK_N, sizes, DIM, BLOCK_M, BLOCK_N, BLOCK_D
        )  # fmt: skip
    row = (sequence * heads + head) * frames + i
    words = row_words(SEED, row)
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], SUM)
    y = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        third = _band(
            position, tensors, i, q_time, keep_i, base + start + BLOCK_M, sizes, DIM, BLOCK_M, BLOCK_N, BLOCK_D
        )  # fmt: skip
        if BLOCK_M == BLOCK_N:
            second = third
        key = load_rows(tensors[1], j, q_time, tl.arange(0, BLOCK_D), j < keys, DIM)  # [BLOCK_N, BLOCK_D]
        scores = _scores(
            first, second, third, content, key, tensors, masks, i, q_time, keep_i, j, sizes, scale,
            DIM, BLOCK_M, BLOCK_N, BLOCK_D, WINDOW,
        )  # fmt: skip
        first, second = moved(first, second, third, BLOCK_M, BLOCK_N)
        maximum, shrunk, e = running(maximum, scores, PRECISE)
        total = total * shrunk + sums(e, 1, PRECISE)
        e = dropped(e, SEED, words, j, threshold, factor)
        value = load_rows(tensors[2], j, v_time, c, j < keys, VALUE_DIM)  # [BLOCK_N, BLOCK_V]
        y = tl.dot(e.to(value.dtype), value, y * shrunk[:, None])
    total = total.to(tl.float32)
    none = total == 0.0
    y = y * tl.div_rn(1.0, tl.where(none, 1.0, total))[:, None]
    out = Y + sequence * g_batch + head * VALUE_DIM + i.to(tl.int64)[:, None] * v_time + c[None, :]
    tl.store(out, y.to(Y.dtype.element_ty), mask=keep_i[:, None] & (c < VALUE_DIM)[None, :])
    lse = tl.where(none, float("inf"), maximum + tl.log(total))
    once = keep_i & (tl.program_id(1) == 0)
    tl.store(LSE + row, lse, mask=once)


# --------------------------------------------------------------------------- backward
@triton.jit
def _rows(
    tensors, G, i, q_time, v_time, keep, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns (q + u, q + w, G) of queries, each if it fits a block of channels."""
    content, position = _queries(tensors, i, q_time, keep, DIM, BLOCK, BLOCK_D)
    g = tl.zeros([BLOCK, BLOCK_V], G.dtype.element_ty)
    if VALUE_DIM <= BLOCK_V:
        g = load_rows(G, i, v_time, tl.arange(0, BLOCK_V), keep, VALUE_DIM)
    return content, position, g


@triton.jit
def _tile(
    lower, rows, key, tensors, masks, G, i, q_time, v_time, keep_i, j, after, sizes, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns (scores, dW, upper piece of the band) of a square tile. ``_rows`` gave the operands; the lower piece of
    the band ends at row ``after`` of R.
    """
    content, position, g = rows
    upper = _band(position, tensors, i, q_time, keep_i, after, sizes, DIM, BLOCK, BLOCK, BLOCK_D)
    scores = _scores(
        lower, upper, upper, content, key, tensors, masks, i, q_time, keep_i, j, sizes, scale,
        DIM, BLOCK, BLOCK, BLOCK_D, WINDOW,
    )  # fmt: skip
    slope = slopes_of(g, G, tensors[2], i, j, keep_i, j < sizes[1], v_time, VALUE_DIM, BLOCK, BLOCK, BLOCK_V)
    return scores, slope, upper


@triton.jit(do_not_specialize=["rows", "frames", "heads"])
def delta_kernel(
    G, Y, DELTA, rows, frames, heads, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Writes the sums of G y over the columns, of a block of rows (sequence, frame, head) of both."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = r < rows
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, VALUE_DIM, BLOCK_V):
        c = first + tl.arange(0, BLOCK_V)
        g = load_rows(G, r, VALUE_DIM, c, keep, VALUE_DIM).to(tl.float32)  # [BLOCK, BLOCK_V]
        total += tl.sum(g * load_rows(Y, r, VALUE_DIM, c, keep, VALUE_DIM).to(tl.float32), axis=1)
    sequence, frame, head = r // (frames * heads), r // heads % frames, r % heads
    tl.store(DELTA + (sequence * heads + head) * frames + frame, total, mask=keep)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def statistics_kernel(
    G, Q, K, V, POS, U, W, PADDING, MASK, SEED, LSE, INVERSE, DELTA,
    frames, keys, chunk, left, right, batch, blocks, heads, q_time, v_time, q_batch, k_batch, v_batch, g_batch,
    mask_batch, threshold, scale, factor, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes 1 / sum of the weights and delta of a block of queries of float32."""
    sizes = frames, keys, chunk, left, right
    head, sequence, block = place(tl.program_id(0), blocks, batch)
    lanes = tl.arange(0, BLOCK)
    i = block * BLOCK + lanes
    keep_i = i < frames
    tensors = _of_head(Q, K, V, POS, U, W, head, sequence, q_batch, k_batch, v_batch, DIM, VALUE_DIM)
    masks = (PADDING, MASK, sequence, mask_batch)
    G += sequence * g_batch + head * VALUE_DIM
    held = _rows(tensors, G, i, q_time, v_time, keep_i, DIM, VALUE_DIM, BLOCK, BLOCK_D, BLOCK_V)
    row = (sequence * heads + head) * frames + i
    words = row_words(SEED, row)
    lse = tl.load(LSE + row, mask=keep_i, other=float("inf"))
    base = frames - (block + 1) * BLOCK
    begin, end = _keys_seen(block * BLOCK, (block + 1) * BLOCK - 1, sizes, BLOCK, WINDOW)
    lower = _band(held[1], tensors, i, q_time, keep_i, base + begin, sizes, DIM, BLOCK, BLOCK, BLOCK_D)
    total = tl.zeros([BLOCK], tl.float64)
    along = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        j = start + lanes
        key = load_rows(tensors[1], j, q_time, tl.arange(0, BLOCK_D), j < keys, DIM)  # [BLOCK, BLOCK_D]
        scores, slope, lower = _tile(
            lower, held, key, tensors, masks, G, i, q_time, v_time, keep_i, j, base + start + BLOCK, sizes, scale,
            DIM, VALUE_DIM, WINDOW, BLOCK, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        slope = dropped(slope, SEED, words, j, threshold, factor)
        e = exp_nonpositive(scores - lse[:, None], True)
        total += sums(e, 1, True)
        along += sums(e * slope, 1, True)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(INVERSE + row, tl.div_rn(1.0, total.to(tl.float32)), mask=keep_i)
    tl.store(DELTA + row, (along / total).to(tl.float32), mask=keep_i)


@triton.jit(
    do_not_specialize=[*SIZES, "start_row", "rows", "all_blocks"], do_not_specialize_on_alignment=UNALIGNED
)
def queries_kernel(
    G, Q, K, V, POS, U, W, PADDING, MASK, SEED, LSE, INVERSE, DELTA, DQ, DS, PARTS,
    frames, keys, chunk, left, right, start_row, rows, batch, blocks, all_blocks, heads, q_time, v_time, q_batch,
    k_batch, v_batch, g_batch, mask_batch, ds_row, threshold, scale, factor,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes dS k of a block of the queries [start_row, start_row + rows) and of channels, in float32, and its sums.
    Programs of the first block of channels also store dS by offset: one BLOCK of columns more than the keys that they
    meet, of which column 0 is the row ``base`` of R. Rows behind the last query are 0."""
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    sizes = frames, keys, chunk, left, right
    head, sequence, block = place(tl.program_id(0), blocks, batch)
    lanes = tl.arange(0, BLOCK)
    local = block * BLOCK + lanes
    i = start_row + local
    keep_i = local < rows
    once = tl.program_id(1) == 0
    tensors = _of_head(Q, K, V, POS, U, W, head, sequence, q_batch, k_batch, v_batch, DIM, VALUE_DIM)
    masks = (PADDING, MASK, sequence, mask_batch)
    G += sequence * g_batch + head * VALUE_DIM
    held = _rows(tensors, G, i, q_time, v_time, keep_i, DIM, VALUE_DIM, BLOCK, BLOCK_D, BLOCK_V)
    row = (sequence * heads + head) * frames + i
    words = row_words(SEED, row)
    lse = tl.load(LSE + row, mask=keep_i, other=float("inf"))
    inverse = tl.load(INVERSE + row, mask=keep_i, other=0.0)
    delta = tl.load(DELTA + row, mask=keep_i, other=0.0)
    first = start_row + block * BLOCK
    begin, end = _keys_seen(first, first + BLOCK - 1, sizes, BLOCK, WINDOW)
    base = frames - first - BLOCK + begin
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    all_lanes = (lanes >= 0)[None, :]
    before = tl.zeros([BLOCK, BLOCK], Q.dtype.element_ty)
    DS += ((head * batch + sequence) * blocks * BLOCK + local)[:, None] * ds_row
    lower = _band(held[1], tensors, i, q_time, keep_i, base, sizes, DIM, BLOCK, BLOCK, BLOCK_D)
    for start in range(0, end - begin, BLOCK):
        j = begin + start + lanes
        key = load_rows(tensors[1], j, q_time, d, j < keys, DIM)  # [BLOCK, BLOCK_D]
        scores, slope, lower = _tile(
            lower, held, key, tensors, masks, G, i, q_time, v_time, keep_i, j, base + start + BLOCK, sizes, scale,
            DIM, VALUE_DIM, WINDOW, BLOCK, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        w = exp_nonpositive(scores - lse[:, None], PRECISE) * inverse[:, None]
        ds = w * (dropped(slope, SEED, words, j, threshold, factor) - delta[:, None])
        narrow = ds.to(key.dtype)
        dq = tl.dot(narrow, key, dq)
        after = by_offset(narrow, BLOCK)
        tl.store(
            DS + (start + lanes)[None, :], merged(after, before, before, BLOCK, BLOCK), mask=all_lanes & once
        )
        before = after
    j = tl.cdiv(end - begin, BLOCK) * BLOCK + lanes
    last = merged(tl.zeros([BLOCK, BLOCK], before.dtype), before, before, BLOCK, BLOCK)
    tl.store(DS + j[None, :], last, mask=all_lanes & once)

    keep_d = d < DIM
    dq *= scale
    out = DQ + sequence * q_batch + head * DIM + i.to(tl.int64)[:, None] * q_time + d[None, :]
    tl.store(out, dq, mask=keep_i[:, None] & keep_d[None, :])
    part = sequence * all_blocks + start_row // BLOCK + block
    tl.store(PARTS + (part * heads + head) * DIM + d, sums(dq, 0, PRECISE), mask=keep_d)


@triton.jit(do_not_specialize=[*SIZES, "first_block", "all_blocks"])
def offsets_kernel(
    DS, POS, CONTENT, DQ, PARTS, frames, keys, chunk, left, right, first_block, batch, blocks, all_blocks, heads,
    q_time, q_batch, ds_row, scale, DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dq = CONTENT + dS' R of a block of channels and of queries, out of the ``blocks`` that DS holds, and sums
    of dS' R.
    """
    PRECISE: tl.constexpr = DS.dtype.element_ty == tl.float32
    head, sequence, block = place(tl.program_id(0), blocks, batch)
    lanes = tl.arange(0, BLOCK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = (first_block + block) * BLOCK + lanes
    POS += head * DIM
    DS += ((head * batch + sequence) * blocks + block) * BLOCK * ds_row + lanes.to(tl.int64)[:, None] * ds_row
    first = (first_block + block) * BLOCK
    begin, end = _keys_seen(first, first + BLOCK - 1, (frames, keys, chunk, left, right), BLOCK, WINDOW)
    base = frames - first - BLOCK + begin
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, tl.cdiv(end - begin, BLOCK) * BLOCK + BLOCK, BLOCK):
        ds = tl.load(DS + (start + lanes)[None, :])  # [BLOCK, BLOCK]
        r = base + start + lanes
        pos = load_rows(POS, r, q_time, d, (r >= 0) & (r < frames + keys - 1), DIM)  # [BLOCK, BLOCK_D]
        dq = tl.dot(ds, pos, dq)
    dq *= scale
    part = sequence * all_blocks + first_block + block
    tl.store(PARTS + (part * heads + head) * DIM + d, sums(dq, 0, PRECISE), mask=d < DIM)
    whole = (i < frames)[:, None] & (d < DIM)[None, :]
    at = sequence * q_batch + head * DIM + i.to(tl.int64)[:, None] * q_time + d[None, :]
    dq += tl.load(CONTENT + at, mask=whole, other=0.0)
    tl.store(DQ + at, dq.to(DQ.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def keys_kernel(
    G, Q, K, V, POS, U, W, PADDING, MASK, SEED, LSE, INVERSE, DELTA, DK, DV,
    frames, keys, chunk, left, right, batch, blocks, heads, q_time, v_time, q_batch, k_batch, v_batch, g_batch,
    mask_batch, threshold, scale, factor, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes dS^T (q + u) and W^T G of a block of keys and of their channels."""
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    head, sequence, block = place(tl.program_id(0), blocks, batch)
    sizes = frames, keys, chunk, left, right
    lanes = tl.arange(0, BLOCK)
    j = block * BLOCK + lanes
    keep_j = j < keys
    tensors = _of_head(Q, K, V, POS, U, W, head, sequence, q_batch, k_batch, v_batch, DIM, VALUE_DIM)
    masks = (PADDING, MASK, sequence, mask_batch)
    G += sequence * g_batch + head * VALUE_DIM
    row = (sequence * heads + head) * frames
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    key = load_rows(tensors[1], j, q_time, tl.arange(0, BLOCK_D), keep_j, DIM)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    begin, end = _queries_seeing(block * BLOCK, (block + 1) * BLOCK - 1, sizes, BLOCK, WINDOW)
    for start in range(begin, end, BLOCK):
        i = start + lanes
        keep_i = i < frames
        content, position, g = _rows(
            tensors, G, i, q_time, v_time, keep_i, DIM, VALUE_DIM, BLOCK, BLOCK_D, BLOCK_V
        )
        first = frames + (block - 1) * BLOCK - start
        lower = _band(position, tensors, i, q_time, keep_i, first, sizes, DIM, BLOCK, BLOCK, BLOCK_D)
        scores, slope, _ = _tile(
            lower, (content, position, g), key, tensors, masks, G, i, q_time, v_time, keep_i, j, first + BLOCK, sizes,
            scale, DIM, VALUE_DIM, WINDOW, BLOCK, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        lse = tl.load(LSE + row + i, mask=keep_i, other=float("inf"))  # W is 0 behind the last query
        inverse = tl.load(INVERSE + row + i, mask=keep_i, other=0.0)
        delta = tl.load(DELTA + row + i, mask=keep_i, other=0.0)
        w = exp_nonpositive(scores - lse[:, None], PRECISE) * inverse[:, None]
        words = row_words(SEED, row + i)
        ds = w * (dropped(slope, SEED, words, j, threshold, factor) - delta[:, None])
        w = dropped(w, SEED, words, j, threshold, factor)
        if DIM > BLOCK_D:
            content = load_rows(tensors[0], i, q_time, d, keep_i, DIM, tensors[4])
        if VALUE_DIM > BLOCK_V:
            g = load_rows(G, i, v_time, c, keep_i, VALUE_DIM)
        dk = tl.dot(tl.trans(ds.to(content.dtype)), content, dk)
        dv = tl.dot(tl.trans(w.to(g.dtype)), g, dv)
    out = DK + sequence * k_batch + head * DIM + j.to(tl.int64)[:, None] * q_time + d[None, :]
    tl.store(out, (dk * scale).to(DK.dtype.element_ty), mask=keep_j[:, None] & (d < DIM)[None, :])
    out = DV + sequence * v_batch + head * VALUE_DIM + j.to(tl.int64)[:, None] * v_time + c[None, :]
    tl.store(out, dv.to(DV.dtype.element_ty), mask=keep_j[:, None] & (c < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=[*SIZES, "first_block", "count", "lowest", "low", "high", "each", "groups"])
def positions_kernel(
    DS, Q, W, PARTS, frames, keys, chunk, left, right, first_block, count, lowest, low, high, each, groups, batch,
    blocks, heads, q_time, q_batch, ds_row, scale, DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes PARTS + dS'^T (q + w) of WIDE blocks of offsets and one of channels, over the ``count`` blocks of queries
    that DS holds of each sequence of a group of ``each``; PARTS is (groups, high - low, heads DIM), for the offsets
    from ``low`` to ``high``. Offsets r = T + t BLOCK + c are block t + b + 1 of the rows of block b, counted from key
    0; the first program begins with t = ``lowest``.
    """
    sizes = frames, keys, chunk, left, right
    head, group, number = place(tl.program_id(0), blocks, groups)
    lanes = tl.arange(0, BLOCK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = lowest + number * WIDE
    wide = tl.arange(0, WIDE * BLOCK)
    Q += head * DIM
    W += head * DIM
    dr = tl.zeros([WIDE * BLOCK, BLOCK_D], tl.float32)
    begin = tl.maximum(-t - WIDE, first_block)
    met = tl.minimum(tl.cdiv(keys, BLOCK) - t, first_block + count) - begin
    sequences = tl.minimum(batch - group * each, each).to(tl.int32)
    for n in range(0, tl.maximum(met, 0) * sequences):
        sequence = group * each + n // met
        block = begin + n % met
        i = block * BLOCK + lanes
        rows = (block - first_block) * BLOCK + lanes
        rows = ((head * batch + sequence) * count * BLOCK + rows) * ds_row
        column = (t + block + 1) * BLOCK + wide
        first, behind = _keys_seen(block * BLOCK, (block + 1) * BLOCK - 1, sizes, BLOCK, WINDOW)
        inside = (column >= first) & (column < (tl.cdiv(behind, BLOCK) + 1) * BLOCK)  # as whole blocks
        ds = tl.load(DS + rows[:, None] + (column - first)[None, :], mask=inside[None, :], other=0.0)
        p = load_rows(Q + sequence * q_batch, i, q_time, d, i < frames, DIM, W)  # [BLOCK, BLOCK_D]
        dr = tl.dot(tl.trans(ds), p, dr)
    r = frames + t * BLOCK + wide
    out = PARTS + (group * (high - low) + r - low)[:, None] * (heads * DIM) + head * DIM + d[None, :]
    whole = ((r >= low) & (r < high))[:, None] & (d < DIM)[None, :]
    found = tl.load(out, mask=whole, other=0.0)
    tl.store(out, found + (dr * scale).to(found.dtype), mask=whole)


@triton.jit(do_not_specialize=["parts"])
def biases_kernel(PARTS, DU, DW, parts, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds a block of columns of the two tables of ``parts`` rows."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    keep_c = c < width
    PARTS += tl.program_id(1).to(tl.int64) * parts * width
    total = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        found = load_rows(PARTS, p, width, c, p < parts, width)  # [BLOCK_P, BLOCK_C]
        total += tl.sum(found.to(tl.float64), axis=0)
    total = total.to(tl.float32)
    if tl.program_id(1) == 0:
        tl.store(DU + c, total.to(DU.dtype.element_ty), mask=keep_c)
    else:
        tl.store(DW + c, total.to(DW.dtype.element_ty), mask=keep_c)


# --------------------------------------------------------------------------- launchers
def tiles(
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    generation: int,
    hiding: bool,
    dropping: bool,
    limited: bool,
) -> dict[str, dict]:
    """Returns tile shapes, warps and stages by kernel; ``hiding`` says whether there is a mask of pairs, ``dropping``
    whether there is dropout, ``limited`` whether the context is.

    The tiles are the largest that do not spill (tests/kernels/budgets.toml). Products of float32 run without tensor
    cores unless TF32 is allowed, and need small tiles. Heads of 65 to 128 channels fit the registers in one block only
    in the forward kernel with operands in shared memory. Others read blocks of 64; ``queries`` and ``keys`` compute the
    scores for each.
    """
    wide = dtype == torch.float32
    block = 16 if wide else 32
    columns = min(32 if wide else 128, max(16, triton.next_power_of_2(value_dim)))
    common = {"BLOCK_D": head_block(dim, dtype), "num_warps": 4} | dot_options(dtype)
    square = common | {"BLOCK": block, "BLOCK_V": columns, "num_stages": 2 if wide else 3}
    halves = {"BLOCK_D": 64} if dim > 64 and not wide else {}
    forward = common | {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_V": columns, "num_stages": 2}
    if generation in (90, 100) and dim <= (64 if dropping or limited else 128) and not wide and not hiding:
        forward["BLOCK_M"] = 64
    else:
        forward |= halves
    if 64 < dim <= 128 and not wide:
        square = inner = square | halves | {"BLOCK_V": min(64, columns)}
    else:
        inner = square | ({"num_warps": 8} if wide or dim > 128 else {})
    products = common | {"BLOCK": 32, "num_stages": 3}  # blocks of dS as ``queries`` stores them
    crowded = {"num_stages": 1} if hiding and dropping else {}  # loads ahead would spill
    # two warps have 8 columns each of 16 x 16; four compute all of them twice
    two = {"num_warps": 2} if rounded(dtype) else {}
    return {
        "forward": forward | crowded | two,
        "delta": {"BLOCK": 32, "BLOCK_V": columns, "num_warps": 4},
        "statistics": square | two,  # those of ``queries`` to the last bit, so that rows of dS add up to zero
        "queries": inner | {"BLOCK": 32},
        "keys": square | {"num_stages": 1} | two if wide else inner | crowded,
        "offsets": products,
        "positions": products | {"WIDE": 1 if wide else 2},
    }


PROGRAMS = 1024  # of ``positions_kernel``
BIASES = {"BLOCK_P": 64, "BLOCK_C": 16, "num_warps": 4}


def rel_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pos: torch.Tensor,
    bias_u: torch.Tensor,
    bias_v: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    left: int,
    right: int,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (y (B, T, H, e), lse (B, H, T) in float32, inf where a query sees no key). All tensors are
    contiguous.
    """
    batch, frames, heads, dim = q.shape
    y = v.new_empty(batch, frames, heads, v.shape[3])
    lse = q.new_empty(batch, heads, frames, dtype=torch.float32)
    if not lse.numel():
        return y, lse
    sizes, window = _sizes(frames, k.shape[1], left, right, chunk_size)
    tile = _tiles(q, v, attn_mask, dropout_p, window)["forward"]
    blocks = triton.cdiv(frames, tile["BLOCK_M"])
    launch(forward_kernel, (heads * batch * blocks, triton.cdiv(v.shape[3], tile["BLOCK_V"])),
        q, k, v, pos, bias_u, bias_v, _bytes(key_padding_mask), _bytes(attn_mask),
        dropout_seed if dropout_p else None, y, lse,
        *sizes, batch, blocks, heads, *_strides(q, k, v, y), _mask_batch(attn_mask), *_last(dim, dropout_p),
        DIM=dim, VALUE_DIM=v.shape[3], WINDOW=window, **tile,
    )  # fmt: skip
    return y, lse


def _last(dim: int, dropout_p: float) -> tuple[int, float, float]:
    """Returns the kernels' last numbers: threshold, scale and factor."""
    threshold, factor = dropout_constants(dropout_p)
    return threshold, dim**-0.5, factor


def _tiles(
    q: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None, dropout_p: float, limited: bool
) -> dict[str, dict]:
    hiding, dropping = attn_mask is not None, dropout_p > 0
    return tiles(q.shape[3], v.shape[3], q.dtype, generation(q), hiding, dropping, limited)


def _strides(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor) -> tuple[int, ...]:
    return q.stride(1), v.stride(1), q.stride(0), k.stride(0), v.stride(0), y.stride(0)


def _sizes(
    frames: int, keys: int, left: int, right: int, chunk_size: int
) -> tuple[tuple[int, int, int, int, int], bool]:
    """Returns the kernels' ``sizes``, and whether any context is limited. No sum of them overflows."""
    return (frames, keys, *(min(n, keys) for n in (chunk_size, left, right))), max(left, right) >= 0


def _met(sizes: tuple[int, int, int, int, int], block: int) -> tuple[int, int, int]:
    """Returns (number, lowest, highest): a block of queries meets at most that many blocks of keys, and its rows of dS
    by offset lie in the blocks ``lowest`` to ``highest`` of offsets that ``positions_kernel`` counts.
    """
    frames, keys, chunk, left, right = sizes
    blocks, cached = triton.cdiv(keys, block), keys - frames
    lowest, highest = -triton.cdiv(frames, block), blocks - 1
    if left >= 0:
        lowest = max(lowest, (cached - chunk + 1 - left) // block - 1)
    if right >= 0:
        highest = min(highest, triton.cdiv(block - 1 + cached + chunk + right, block) - 1)
    return min(blocks, highest - lowest), lowest, highest


def _each(batch: int, programs: int) -> int:
    """Returns the sequences of a program of ``positions_kernel``, of which each sequence takes ``programs``: so many
    that about PROGRAMS are left, as each group of sequences has a table of dR.
    """
    return triton.cdiv(batch, min(batch, triton.cdiv(PROGRAMS, programs)))


def rel_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pos: torch.Tensor,
    bias_u: torch.Tensor,
    bias_v: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dropout_p: float,
    left: int,
    right: int,
    chunk_size: int,
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of the six tensors. All tensors are contiguous."""
    batch, frames, heads, dim = q.shape
    if not lse.numel():
        return tuple(torch.zeros_like(t) for t in (q, k, v, pos, bias_u, bias_v))
    dq, dk, dv, du, dw = (torch.empty_like(t) for t in (q, k, v, bias_u, bias_v))
    width, pairs, scale = heads * dim, heads * batch, dim**-0.5
    sizes, window = _sizes(frames, k.shape[1], left, right, chunk_size)
    shares = torch.float64 if q.dtype == torch.float32 else torch.float32
    shapes = _tiles(q, v, attn_mask, dropout_p, window)
    constants = {"DIM": dim, "VALUE_DIM": v.shape[3], "WINDOW": window}
    strides, last = (*_strides(q, k, v, grad), _mask_batch(attn_mask)), _last(dim, dropout_p)
    operands = (
        grad, q, k, v, pos, bias_u, bias_v, _bytes(key_padding_mask), _bytes(attn_mask),
        dropout_seed if dropout_p else None, lse,
    )  # fmt: skip
    inverse, delta = torch.empty_like(lse), torch.empty_like(lse)
    if q.dtype == torch.float32:
        blocks = triton.cdiv(frames, shapes["statistics"]["BLOCK"])
        launch(statistics_kernel, (pairs * blocks,),
            *operands, inverse, delta, *sizes, batch, blocks, heads, *strides, *last,
            **constants, **shapes["statistics"],
        )  # fmt: skip
    else:
        inverse.fill_(1.0)
        launch(delta_kernel, (triton.cdiv(lse.numel(), shapes["delta"]["BLOCK"]),),
            grad, out, delta, lse.numel(), frames, heads, VALUE_DIM=v.shape[3], **shapes["delta"],
        )  # fmt: skip
    operands = *operands, inverse, delta
    content = torch.empty_like(q, dtype=torch.float32)

    tile = shapes["queries"]
    block = tile["BLOCK"]
    blocks = triton.cdiv(frames, block)
    met, lowest, highest = _met(sizes, block)
    row = (met + 1) * block  # a row of dS by offset
    step = max(1, PIECE_BYTES // (pairs * row * q.element_size()) // block)
    ds = q.new_empty(pairs * min(step, blocks) * block * row)
    of_program = shapes["positions"]["WIDE"]  # blocks of offsets of a program
    programs = heads * triton.cdiv(highest - lowest + 1, of_program)
    each = 1 if q.dtype == torch.float32 else _each(batch, programs)
    groups = triton.cdiv(batch, each)
    low, high = max(frames + lowest * block, 0), min(frames + (highest + 1) * block, pos.shape[0])
    dpos = torch.zeros_like(pos) if window else torch.empty_like(pos)
    parts = torch.zeros(groups, high - low, width, dtype=shares, device=q.device)
    sums_of = torch.empty(2, batch * blocks, width, dtype=shares, device=q.device)
    columns, of_products = (triton.cdiv(dim, shapes[name]["BLOCK_D"]) for name in ("queries", "offsets"))
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        rows = min(count * block, frames - first * block)
        launch(queries_kernel, (pairs * count, columns),
            *operands, content, ds, sums_of[0],
            *sizes, first * block, rows, batch, count, blocks, heads, *strides, row, *last, **constants, **tile,
        )  # fmt: skip
        launch(offsets_kernel, (pairs * count, of_products),
            ds, pos, content, dq, sums_of[1], *sizes, first, batch, count, blocks, heads,
            q.stride(1), q.stride(0), row, scale, DIM=dim, WINDOW=window, **shapes["offsets"],
        )  # fmt: skip
        here = max(lowest, -first - count)  # offsets of the piece, in blocks
        tall = triton.cdiv(min(highest, triton.cdiv(k.shape[1], block) - 1 - first) - here + 1, of_program)
        launch(positions_kernel, (heads * groups * tall, of_products),
            ds, q, bias_v, parts, *sizes, first, count, here, low, high, each, groups, batch, tall, heads,
            q.stride(1), q.stride(0), row, scale, DIM=dim, WINDOW=window, **shapes["positions"],
        )  # fmt: skip
    met_by = dpos[low:high]
    size = met_by.numel()
    launch(add_parts_kernel, (triton.cdiv(size, PARTS["BLOCK"]),), parts, met_by, size, groups, **PARTS)
    launch(biases_kernel, (triton.cdiv(width, BIASES["BLOCK_C"]), 2),
        sums_of, du, dw, batch * blocks, width, **BIASES,
    )  # fmt: skip

    tile = shapes["keys"]
    blocks = triton.cdiv(k.shape[1], tile["BLOCK"])
    columns = max(triton.cdiv(dim, tile["BLOCK_D"]), triton.cdiv(v.shape[3], tile["BLOCK_V"]))
    launch(keys_kernel, (pairs * blocks, columns),
        *operands, dk, dv, *sizes, batch, blocks, heads, *strides, *last, **constants, **tile
    )  # fmt: skip
    return dq, dk, dv, dpos, du, dw
