# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of zipformer_attention, see zipformer_attention.py."""

import triton
import triton.language as tl

from fastasr.kernels._activation import exp_difference
from fastasr.kernels._attention_tiles import delta_of_values, load_rows, slopes_of, sums
from fastasr.kernels._recordings import blocks_of, rows_of
from fastasr.kernels._rel_position_tiles import (
    ALONE,
    any_alone,
    dealt,
    keys_reached,
    keys_seen,
    load_positions,
    masked_scores,
    masked_slopes,
    penalties,
    positions_of,
    raw_scores,
    rows_of_positions,
    scores_of,
    window,
)
from fastasr.kernels._zipformer_attention import SIZES, UNALIGNED, add_positions, whole_positions


@triton.jit
def has_weight(w, ELEMENT: tl.constexpr):
    """Says where weights, rounded to ELEMENT, are not 0."""
    return w.to(ELEMENT).to(tl.float32) > 0.0


@triton.jit
def _delta_of_keys(
    query, Q, P, K, R, masks, g, G, V, top, p0, p1, p2, p3, maximum, begin, end,
    frames, keys, offsets, q_time, k_time, v_time,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns delta of float32 from a sweep over the keys [begin, end)."""
    total = tl.zeros([BLOCK_M], tl.float64)
    along = tl.zeros([BLOCK_M], tl.float64)
    i = top + tl.arange(0, BLOCK_M)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        scores = scores_of(
            query, Q, P, K, R, masks, top, start, p0, p1, p2, p3, frames, keys, offsets, q_time, k_time,
            DIM, POS_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        slope = slopes_of(g, G, V, i, j, i < frames, j < keys, v_time, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_V)
        e = exp_difference(scores, maximum[:, None], True)
        total += sums(e, 1, True)
        along += sums(e * slope, 1, True)
    return (along / tl.where(total == 0.0, 1.0, total)).to(tl.float32)


@triton.jit
def _acting(penalty, ACT):
    """Returns the penalty, 0 where it does not act."""
    if ACT is not None:
        penalty = tl.where(tl.load(ACT) != 0, penalty, 0.0)
    return penalty


@triton.jit(
    do_not_specialize=[*SIZES, "first", "rows", "piece", "penalty", "limit"],
    do_not_specialize_on_alignment=[*UNALIGNED, "ACT", "EQUAL", "INVERSE", "WEIGHT"],
)
def queries_kernel(
    G, Y, REMAINDER, X, K, R, PADDING, MASK, BOUNDS, PIECES, ACT, EQUAL, V, DX, DS, MAXIMUM, INVERSE, WEIGHT, DELTA,
    frames, keys, left, first, rows, piece, batch, blocks, heads, offsets, chunk, left_chunks,
    x_time, x_batch, k_time, k_batch, v_time, v_batch, r_batch, mask_batch, ds_row, penalty, limit,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    WIDE_POS: tl.constexpr, OTHERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Writes dq of a block of the queries [first, first + rows) and of channels; programs of the first block of
    channels also store delta of the rows, dS where DS is not None, dp, and with OTHERS the zeros of heads without
    values. With PIECES of _recordings.py DS holds one of these, number ``piece``. Equal weights are stored in place of
    delta. What an absent tensor would need is None too: ``piece``, and ``penalty`` and ``limit`` without a penalty."""
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK_M)
    first_block = 0
    if PIECES is not None:
        first_block, end_block = blocks_of(PIECES, piece, blocks)
        if (block < first_block) | (block >= end_block):
            return
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    top = first + block * BLOCK_M
    i = first + local
    keep_i = local < rows
    once = tl.program_id(1) == 0
    Q = X + sequence * x_batch + head * DIM
    P = X + sequence * x_batch + 2 * heads * DIM + head * POS_DIM + i.to(tl.int64) * x_time
    K += sequence * k_batch + head * DIM
    G += sequence * v_batch + head * VALUE_DIM
    Y += sequence * v_batch + head * VALUE_DIM
    V += sequence * v_batch + head * VALUE_DIM
    if REMAINDER is not None:
        REMAINDER += sequence * v_batch + head * VALUE_DIM
    R = positions_of(R, sequence, r_batch, head, offsets, POS_DIM, PACKED)
    if PADDING is not None:
        PADDING += sequence * keys
    if MASK is not None:
        MASK += sequence * mask_batch
    query = tl.zeros([BLOCK_M, BLOCK_D], X.dtype.element_ty)
    if DIM <= BLOCK_D:
        query = load_rows(Q, i, x_time, tl.arange(0, BLOCK_D), keep_i, DIM)
    g = tl.zeros([BLOCK_M, BLOCK_V], X.dtype.element_ty)
    if VALUE_DIM <= BLOCK_V:
        g = load_rows(G, i, v_time, tl.arange(0, BLOCK_V), keep_i, VALUE_DIM)
    p0, p1, p2, p3 = load_positions(P, keep_i, PACKED)
    masks = (PADDING, MASK, BOUNDS)
    masks += window(i, frames, left, keys, offsets, chunk, left_chunks, BOUNDS, WINDOW)
    begin, end = keys_seen(masks, keys, BLOCK_N, WINDOW)
    row = (head * batch + sequence) * frames + i
    maximum = tl.load(MAXIMUM + row, mask=keep_i, other=0.0)
    inverse = tl.load(INVERSE + row, mask=keep_i, other=0.0)
    if WINDOW:  # noqa: SIM102, the inner condition is known on the device alone
        if any_alone(maximum, keep_i, masks):  # masked keys weigh something, so all are needed
            begin, end = keys_reached(masks, keys, BLOCK_N)
    if PRECISE:
        delta = _delta_of_keys(
            query, Q, P, K, R, masks, g, G, V, top, p0, p1, p2, p3, maximum, begin, end,
            frames, keys, offsets, x_time, k_time, v_time,
            DIM, POS_DIM, VALUE_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    else:
        delta = delta_of_values(G, Y, REMAINDER, i, v_time, keep_i, VALUE_DIM, BLOCK_M, BLOCK_V)
    if EQUAL is not None:
        weight = tl.load(WEIGHT + row, mask=keep_i, other=0.0)
        delta = tl.where(tl.load(EQUAL) != 0, weight, delta)
    tl.store(DELTA + row, delta, mask=keep_i & once)
    if penalty is not None:
        penalty = _acting(penalty, ACT)
        if WINDOW:  # it reaches masked scores too
            all_begin, all_end = keys_reached(masks, keys, BLOCK_N)
            begin, end = tl.where(penalty != 0.0, all_begin, begin), tl.where(penalty != 0.0, all_end, end)

    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dp = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    part = tl.zeros([BLOCK_M, 8], tl.float32)
    parts = part, part, part, part
    if DS is not None:
        if PIECES is None:
            DS += ((head * batch + sequence) * rows + local)[:, None] * ds_row
        else:
            first_key, size, before = rows_of(PIECES, block, first_block, blocks, BLOCK_N)
            DS += (
                (head * batch + sequence) * ds_row
                + before
                + (tl.arange(0, BLOCK_M) * size)[:, None]
                - first_key
            )
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keep_j = j < keys
        raw = raw_scores(
            query, Q, P, K, R, masks, top, start, p0, p1, p2, p3, frames, keys, offsets, x_time, k_time,
            DIM, POS_DIM, PACKED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        scores = masked_scores(raw, i, start, masks, frames, keys, WINDOW, BLOCK_N)
        slope = slopes_of(g, G, V, i, j, keep_i, keep_j, v_time, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_V)
        w = exp_difference(scores, maximum[:, None], PRECISE) * inverse[:, None]
        ds = masked_slopes(w * (slope - delta[:, None]), i, start, masks, frames, keys, WINDOW, BLOCK_N)
        if EQUAL is not None:
            ds = tl.where(tl.load(EQUAL) != 0, 0.0, ds)
        if penalty is not None:
            ds += penalties(raw, i, j, masks, frames, keys, penalty, limit)
        key = load_rows(K, j, k_time, d, keep_j, DIM)  # [BLOCK_N, BLOCK_D]
        narrow = ds.to(key.dtype)
        dq = tl.dot(narrow, key, dq)
        if POS_DIM > 0:
            at = rows_of_positions(R, top, start, frames, offsets, BOUNDS, BLOCK_M, BLOCK_N)
            dp, parts = add_positions(
                dp, parts, ds, at, offsets, 1, BLOCK_P, POS_DIM, PACKED, X.dtype.element_ty
            )
        if DS is not None:
            if PIECES is None:
                tl.store(DS + j[None, :], narrow, mask=keep_i[:, None] & (j < ds_row)[None, :] & once)
            else:
                tl.store(DS + j[None, :], narrow, mask=keep_i[:, None] & once)
    if WINDOW and DS is not None:
        zeros = tl.zeros([BLOCK_M, BLOCK_N], DS.dtype.element_ty)
        if BOUNDS is None:
            for start in range(0, begin, BLOCK_N):
                tl.store(DS + (start + tl.arange(0, BLOCK_N))[None, :], zeros, mask=keep_i[:, None] & once)
            for start in range(tl.cdiv(end, BLOCK_N) * BLOCK_N, ds_row, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)[None, :]
                tl.store(DS + j, zeros, mask=keep_i[:, None] & (j < ds_row) & once)
        else:
            first_reached, end_reached = keys_reached(masks, keys, BLOCK_N)
            for start in range(first_reached, begin, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                tl.store(DS + j[None, :], zeros, mask=keep_i[:, None] & once)
            for start in range(tl.cdiv(end, BLOCK_N) * BLOCK_N, end_reached, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                tl.store(DS + j[None, :], zeros, mask=keep_i[:, None] & once)
    DX += sequence * x_batch + i.to(tl.int64)[:, None] * x_time
    tl.store(
        DX + head * DIM + d[None, :], dq.to(DX.dtype.element_ty), mask=keep_i[:, None] & (d < DIM)[None, :]
    )
    c = tl.arange(0, BLOCK_P)[None, :]
    out = DX + 2 * heads * DIM + head * WIDE_POS + c
    dp = whole_positions(dp, parts, BLOCK_P, PACKED)
    tl.store(out, dp.to(DX.dtype.element_ty), mask=keep_i[:, None] & (c < WIDE_POS) & once)
    if OTHERS:
        served = tl.num_programs(0) // blocks // batch
        if once & (head == served - 1):
            none = tl.zeros([BLOCK_M, BLOCK_D], DX.dtype.element_ty)
            for start in range(served * DIM, heads * DIM, BLOCK_D):
                at = start + tl.arange(0, BLOCK_D)[None, :]
                tl.store(DX + at, none, mask=keep_i[:, None] & (at < heads * DIM))
                tl.store(DX + heads * DIM + at, none, mask=keep_i[:, None] & (at < heads * DIM))
            for start in range(served * WIDE_POS, heads * WIDE_POS, BLOCK_D):
                at = start + tl.arange(0, BLOCK_D)[None, :]
                tl.store(DX + 2 * heads * DIM + at, none, mask=keep_i[:, None] & (at < heads * WIDE_POS))


@triton.jit(
    do_not_specialize=[*SIZES, "penalty", "limit"],
    do_not_specialize_on_alignment=[*UNALIGNED, "ACT", "EQUAL", "INVERSE"],
)
def keys_kernel(
    G, X, K, R, PADDING, MASK, BOUNDS, ACT, EQUAL, V, MAXIMUM, INVERSE, DELTA, DK, DV,
    frames, keys, left, batch, blocks, heads, offsets, chunk, left_chunks,
    x_time, x_batch, k_time, k_batch, v_time, v_batch, r_batch, mask_batch, penalty, limit,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes dS^T q and W^T G of a block of keys and of their channels; see ``queries``."""
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK_N)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keep_j = j < keys
    Q = X + sequence * x_batch + head * DIM
    X += sequence * x_batch + 2 * heads * DIM + head * POS_DIM
    K += sequence * k_batch + head * DIM
    G += sequence * v_batch + head * VALUE_DIM
    V += sequence * v_batch + head * VALUE_DIM
    row = (head * batch + sequence) * frames
    R = positions_of(R, sequence, r_batch, head, offsets, POS_DIM, PACKED)
    if PADDING is not None:
        PADDING += sequence * keys
    if MASK is not None:
        MASK += sequence * mask_batch
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if penalty is not None:
        penalty = _acting(penalty, ACT)
    begin, end = 0, frames
    if BOUNDS is not None:  # keys see the queries that see them, but for chunks
        own = (PADDING, MASK, BOUNDS)
        own += window(j, frames, left, keys, offsets, chunk, left_chunks, BOUNDS, False)
        begin, end = keys_reached(own, keys, BLOCK_M)
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        keep_i = i < frames
        maximum = tl.load(MAXIMUM + row + i, mask=keep_i, other=float("inf"))  # W is 0 behind the last query
        masks = (PADDING, MASK, BOUNDS)
        masks += window(i, frames, left, keys, offsets, chunk, left_chunks, BOUNDS, WINDOW)
        needed = True  # without a branch, the next tile's rows come while this one is computed
        if WINDOW:  # rows that see nothing above -896 give masked keys weight
            first, last = keys_seen(masks, keys, 1, WINDOW)
            inside = (first < (block + 1) * BLOCK_N) & (last > block * BLOCK_N)
            needed = inside | (tl.min(maximum) <= ALONE)
            if penalty is not None:
                needed = needed | (penalty != 0.0)
        if needed:
            inverse = tl.load(INVERSE + row + i, mask=keep_i, other=0.0)
            delta = tl.load(DELTA + row + i, mask=keep_i, other=0.0)
            P = X + i.to(tl.int64) * x_time
            query = load_rows(Q, i, x_time, tl.arange(0, BLOCK_D), keep_i, DIM)  # [BLOCK_M, BLOCK_D]
            g = load_rows(G, i, v_time, tl.arange(0, BLOCK_V), keep_i, VALUE_DIM)  # [BLOCK_M, BLOCK_V]
            p0, p1, p2, p3 = load_positions(P, keep_i, PACKED)
            raw = raw_scores(
                query, Q, P, K, R, masks, start, block * BLOCK_N, p0, p1, p2, p3, frames, keys, offsets, x_time, k_time,
                DIM, POS_DIM, PACKED, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            scores = masked_scores(raw, i, block * BLOCK_N, masks, frames, keys, WINDOW, BLOCK_N)
            slope = slopes_of(g, G, V, i, j, keep_i, keep_j, v_time, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_V)
            w = exp_difference(scores, maximum[:, None], PRECISE) * inverse[:, None]
            ds = masked_slopes(
                w * (slope - delta[:, None]), i, block * BLOCK_N, masks, frames, keys, WINDOW, BLOCK_N
            )
            if EQUAL is not None:  # delta is 1 / number then
                equal = tl.load(EQUAL) != 0
                w = tl.where(equal, tl.where(has_weight(w, X.dtype.element_ty), delta[:, None], 0.0), w)
                ds = tl.where(equal, 0.0, ds)
            if penalty is not None:
                ds += penalties(raw, i, j, masks, frames, keys, penalty, limit)
            if DIM > BLOCK_D:
                query = load_rows(Q, i, x_time, d, keep_i, DIM)
            if VALUE_DIM > BLOCK_V:
                g = load_rows(G, i, v_time, c, keep_i, VALUE_DIM)
            dk = tl.dot(tl.trans(ds.to(query.dtype)), query, dk)
            dv = tl.dot(tl.trans(w.to(g.dtype)), g, dv)
    out = DK + sequence * k_batch + head * DIM + j.to(tl.int64)[:, None] * k_time + d[None, :]
    tl.store(out, dk.to(DK.dtype.element_ty), mask=keep_j[:, None] & (d < DIM)[None, :])
    out = DV + sequence * v_batch + head * VALUE_DIM + j.to(tl.int64)[:, None] * v_time + c[None, :]
    tl.store(out, dv.to(DV.dtype.element_ty), mask=keep_j[:, None] & (c < VALUE_DIM)[None, :])
