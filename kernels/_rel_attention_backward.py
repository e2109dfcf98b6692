# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of rel_attention, see rel_attention.py."""

import triton
import triton.language as tl

from fastasr.kernels._activation import exp_nonpositive
from fastasr.kernels._attention_tiles import delta_of_values, load_rows, load_rows_from, products, sums
from fastasr.kernels._recordings import blocks_of, rows_of
from fastasr.kernels._rel_attention_scores import (
    SIZES,
    UNALIGNED,
    band,
    bits_of,
    context,
    gates,
    is_spanned,
    keys_of_all,
    keys_seen,
    of_head,
    offset_biases,
    queries,
    queries_of_all,
    queries_seeing,
    scores_of,
    through_cap,
)
from fastasr.kernels._rel_position_tiles import dealt, place
from fastasr.kernels._relative_shift import by_offset, merged, ready
from fastasr.kernels._special import LOG2_E, exp2
from fastasr.kernels._weights_dropout import dropped, row_words


@triton.jit
def _rows(
    tensors, G, first, q_time, v_time, keep, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns (q + u, q + w, G) of queries from ``first`` on, each if it fits a block of channels."""
    content, position = queries(tensors, first, q_time, keep, DIM, BLOCK, BLOCK_D)
    return content, position, _row_block(G, first, v_time, keep, VALUE_DIM, BLOCK, BLOCK_V)


@triton.jit
def _row_block(X, first, stride, keep, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns rows of X from ``first`` on if they fit a block of channels; else zeros that nothing reads."""
    rows = tl.zeros([BLOCK, COLUMNS], X.dtype.element_ty)
    if WIDTH <= COLUMNS:
        rows = load_rows_from(X, first, stride, tl.arange(0, COLUMNS), keep, WIDTH)
    return rows


@triton.jit
def _tile(
    lower, last, rows, key, value, tensors, biases, masks, G, i, q_time, v_time, keep_i, start, partial, after, sizes,
    scale, cap, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns (scores, dW, upper piece of the band as it is ``ready``, and as it is) of a tile. ``_rows`` gave the
    operands; the lower piece, which is ``ready``, and ``last``, the piece before the upper one, end at row ``after``
    of R.
    """
    content, position, g = rows
    piece = band(position, tensors, i, q_time, keep_i, after, sizes, DIM, BLOCK_M, BLOCK_N, BLOCK_D)
    upper = ready(last, piece, BLOCK_M, BLOCK_N)
    scores = scores_of(
        lower, upper, content, key, tensors, biases, masks, i, q_time, keep_i, start, partial, sizes, scale, cap,
        DIM, BLOCK_M, BLOCK_N, BLOCK_D, WINDOW,
    )  # fmt: skip
    slope = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if VALUE_DIM <= BLOCK_V:
        slope = tl.dot(g, tl.trans(value), slope)
    else:
        V, j = tensors[2], start + tl.arange(0, BLOCK_N)
        slope = products(slope, G, i, v_time, keep_i, V, j, v_time, j < sizes[1], VALUE_DIM, BLOCK_V)
    return scores, slope, upper, piece


@triton.jit
def _inverse(INVERSE, row, keep, lse):
    """Returns 1 / sum of the weights of float32; of 16 bits there is none, and lse stands for it."""
    found = lse
    if INVERSE is not None:
        found = tl.load(INVERSE + row, mask=keep, other=0.0)
    return found


@triton.jit
def _weights(scores, lse, inverse, bits, PRECISE: tl.constexpr):
    """Returns the weights of queries, see ``bits_of``."""
    if PRECISE:
        w = exp_nonpositive(scores - lse[:, None], True) * inverse[:, None]
    else:
        w = exp2(tl.fma(scores, bits, -(lse * LOG2_E)[:, None]))
    return w


@triton.jit(do_not_specialize=["rows", "frames", "heads"])
def delta_kernel(
    G, Y, REMAINDER, DELTA, rows, frames, heads,
    VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes delta of a block of rows (sequence, frame, head) of 16 bits."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = r < rows
    delta = delta_of_values(G, Y, REMAINDER, r, VALUE_DIM, keep, VALUE_DIM, BLOCK, BLOCK_V)
    sequence, frame, head = r // (frames * heads), r // heads % frames, r % heads
    tl.store(DELTA + (sequence * heads + head) * frames + frame, delta, mask=keep)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def statistics_kernel(
    G, Q, K, V, POS, EDGES, U, W, BIAS, GATE, KEY_BIAS, PADDING, MASK, BOUNDS, SEED, LSE, INVERSE, DELTA,
    frames, keys, chunk, left, right, batch, blocks, heads, q_time, v_time, q_batch, k_batch, v_batch,
    g_batch, mask_batch, c_batch, c_head, side, r_time, r_head, before, behind, threshold, scale, factor, cap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes 1 / sum of the weights and delta of a block of queries of float32."""
    sizes = frames, keys, chunk, left, right, BOUNDS
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK)
    lanes = tl.arange(0, BLOCK)
    i = block * BLOCK + lanes
    keep_i = i < frames
    Q, K, V = of_head(Q, K, V, head, sequence, q_batch, k_batch, v_batch, DIM, VALUE_DIM)
    span = (EDGES, (sequence * heads + head) * frames, side, r_time, r_head, before, behind)
    tensors = (Q, K, V, POS, U, W, head, span)
    masks = (PADDING, MASK, sequence, mask_batch)
    masks += context(i, sizes, WINDOW)
    seen_from, seen_to = keys_of_all(block * BLOCK, (block + 1) * BLOCK - 1, sizes, WINDOW)
    biases = (BIAS, GATE, KEY_BIAS, head, sequence * frames, heads, c_batch, c_head)
    G += sequence * g_batch + head * VALUE_DIM
    held = _rows(tensors, G, block * BLOCK, q_time, v_time, keep_i, DIM, VALUE_DIM, BLOCK, BLOCK_D, BLOCK_V)
    row = (sequence * heads + head) * frames + i
    words = row_words(SEED, row)
    lse = tl.load(LSE + row, mask=keep_i, other=float("inf"))
    base = frames - (block + 1) * BLOCK
    begin, end = keys_seen(block * BLOCK, (block + 1) * BLOCK - 1, sizes, BLOCK, WINDOW)
    lower = band(held[1], tensors, i, q_time, keep_i, base + begin, sizes, DIM, BLOCK, BLOCK, BLOCK_D)
    total = tl.zeros([BLOCK], tl.float64)
    along = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        j = start + lanes
        key = load_rows_from(
            tensors[1], start, q_time, tl.arange(0, BLOCK_D), j < keys, DIM
        )  # [BLOCK, BLOCK_D]
        value = _row_block(tensors[2], start, v_time, j < keys, VALUE_DIM, BLOCK, BLOCK_V)
        partial = (start < seen_from) | (start + BLOCK > seen_to)
        scores, slope, lower, _ = _tile(
            lower, lower, held, key, value, tensors, biases, masks, G, i, q_time, v_time, keep_i, start, partial,
            base + start + BLOCK, sizes, scale, cap, DIM, VALUE_DIM, WINDOW, BLOCK, BLOCK, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        slope = dropped(slope, SEED, words, j, threshold, factor)
        e = exp_nonpositive(scores - lse[:, None], True)
        total += sums(e, 1, True)
        along += sums(e * slope, 1, True)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(INVERSE + row, tl.div_rn(1.0, total.to(tl.float32)), mask=keep_i)
    tl.store(DELTA + row, (along / total).to(tl.float32), mask=keep_i)


@triton.jit(
    do_not_specialize=[*SIZES, "start_row", "rows", "piece", "all_blocks"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def queries_kernel(
    G, Q, K, V, POS, EDGES, U, W, BIAS, GATE, KEY_BIAS, PADDING, MASK, BOUNDS, SEED, LSE, INVERSE, DELTA, DQ, DS, PARTS,
    DGATE, PIECES, frames, keys, chunk, left, right, start_row, rows, piece, batch, blocks, all_blocks, heads, q_time,
    v_time, q_batch, k_batch, v_batch, g_batch, mask_batch, c_batch, c_head, side, r_time, r_head, before, behind,
    ds_row, threshold, scale, factor, cap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes dS k of a block of the queries [start_row, start_row + rows) and of channels and its sums, and the
    gradient of the gate. DQ has float32 if dS' R will be added. Programs of the first block of channels also store dS
    by offset, unless DS is None: one BLOCK of columns more than the keys that they meet. Column 0 is the row of R of
    the last query in each BLOCK of rows and the first key. Rows behind the last query are 0. With PIECES of
    _recordings.py, DS holds one of these."""
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    sizes = frames, keys, chunk, left, right, BOUNDS
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK_M)
    first_block = 0
    if PIECES is not None:
        first_block, end_block = blocks_of(PIECES, piece, blocks)
        if (block < first_block) | (block >= end_block):
            return
    lanes = tl.arange(0, BLOCK)
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = start_row + local
    keep_i = local < rows
    once = tl.program_id(1) == 0
    Q, K, V = of_head(Q, K, V, head, sequence, q_batch, k_batch, v_batch, DIM, VALUE_DIM)
    span = (EDGES, (sequence * heads + head) * frames, side, r_time, r_head, before, behind)
    tensors = (Q, K, V, POS, U, W, head, span)
    masks = (PADDING, MASK, sequence, mask_batch)
    masks += context(i, sizes, WINDOW)
    first = start_row + block * BLOCK_M
    seen_from, seen_to = keys_of_all(first, first + BLOCK_M - 1, sizes, WINDOW)
    biases = (BIAS, GATE, KEY_BIAS, head, sequence * frames, heads, c_batch, c_head)
    G += sequence * g_batch + head * VALUE_DIM
    held = _rows(tensors, G, first, q_time, v_time, keep_i, DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V)
    row = (sequence * heads + head) * frames + i
    words = row_words(SEED, row)
    lse = tl.load(LSE + row, mask=keep_i, other=float("inf"))
    inverse = _inverse(INVERSE, row, keep_i, lse)
    delta = tl.load(DELTA + row, mask=keep_i, other=0.0)
    begin, end = keys_seen(first, first + BLOCK_M - 1, sizes, BLOCK, WINDOW)
    base = frames - first - BLOCK_M + begin
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    all_rows = (tl.arange(0, BLOCK_M) >= 0)[:, None]
    before = tl.zeros([BLOCK_M, BLOCK], Q.dtype.element_ty)
    dgate = tl.zeros([BLOCK_M], tl.float64 if PRECISE else tl.float32)
    if DS is not None:
        if PIECES is None:
            DS += ((head * batch + sequence) * blocks * BLOCK_M + local)[:, None] * ds_row
        else:
            _, row_size, at = rows_of(PIECES, block, first_block, blocks, BLOCK)
            DS += (head * batch + sequence) * ds_row + at + (tl.arange(0, BLOCK_M) * row_size)[:, None]
    last = band(held[1], tensors, i, q_time, keep_i, base, sizes, DIM, BLOCK_M, BLOCK, BLOCK_D)
    lower = last
    if BLOCK_M > BLOCK:
        last = band(held[1], tensors, i, q_time, keep_i, base + BLOCK, sizes, DIM, BLOCK_M, BLOCK, BLOCK_D)
        lower = ready(lower, last, BLOCK_M, BLOCK)
    for start in range(0, end - begin, BLOCK):
        j = begin + start + lanes
        key = load_rows_from(tensors[1], begin + start, q_time, d, j < keys, DIM)  # [BLOCK, BLOCK_D]
        value = _row_block(tensors[2], begin + start, v_time, j < keys, VALUE_DIM, BLOCK, BLOCK_V)
        partial = (begin + start < seen_from) | (begin + start + BLOCK > seen_to)
        scores, slope, lower, last = _tile(
            lower, last, held, key, value, tensors, biases, masks, G, i, q_time, v_time, keep_i, begin + start, partial,
            base + start + BLOCK_M, sizes, scale, cap, DIM, VALUE_DIM, WINDOW, BLOCK_M, BLOCK, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        w = _weights(scores, lse, inverse, bits_of(biases, scale, cap), PRECISE)
        ds = w * (dropped(slope, SEED, words, j, threshold, factor) - delta[:, None])
        ds = through_cap(ds, scores, cap)
        if GATE is not None:
            dgate += sums(ds * offset_biases(biases, i, keep_i, j, frames, keys), 1, PRECISE)
        narrow = ds.to(key.dtype)
        dq = tl.dot(narrow, key, dq)
        if DS is not None:
            after = by_offset(narrow, BLOCK_M, BLOCK)
            tl.store(
                DS + (start + lanes)[None, :], merged(after, before, BLOCK_M, BLOCK), mask=all_rows & once
            )
            before = after
    if DS is not None:
        j = tl.cdiv(end - begin, BLOCK) * BLOCK + lanes
        none = tl.zeros([BLOCK_M, BLOCK], before.dtype)
        tl.store(DS + j[None, :], merged(none, before, BLOCK_M, BLOCK), mask=all_rows & once)
    if GATE is not None:
        at = DGATE + (sequence * frames + i) * heads + head
        tl.store(at, dgate.to(DGATE.dtype.element_ty), mask=keep_i & once)

    keep_d = d < DIM
    dq *= scale
    out = DQ + sequence * q_batch + head * DIM + i.to(tl.int64)[:, None] * q_time + d[None, :]
    tl.store(out, dq.to(DQ.dtype.element_ty), mask=keep_i[:, None] & keep_d[None, :])
    if PARTS is not None:
        own = tl.arange(0, BLOCK_M // BLOCK)  # the other parts of these rows are 0
        number = start_row // BLOCK + block * (BLOCK_M // BLOCK) + own
        parts = ((sequence * all_blocks + number) * heads + head) * DIM
        found = tl.where((own == 0)[:, None], sums(dq, 0, PRECISE)[None, :], 0.0)
        keep = (number < all_blocks)[:, None] & keep_d[None, :]
        tl.store(PARTS + parts[:, None] + d[None, :], found.to(PARTS.dtype.element_ty), mask=keep)


@triton.jit
def _keys_of_rows(block, sizes, BLOCK: tl.constexpr, EACH: tl.constexpr, WINDOW: tl.constexpr):
    """Returns ``keys_seen`` of the EACH blocks of queries which ``queries_kernel`` meets with this one."""
    first = block // EACH * EACH * BLOCK
    return keys_seen(first, first + EACH * BLOCK - 1, sizes, BLOCK, WINDOW)


@triton.jit(do_not_specialize=[*SIZES, "first_block", "piece", "all_blocks"])
def offsets_kernel(
    DS, Q, POS, EDGES, W, CONTENT, DQ, PARTS, SUMS, BOUNDS, PIECES, frames, keys, chunk, left, right, first_block,
    piece, batch, blocks, all_blocks, heads, q_time, q_batch, side, r_time, r_head, before, behind, ds_row, scale,
    DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dq = CONTENT + dS' R of a block of channels and of queries, out of the ``blocks`` that DS holds, and sums
    of dS' R. With a span it also writes to SUMS what keys beyond it, those with R's first and last row, add to these.
    EACH blocks of queries have rows of DS that begin with the same key.
    """
    PRECISE: tl.constexpr = DS.dtype.element_ty == tl.float32
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK)
    if PIECES is not None:
        first_rows, end_rows = blocks_of(PIECES, piece, tl.cdiv(blocks, EACH))
        first_block = first_rows * EACH
        if (block < first_block) | (block >= end_rows * EACH):
            return
        block -= first_block
    lanes = tl.arange(0, BLOCK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = (first_block + block) * BLOCK + lanes
    span = (EDGES, 0, side, r_time, r_head, before, behind)
    POS += head * r_head
    if PIECES is None:
        row = (head * batch + sequence) * tl.cdiv(blocks, EACH) * EACH * BLOCK + block * BLOCK
        DS += (row + lanes.to(tl.int64))[:, None] * ds_row
    else:
        _, row_size, at = rows_of(
            PIECES, (first_block + block) // EACH, first_rows, tl.cdiv(blocks, EACH), BLOCK
        )
        DS += (head * batch + sequence) * ds_row + at + ((block % EACH * BLOCK + lanes) * row_size)[:, None]
    first = (first_block + block) * BLOCK
    sizes = frames, keys, chunk, left, right, BOUNDS
    begin, end = _keys_of_rows(first_block + block, sizes, BLOCK, EACH, WINDOW)
    base = frames - first - BLOCK + begin
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_sum = tl.zeros([BLOCK], tl.float64 if PRECISE else tl.float32)
    last_sum = first_sum
    for start in range(0, tl.cdiv(end - begin, BLOCK) * BLOCK + BLOCK, BLOCK):
        ds = tl.load(DS + (start + lanes)[None, :])  # [BLOCK, BLOCK]
        r = base + start
        if EDGES is None:
            rows = frames + keys - 1
            if BOUNDS is not None:
                r -= keys - 1 - before
                rows = before + behind + 1
            pos = load_rows_from(
                POS, r, r_time, d, (r + lanes).to(tl.uint32) < rows.to(tl.uint32), DIM
            )  # [BLOCK, BLOCK_D]
            dq = tl.dot(ds, pos, dq)
        else:
            distance = r + lanes - (keys - 1)
            at_first, inside = distance <= -before, (distance > -before) & (distance < behind)
            wide = ds.to(tl.float32)
            first_sum += sums(tl.where(at_first[None, :], wide, 0.0), 1, PRECISE)
            last_sum += sums(tl.where((at_first | inside)[None, :], 0.0, wide), 1, PRECISE)
            if is_spanned(base + start, keys, span, BLOCK):
                pos = load_rows_from(POS, r - (keys - 1) + before, r_time, d, inside, DIM)  # [BLOCK, BLOCK_D]
                dq = tl.dot(ds, pos, dq)
    part = (sequence * all_blocks + first_block + block) * heads + head
    if EDGES is not None:
        last = POS + (before + behind).to(tl.int64) * r_time
        first_row = tl.load(POS + d, mask=d < DIM, other=0.0).to(tl.float32)
        last_row = tl.load(last + d, mask=d < DIM, other=0.0).to(tl.float32)
        first_sum, last_sum = first_sum.to(tl.float32), last_sum.to(tl.float32)
        dq += first_sum[:, None] * first_row[None, :] + last_sum[:, None] * last_row[None, :]
        if W is not None:
            W += head * DIM
        p = load_rows(Q + sequence * q_batch + head * DIM, i, q_time, d, i < frames, DIM, W).to(tl.float32)
        out = SUMS + part * DIM + d
        tl.store(out, sums(p * first_sum[:, None], 0, PRECISE) * scale, mask=d < DIM)
        out += batch.to(tl.int64) * all_blocks * heads * DIM
        tl.store(out, sums(p * last_sum[:, None], 0, PRECISE) * scale, mask=d < DIM)
    dq *= scale
    if PARTS is not None:
        tl.store(PARTS + part * DIM + d, sums(dq, 0, PRECISE), mask=d < DIM)
    whole = (i < frames)[:, None] & (d < DIM)[None, :]
    at = sequence * q_batch + head * DIM + i.to(tl.int64)[:, None] * q_time + d[None, :]
    dq += tl.load(CONTENT + at, mask=whole, other=0.0)
    tl.store(DQ + at, dq.to(DQ.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def keys_kernel(
    G, Q, K, V, POS, EDGES, U, W, BIAS, GATE, KEY_BIAS, PADDING, MASK, BOUNDS, SEED, LSE, INVERSE, DELTA, DK, DV,
    DKEY_BIAS, frames, keys, chunk, left, right, batch, blocks, heads, q_time, v_time, q_batch, k_batch,
    v_batch, g_batch, mask_batch, c_batch, c_head, side, r_time, r_head, before, behind, s_batch, s_head, threshold,
    scale, factor, cap, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes dS^T (q + u) and W^T G of a block of keys and of their channels. Programs of the first block of channels
    also write the sums of dS over the queries, unless DKEY_BIAS is None.
    """
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK)
    sizes = frames, keys, chunk, left, right, BOUNDS
    j = block * BLOCK + tl.arange(0, BLOCK)
    keep_j = j < keys
    Q, K, V = of_head(Q, K, V, head, sequence, q_batch, k_batch, v_batch, DIM, VALUE_DIM)
    span = (EDGES, (sequence * heads + head) * frames, side, r_time, r_head, before, behind)
    tensors = (Q, K, V, POS, U, W, head, span)
    biases = (BIAS, GATE, KEY_BIAS, head, sequence * frames, heads, c_batch, c_head)
    G += sequence * g_batch + head * VALUE_DIM
    row = (sequence * heads + head) * frames
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    key = load_rows_from(tensors[1], block * BLOCK, q_time, tl.arange(0, BLOCK_D), keep_j, DIM)
    value = _row_block(tensors[2], block * BLOCK, v_time, keep_j, VALUE_DIM, BLOCK, BLOCK_V)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float64 if PRECISE else tl.float32)
    begin, end = queries_seeing(block * BLOCK, (block + 1) * BLOCK - 1, sizes, BLOCK_M, WINDOW)
    masks = (PADDING, MASK, sequence, mask_batch, None, None)
    seen_from, seen_to = queries_of_all(block * BLOCK, (block + 1) * BLOCK - 1, sizes, WINDOW)
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        keep_i = i < frames
        rows = _rows(tensors, G, start, q_time, v_time, keep_i, DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V)
        content, position, g = rows
        partial = (start < seen_from) | (start + BLOCK_M > seen_to)
        after = frames + (block + 1) * BLOCK - start  # of the query ``start`` and the last key, and one
        first = after - BLOCK - BLOCK_M
        last = band(position, tensors, i, q_time, keep_i, first, sizes, DIM, BLOCK_M, BLOCK, BLOCK_D)
        lower = last
        if BLOCK_M > BLOCK:
            last = band(
                position, tensors, i, q_time, keep_i, first + BLOCK, sizes, DIM, BLOCK_M, BLOCK, BLOCK_D
            )
            lower = ready(lower, last, BLOCK_M, BLOCK)
        scores, slope, _, _ = _tile(
            lower, last, rows, key, value, tensors, biases, masks, G, i, q_time, v_time, keep_i, block * BLOCK, partial,
            after - BLOCK, sizes, scale, cap, DIM, VALUE_DIM, WINDOW, BLOCK_M, BLOCK, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        lse = tl.load(LSE + row + i, mask=keep_i, other=float("inf"))  # W is 0 behind the last query
        inverse = _inverse(INVERSE, row + i, keep_i, lse)
        delta = tl.load(DELTA + row + i, mask=keep_i, other=0.0)
        w = _weights(scores, lse, inverse, bits_of(biases, scale, cap), PRECISE)
        words = row_words(SEED, row + i)
        ds = w * (dropped(slope, SEED, words, j, threshold, factor) - delta[:, None])
        ds = through_cap(ds, scores, cap)
        if DKEY_BIAS is not None:
            dbias += sums(ds, 0, PRECISE)
        w = dropped(w, SEED, words, j, threshold, factor)
        if DIM > BLOCK_D:
            bias = U
            if U is not None:
                bias = U + head * DIM
            content = load_rows_from(Q, start, q_time, d, keep_i, DIM, bias)
        if VALUE_DIM > BLOCK_V:
            g = load_rows_from(G, start, v_time, c, keep_i, VALUE_DIM)
        dk = tl.dot(tl.trans(ds.to(content.dtype)), content, dk)
        dv = tl.dot(tl.trans(w.to(g.dtype)), g, dv)
    out = DK + sequence * k_batch + head * DIM + j.to(tl.int64)[:, None] * q_time + d[None, :]
    tl.store(out, (dk * scale).to(DK.dtype.element_ty), mask=keep_j[:, None] & (d < DIM)[None, :])
    out = DV + sequence * v_batch + head * VALUE_DIM + j.to(tl.int64)[:, None] * v_time + c[None, :]
    tl.store(out, dv.to(DV.dtype.element_ty), mask=keep_j[:, None] & (c < VALUE_DIM)[None, :])
    if DKEY_BIAS is not None:
        at = DKEY_BIAS + sequence * s_batch + head * s_head + j
        tl.store(at, dbias.to(DKEY_BIAS.dtype.element_ty), mask=keep_j & (tl.program_id(1) == 0))


@triton.jit(
    do_not_specialize=[*SIZES, "first_block", "count", "piece", "lowest", "low", "high", "each", "groups"],
    do_not_specialize_on_alignment=["BIASES"],
)
def positions_kernel(
    DS, Q, W, GATE, PARTS, BIASES, BOUNDS, PIECES, frames, keys, chunk, left, right, first_block, count, piece, lowest,
    low, high, each, groups, batch, blocks, heads, q_time, q_batch, p_row, p_head, ds_row, scale, DIM: tl.constexpr,
    WINDOW: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Writes dS'^T (q + w), or with ADDS PARTS + dS'^T (q + w), of WIDE blocks of offsets and one of channels, over the
    ``count`` blocks of queries that DS holds of each sequence of a group of ``each``. With PIECES a group is a share of
    the piece's blocks of one sequence: one row has too few programs otherwise. PARTS is (groups, high - low, heads,
    DIM) in the order of its strides p_row and p_head, for the offsets from ``low`` to ``high``, or None. Programs of
    the first block of channels also write dS'^T g to BIASES, which is (groups, high - low, heads) or None. Offsets r =
    T + t BLOCK + c are block t + b + 1 of the rows of block b, counted from key 0; the first program begins with t =
    ``lowest``.
    """
    sizes = frames, keys, chunk, left, right, BOUNDS
    head, group, number = place(tl.program_id(0), blocks, groups)
    lanes = tl.arange(0, BLOCK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = lowest + number * WIDE
    wide = tl.arange(0, WIDE * BLOCK)
    Q += head * DIM
    if W is not None:
        W += head * DIM
    PRECISE: tl.constexpr = DS.dtype.element_ty == tl.float32
    dr = tl.zeros([WIDE * BLOCK, BLOCK_D], tl.float32)
    db = tl.zeros([WIDE * BLOCK], tl.float64 if PRECISE else tl.float32)
    begin, end = first_block, first_block + count
    if PIECES is None:
        first_sequence = group * each
        sequences = tl.minimum(batch - first_sequence, each).to(tl.int32)
    else:
        first_rows, end_rows = blocks_of(PIECES, piece, tl.cdiv(count, EACH))
        first_block, end = first_rows * EACH, end_rows * EACH
        first_sequence, sequences = group % batch, 1
        each = tl.cdiv(end - first_block, groups // batch)
        begin = first_block + (group // batch).to(tl.int32) * each
        end = tl.minimum(end, begin + each)
        if begin >= end:
            return
    begin, end = tl.maximum(-t - WIDE, begin), tl.minimum(tl.cdiv(keys, BLOCK) - t, end)
    met = end - begin
    for n in range(0, tl.maximum(met, 0) * sequences):
        sequence, block = first_sequence, begin + n
        if PIECES is None:
            sequence, block = first_sequence + n // met, begin + n % met
        i = block * BLOCK + lanes
        column = (t + block + 1) * BLOCK + wide
        if PIECES is None:
            rows = (block - first_block) * BLOCK + lanes
            rows = ((head * batch + sequence) * tl.cdiv(count, EACH) * EACH * BLOCK + rows) * ds_row
            first, behind = _keys_of_rows(block, sizes, BLOCK, EACH, WINDOW)
            behind = (tl.cdiv(behind, BLOCK) + 1) * BLOCK  # in whole blocks
        else:
            first, row_size, at = rows_of(PIECES, block // EACH, first_rows, tl.cdiv(count, EACH), BLOCK)
            rows = (head * batch + sequence) * ds_row + at + (block % EACH * BLOCK + lanes) * row_size
            behind = first + row_size
        inside = (column >= first) & (column < behind)
        ds = tl.load(DS + rows[:, None] + (column - first)[None, :], mask=inside[None, :], other=0.0)
        if PARTS is not None:
            p = load_rows_from(
                Q + sequence * q_batch, block * BLOCK, q_time, d, i < frames, DIM, W
            )  # [BLOCK, BLOCK_D]
            dr = tl.dot(tl.trans(ds), p, dr)
        if BIASES is not None:
            gated = ds.to(tl.float32)
            if GATE is not None:
                gated *= gates(GATE, sequence * frames, head, heads, i, i < frames)[:, None]
            db += sums(gated, 0, PRECISE)
    r = frames + t * BLOCK + wide
    keep_r = (r >= low) & (r < high)
    if PARTS is not None:
        out = PARTS + group * (high - low) * heads * DIM + head * p_head
        out += (r - low).to(tl.int64)[:, None] * p_row + d[None, :]
        whole = keep_r[:, None] & (d < DIM)[None, :]
        found = (dr * scale).to(PARTS.dtype.element_ty)
        if ADDS:
            found += tl.load(out, mask=whole, other=0.0)
        tl.store(out, found, mask=whole)
    if BIASES is not None:
        out = BIASES + (group * (high - low) + r - low) * heads + head
        tl.store(out, db.to(BIASES.dtype.element_ty), mask=keep_r & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=SIZES)
def edges_kernel(
    Q, POS, W, EDGES, frames, batch, blocks, heads, q_time, q_batch, side, r_time, r_head, before, behind,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the products of q + w and the first and the last row of R, of a block of queries."""
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    head, sequence, block = place(tl.program_id(0), blocks, batch)
    i = block * BLOCK + tl.arange(0, BLOCK)
    Q += sequence * q_batch + head * DIM
    POS += head * r_head
    if W is not None:
        W += head * DIM
    first = tl.zeros([BLOCK], tl.float64 if PRECISE else tl.float32)
    last = first
    for start in range(0, DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        p = load_rows(Q, i, q_time, d, i < frames, DIM, W).to(tl.float32)  # [BLOCK, BLOCK_D]
        row = tl.load(POS + d, mask=d < DIM, other=0.0).to(tl.float32)
        first += sums(p * row[None, :], 1, PRECISE)
        row = tl.load(POS + (before + behind).to(tl.int64) * r_time + d, mask=d < DIM, other=0.0).to(
            tl.float32
        )
        last += sums(p * row[None, :], 1, PRECISE)
    out = EDGES + (sequence * heads + head) * frames + i
    tl.store(out, first.to(tl.float32), mask=i < frames)
    tl.store(out + side, last.to(tl.float32), mask=i < frames)


@triton.jit(do_not_specialize=["parts"])
def biases_kernel(PARTS, DU, DW, parts, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds a block of columns of the two tables of ``parts`` rows. There are no sums where DU or DW is None."""
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
        if DU is not None:
            tl.store(DU + c, total.to(DU.dtype.element_ty), mask=keep_c)
    else:
        if DW is not None:
            tl.store(DW + c, total.to(DW.dtype.element_ty), mask=keep_c)
