# SPDX-License-Identifier: Apache-2.0
"""Attention weights with relative positions, materialised; scores stay in registers.

    s[i, j] = q[i] . k[j] + p[i] . R[T - 1 - i + j], masked scores -1000, W = softmax_j(s)
    With g = dW, delta = sum_j W g: dS = W (g - delta), 0 where masked, + penalty sign(s) where |s| > limit;
    dq = dS k, dk = dS^T q, dp[i] = sum_j dS R[T - 1 - i + j], dR[r] = sum of p[i] dS[i, j] over r = T - 1 - i + j

Per score, of e bytes, for a head and sequence of T queries and S keys:

    kernel      program              reads, writes    does
    forward     BLOCK_M queries      -, e             scores twice (once where S <= WHOLE), softmax
    queries     BLOCK_M queries      4 e, e           delta; dS, dq and dp (some of W and g again from the cache)
    keys        BLOCK_N keys         e, -             dk
    positions   a tile of offsets    e, -             dR of one head and sequence, the sums of diagonals of dS
    add_parts   1024 numbers         -                dR over the sequences, where they share R

delta is divided by sum_j W, which rounding moves from 1: rows of dS then add up to zero as nearly as float32 allows,
however W was rounded, and a part common to all keys cancels in dq. Rows of W and dS start at multiples of 16
elements. Keys outside the chunk window of a block are skipped, unless a row sees nothing above -896, where the
masked keys would weigh more than 0. What a program does depends on the shape alone: results repeat bit for bit,
without atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import exp_difference
from fastasr.kernels._attention_tiles import NONE, load_rows, mask_stride, running, sums
from fastasr.kernels._launch import as_bytes, cdiv, dot_options, generation, launch, next_power_of_2, rounded
from fastasr.kernels._parts import add_tables
from fastasr.kernels._rel_position_tiles import (
    any_alone,
    dealt,
    head_block,
    in_reach,
    keys_reached,
    keys_seen,
    load_positions,
    masked_slopes,
    operands,
    position_scores,
    positions_of,
    query_key,
    rows_of_positions,
    scores_of,
    settled,
    window,
)
from fastasr.kernels._special import reciprocal
from fastasr.kernels._vectors import begun, load, vector
from fastasr.kernels._zipformer_attention import (
    SIZES,
    UNALIGNED,
    add_positions,
    offsets_of,
    position_tile,
    positions_kernel,
    row_size,
    whole_positions,
)


# --------------------------------------------------------------------------- forward
@triton.jit
def _statistics(
    query, Q, P, K, R, masks, top, p0, p1, p2, p3, begin, end, frames, keys, offsets, q_time, k_time,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Returns the maximum of the scores of keys [begin, end), and the sum of their exponentials."""
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], SUM)
    for start in range(begin, end, BLOCK_N):
        scores = scores_of(
            query, Q, P, K, R, masks, top, start, p0, p1, p2, p3,
            frames, keys, offsets, q_time, k_time, DIM, POS_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        maximum, factor, e = running(maximum, scores, PRECISE)
        total = total * factor + sums(e, 1, PRECISE)
    return maximum, total


@triton.jit
def _divided(e, total, PRECISE: tl.constexpr):
    if PRECISE:
        quotient = tl.div_rn(e, tl.broadcast_to(total.to(tl.float32)[:, None], e.shape))
    else:
        quotient = e * reciprocal(total)[:, None]
    return quotient


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    X, K, R, PADDING, MASK, BOUNDS, W,
    frames, keys, left, batch, blocks, heads, offsets, chunk, left_chunks,
    x_time, x_batch, k_time, k_batch, r_batch, mask_batch, w_row,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes W of a block of queries. WHOLE: one block holds all keys."""
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK_M)
    top = block * BLOCK_M
    i = top + tl.arange(0, BLOCK_M)
    keep_i = i < frames
    Q = X + sequence * x_batch + head * DIM
    P = X + sequence * x_batch + 2 * heads * DIM + head * POS_DIM + i.to(tl.int64) * x_time
    K += sequence * k_batch + head * DIM
    R = positions_of(R, sequence, r_batch, head, offsets, POS_DIM, PACKED)
    if PADDING is not None:
        PADDING += sequence * keys
    if MASK is not None:
        MASK += sequence * mask_batch
    W += ((head * batch + sequence) * frames + i)[:, None] * w_row
    query = tl.zeros([BLOCK_M, BLOCK_D], X.dtype.element_ty)
    if DIM <= BLOCK_D:
        query = load_rows(Q, i, x_time, tl.arange(0, BLOCK_D), keep_i, DIM)
    p0, p1, p2, p3 = load_positions(P, keep_i, PACKED)
    masks = (PADDING, MASK, BOUNDS)
    masks += window(i, frames, left, keys, offsets, chunk, left_chunks, BOUNDS, WINDOW)
    begin, end = keys_seen(masks, keys, BLOCK_N, WINDOW)
    if WHOLE:
        j = tl.arange(0, BLOCK_N)
        scores = scores_of(
            query, Q, P, K, R, masks, top, 0, p0, p1, p2, p3, frames, keys, offsets, x_time, k_time,
            DIM, POS_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        highest, one = settled(tl.max(scores, axis=1), tl.zeros([BLOCK_M], tl.float32), masks)
        e = exp_difference(scores, highest[:, None], PRECISE)
        w = _divided(e, sums(e, 1, PRECISE) + one, PRECISE)
        tl.store(W + j[None, :], w.to(W.dtype.element_ty), mask=keep_i[:, None] & (j < w_row)[None, :])
    else:
        maximum, total = _statistics(
            query, Q, P, K, R, masks, top, p0, p1, p2, p3, begin, end,
            frames, keys, offsets, x_time, k_time, DIM, POS_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D, PRECISE,
        )  # fmt: skip
        if WINDOW:  # noqa: SIM102, the inner condition is known on the device alone
            # masked keys weigh something, so all are needed
            if any_alone(maximum, keep_i, masks):
                begin, end = keys_reached(masks, keys, BLOCK_N)
                maximum, total = _statistics(
                    query, Q, P, K, R, masks, top, p0, p1, p2, p3, begin, end,
                    frames, keys, offsets, x_time, k_time, DIM, POS_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D,
                    PRECISE,
                )  # fmt: skip
        maximum, total = settled(maximum, total, masks)
        for start in range(begin, end, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            scores = scores_of(
                query, Q, P, K, R, masks, top, start, p0, p1, p2, p3, frames, keys, offsets, x_time, k_time,
                DIM, POS_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            w = _divided(exp_difference(scores, maximum[:, None], PRECISE), total, PRECISE)
            tl.store(W + j[None, :], w.to(W.dtype.element_ty), mask=keep_i[:, None] & (j < w_row)[None, :])
        if WINDOW or BOUNDS is not None:
            zeros = tl.zeros([BLOCK_M, BLOCK_N], W.dtype.element_ty)
            for start in range(0, begin, BLOCK_N):
                tl.store(W + (start + tl.arange(0, BLOCK_N))[None, :], zeros, mask=keep_i[:, None])
            for start in range(tl.cdiv(end, BLOCK_N) * BLOCK_N, w_row, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                tl.store(W + j[None, :], zeros, mask=keep_i[:, None] & (j < w_row)[None, :])


# --------------------------------------------------------------------------- backward
@triton.jit(
    do_not_specialize=[*SIZES, "penalty", "limit"], do_not_specialize_on_alignment=[*UNALIGNED, "ACT"]
)  # fmt: skip
def queries_kernel(
    GRAD, W, X, K, R, PADDING, MASK, BOUNDS, ACT, DX, DS,
    frames, keys, left, batch, blocks, heads, offsets, chunk, left_chunks,
    g_head, g_batch, g_row, w_head, w_batch, w_row, x_time, x_batch, k_time, k_batch, r_batch, mask_batch, ds_row,
    penalty, limit,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, PENALTY: tl.constexpr,
    WIDE_POS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Writes dq of a block of queries and of channels; programs of the first block of channels also store dS and dp,
    which has WIDE_POS channels and is 0 without position scores. Where there is ACT, of two launches the one serves
    whose PENALTY is what ACT says."""
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    if ACT is not None:  # noqa: SIM102, the inner condition is known on the device alone
        if (tl.load(ACT) != 0.0) != PENALTY:
            return
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK_M)
    top = block * BLOCK_M
    i = top + tl.arange(0, BLOCK_M)
    keep_i = i < frames
    once = tl.program_id(1) == 0
    Q = X + sequence * x_batch + head * DIM
    P = X + sequence * x_batch + 2 * heads * DIM + head * POS_DIM + i.to(tl.int64) * x_time
    K += sequence * k_batch + head * DIM
    R = positions_of(R, sequence, r_batch, head, offsets, POS_DIM, PACKED)
    if PADDING is not None:
        PADDING += sequence * keys
    if MASK is not None:
        MASK += sequence * mask_batch
    GRAD += head * g_head + sequence * g_batch + i.to(tl.int64)[:, None] * g_row
    W += head * w_head + sequence * w_batch + i.to(tl.int64)[:, None] * w_row
    DS += ((head * batch + sequence) * frames + i)[:, None] * ds_row
    masks = (PADDING, MASK, BOUNDS)
    masks += window(i, frames, left, keys, offsets, chunk, left_chunks, BOUNDS, WINDOW)
    begin, end = keys_reached(masks, keys, BLOCK_N)
    if WINDOW and not PENALTY:  # outside the window W is 0, unless a row sees nothing above -896
        first, last = keys_seen(masks, keys, 1, WINDOW)
        if BOUNDS is None:
            before = tl.load(W + 0 * i[:, None], mask=keep_i[:, None] & (first > 0), other=0.0)
            behind = tl.load(W + keys - 1 + 0 * i[:, None], mask=keep_i[:, None] & (last < keys), other=0.0)
        else:
            low, high, own, own_end = masks[3], masks[4], masks[5], masks[6]
            before = tl.load(W + low[:, None], mask=(keep_i & (low < own))[:, None], other=0.0)
            behind = tl.load(W + high[:, None] - 1, mask=(keep_i & (own_end < high))[:, None], other=0.0)
        if (tl.max(before.to(tl.float32)) == 0.0) & (tl.max(behind.to(tl.float32)) == 0.0):
            begin, end = first // BLOCK_N * BLOCK_N, last
    whole = end // BLOCK_N * BLOCK_N
    rows = keep_i[:, None]

    weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    along = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if whole < end:
        j = whole + tl.arange(0, BLOCK_N)[None, :]
        w = load(W + j, rows & (j < keys))
        weight += w
        along = tl.fma(w, load(GRAD + j, rows & (j < keys)), along)
    # From the end on: the cache has more of what was read last, and the second reading begins with that.
    for back in tl.range(BLOCK_N, whole - begin + BLOCK_N, BLOCK_N, loop_unroll_factor=2):
        j = whole - back + tl.arange(0, BLOCK_N)[None, :]
        w = load(W + j, rows)
        weight += w
        along = tl.fma(w, load(GRAD + j, rows), along)
    total = sums(weight, 1, PRECISE)
    delta = (sums(along, 1, PRECISE) / tl.where(total == 0.0, 1.0, total)).to(tl.float32)

    query = tl.zeros([BLOCK_M, BLOCK_D], X.dtype.element_ty)
    if PENALTY and DIM <= BLOCK_D:
        query = load_rows(Q, i, x_time, tl.arange(0, BLOCK_D), keep_i, DIM)
    p0, p1, p2, p3 = load_positions(P, keep_i, PACKED and PENALTY)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dp = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    part = tl.zeros([BLOCK_M, 8 if AXIS == 1 else BLOCK_N // 8], tl.float32)
    parts = part, part, part, part
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keep_j = j < keys
        keep = rows & begun(j, keys, VECTOR)[None, :]
        w, g = load(W + j[None, :], keep), load(GRAD + j[None, :], keep)
        ds = w * (g - delta[:, None])
        ds = masked_slopes(ds, i, start, masks, frames, keys, WINDOW, BLOCK_N)
        if PADDING is None and BOUNDS is None:  # their masks hide what is behind the last key
            ds = tl.where(keep_j[None, :], ds, 0.0)
        at = rows_of_positions(R, top, start, frames, offsets, BOUNDS, BLOCK_M, BLOCK_N)
        if PENALTY:
            s = query_key(query, Q, i, x_time, keep_i, K, j, k_time, keep_j, DIM, BLOCK_D, BLOCK_M, BLOCK_N)
            s = position_scores(
                s, P[:, None], rows, p0[:, None], p1[:, None], p2[:, None], p3[:, None], at, offsets,
                POS_DIM, PACKED, X.dtype.element_ty,
            )  # fmt: skip
            large = tl.where(s > limit, penalty, tl.where(s < -limit, -penalty, 0.0))
            if BOUNDS is not None:
                large = tl.where(in_reach(j, masks), large, 0.0)
            ds += tl.where(rows & keep_j[None, :], large, 0.0)
        key = load_rows(K, j, k_time, d, keep_j, DIM)  # [BLOCK_N, BLOCK_D]
        narrow = ds.to(key.dtype)
        dq = tl.dot(narrow, key, dq)
        if POS_DIM > 0:
            dp, parts = add_positions(
                dp, parts, ds, at, offsets, AXIS, BLOCK_P, POS_DIM, PACKED, X.dtype.element_ty
            )
        tl.store(DS + j[None, :], narrow, mask=rows & (j < ds_row)[None, :] & once)
    if (WINDOW and not PENALTY) or BOUNDS is not None:
        zeros = tl.zeros([BLOCK_M, BLOCK_N], DS.dtype.element_ty)
        for start in range(0, begin, BLOCK_N):
            tl.store(DS + (start + tl.arange(0, BLOCK_N))[None, :], zeros, mask=rows & once)
        for start in range(tl.cdiv(end, BLOCK_N) * BLOCK_N, ds_row, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)[None, :]
            tl.store(DS + j, zeros, mask=rows & (j < ds_row) & once)
    DX += sequence * x_batch + i.to(tl.int64)[:, None] * x_time
    tl.store(DX + head * DIM + d[None, :], dq.to(DX.dtype.element_ty), mask=rows & (d < DIM)[None, :])
    c = tl.arange(0, BLOCK_P)[None, :]
    out = DX + 2 * heads * DIM + head * WIDE_POS + c
    dp = whole_positions(dp, parts, BLOCK_P, PACKED)
    tl.store(out, dp.to(DX.dtype.element_ty), mask=rows & (c < WIDE_POS) & once)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["ACT"])
def keys_kernel(
    DS, X, BOUNDS, ACT, DK,
    frames, keys, left, batch, blocks, offsets, chunk, left_chunks, ds_row, x_time, x_batch, k_time, k_batch,
    DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dS^T q of a block of keys and of channels. WINDOW: dS is 0 outside it, unless ACT is not."""
    program = tl.program_id(0)
    if BOUNDS is None:  # the cache has more of what the last programs of ``queries`` wrote
        program = tl.num_programs(0) - 1 - program
    head, sequence, block = dealt(program, blocks, batch, BOUNDS, frames, BLOCK_N)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    X += sequence * x_batch + head * DIM
    DS += (head * batch + sequence) * frames * ds_row
    begin, end = 0, frames
    if BOUNDS is not None:  # keys see the queries that see them, but for chunks
        masks = (None, None, BOUNDS)
        masks += window(j, frames, left, keys, offsets, chunk, left_chunks, BOUNDS, False)
        begin, end = keys_reached(masks, keys, BLOCK_M)
    elif WINDOW:
        begin, end = seeing(block * BLOCK_N, BLOCK_N, frames, left, chunk, left_chunks)
        begin = begin // BLOCK_M * BLOCK_M
        if ACT is not None:
            whole = tl.load(ACT) != 0.0
            begin, end = tl.where(whole, 0, begin), tl.where(whole, frames, end)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        keep_i = i < frames
        ds = load_rows(DS, i, ds_row, j, keep_i, ds_row)  # [BLOCK_M, BLOCK_N]
        query = load_rows(X, i, x_time, d, keep_i, DIM)  # [BLOCK_M, BLOCK_D]
        dk = tl.dot(tl.trans(ds), query, dk)
    out = DK + sequence * k_batch + head * DIM + j.to(tl.int64)[:, None] * k_time + d[None, :]
    tl.store(out, dk.to(DK.dtype.element_ty), mask=(j < keys)[:, None] & (d < DIM)[None, :])


@triton.jit
def seeing(first_key, count, frames, left, chunk, left_chunks):
    """Returns [first, end) of the frames that may see ``count`` keys from ``first_key`` on."""
    first = tl.maximum(first_key - left, 0) // chunk * chunk
    last = tl.maximum(first_key + count - 1 - left, 0) // chunk
    end = tl.where(left_chunks < 0, frames, tl.minimum((last + left_chunks + 1) * chunk, frames))
    return tl.minimum(first, frames), end


# --------------------------------------------------------------------------- launchers
def tiles(
    keys: int,
    dim: int,
    pos_dim: int,
    dtype: torch.dtype,
    generation: int,
    hiding: bool = False,
    penalty: bool = False,
) -> dict[str, dict]:
    """Returns tile shapes, warps and stages by kernel; ``hiding`` says whether there is a chunk window or a mask of
    pairs, or on capability 10.0 recordings in a row.

    The tiles are the largest that do not spill (tests/kernels/budgets.toml). Products of float32 run without tensor
    cores unless TF32 is allowed, and need small tiles.
    """
    wide = dtype == torch.float32
    block_d, block_p = head_block(dim, dtype), max(16, next_power_of_2(max(1, pos_dim)))
    rows = 16 if wide else 64
    forward = {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 8 if hiding else 4, "WHOLE": False}
    if keys <= (64 if wide else 512):
        block_n = max(64, next_power_of_2(keys))
        forward = {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": 4 if block_n <= 256 else 8, "WHOLE": True}
    # Threads add up keys that they have: neighbours of W, or with a penalty every eighth pair, as products have them.
    queries = {
        "AXIS": 2,
        "BLOCK_M": 16 if wide else 32,
        "BLOCK_N": 64,
        "num_warps": 8 if wide and not rounded(dtype) else 4,
    }
    if penalty and not wide:  # eight warps would compute a product of 64 x 32 twice, but on capability 10.0
        queries |= {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8 if generation == 100 else 4}
        queries["AXIS"] = 2 if generation == 100 else 1
    inner = {"BLOCK_M": 32 if wide else 64, "num_warps": 4, "num_stages": 3}
    shapes = {
        "forward": forward | {"BLOCK_D": block_d, "num_stages": 2},
        "queries": queries | {"BLOCK_D": block_d, "BLOCK_P": block_p, "num_stages": 2},
        "keys": inner | {"BLOCK_N": 64, "BLOCK_D": block_d},
        "positions": position_tile(pos_dim, dtype, 32 if wide else 64),
    }
    return {name: shape | dot_options(dtype) for name, shape in shapes.items()}


def zipformer_attention_weights_forward(
    x: torch.Tensor,
    pos: torch.Tensor | None,
    cached_key: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    heads: int,
    dim: int,
    chunk: int,
    left_chunks: int,
) -> torch.Tensor:
    """Returns W (heads, batch, frames, keys) with rows a multiple of ROW elements apart. All tensors are
    contiguous.
    """
    frames, batch, _ = x.shape
    keys = frames + (0 if cached_key is None else cached_key.shape[0])
    row = row_size(keys)
    weights = x.new_empty(heads * batch * frames * row)  # changed in place so that it is no view
    weights.as_strided_((heads, batch, frames, keys), (batch * frames * row, frames * row, row, 1))
    if not weights.numel():
        return weights
    o = operands(x, pos, cached_key, starts, heads, dim, chunk, left_chunks)
    hiding = chunk > 0 or attn_mask is not None or (starts is not None and generation(x) == 100)
    tile = tiles(keys, dim, o.pos_dim, x.dtype, generation(x), hiding)["forward"]
    blocks = cdiv(frames, tile["BLOCK_M"])
    launch(forward_kernel, (o.pairs * blocks,),
        x, o.key, o.r, as_bytes(key_padding_mask), as_bytes(attn_mask), o.bounds, weights,
        frames, keys, o.left, batch, blocks, heads, o.offsets, o.chunk, o.left_chunks,
        x.stride(0), x.stride(1), o.key.stride(0), o.key.stride(1), o.r_batch, mask_stride(attn_mask), row,
        **o.constants, **tile,
    )  # fmt: skip
    return weights


def zipformer_attention_weights_backward(
    grad: torch.Tensor,
    weights: torch.Tensor,
    x: torch.Tensor,
    pos: torch.Tensor | None,
    cached_key: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    heads: int,
    dim: int,
    chunk: int,
    left_chunks: int,
    penalty: float,
    limit: float,
    act: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dpos, dcached_key), without elements where the argument is None. Rows of grad and weights are dense,
    the other tensors contiguous.

    act: one number; if it is 0, there is no penalty.
    """
    frames, batch, width = x.shape
    none = x.new_empty(0)
    if not grad.numel():
        zeros = (none if t is None else torch.zeros_like(t) for t in (x, pos, cached_key))
        return tuple(zeros)
    o = operands(x, pos, cached_key, starts, heads, dim, chunk, left_chunks)
    own_pos = width // heads - 2 * dim
    sizes = o.keys, dim, own_pos, x.dtype, generation(x)
    dx = torch.empty_like(x)
    row = row_size(o.keys)
    ds = x.new_empty(o.pairs * frames * row)

    for penalised in (penalty != 0.0,) if act is None else (False, True):
        shapes = tiles(*sizes, penalty=penalised)
        tile = shapes["queries"]
        columns = cdiv(dim, tile["BLOCK_D"])
        blocks = cdiv(frames, tile["BLOCK_M"])
        launch(queries_kernel, (o.pairs * blocks, columns),
            grad, weights, x, o.key, o.r, as_bytes(key_padding_mask), as_bytes(attn_mask), o.bounds, act, dx, ds,
            frames, o.keys, o.left, batch, blocks, heads, o.offsets, o.chunk, o.left_chunks,
            *grad.stride()[:3], *weights.stride()[:3],
            x.stride(0), x.stride(1), o.key.stride(0), o.key.stride(1), o.r_batch, mask_stride(attn_mask), row,
            float(penalty), float(limit),
            **o.constants, PENALTY=penalised, WIDE_POS=own_pos, VECTOR=vector(grad, weights), **tile,
        )  # fmt: skip

    tile = shapes["keys"]
    dkey = torch.empty_like(o.key) if o.left else dx[..., heads * dim : 2 * heads * dim]
    blocks = cdiv(o.keys, tile["BLOCK_N"])
    window = o.chunk > 0 and (act is not None or not penalty)
    launch(keys_kernel, (o.pairs * blocks, columns),
        ds, x, o.bounds, act if window else None, dkey,
        frames, o.keys, o.left, batch, blocks, o.offsets, o.chunk, o.left_chunks, row,
        x.stride(0), x.stride(1), dkey.stride(0), dkey.stride(1), DIM=dim, WINDOW=window, **tile,
    )  # fmt: skip
    dcached = none if cached_key is None else torch.empty_like(cached_key)
    if o.left:
        dcached.copy_(dkey[: o.left])
        dx[..., heads * dim : 2 * heads * dim].copy_(dkey[o.left :])

    if o.pos_dim:
        dpos = position_gradients(ds, row, x, o, pos.shape[0], shapes["positions"])
    else:
        dpos = none if pos is None else torch.zeros_like(pos)
    return dx, dpos, dcached


def position_gradients(
    ds: torch.Tensor, row: int, x: torch.Tensor, o, sequences: int, tile: dict
) -> torch.Tensor:
    """Returns dR, (sequences, offsets, heads * pos_dim); sequences is 1 or the batch."""
    shared = sequences < o.batch
    parts_dtype = x.dtype if not shared else torch.float64 if x.dtype == torch.float32 else torch.float32
    parts = torch.empty(o.batch, o.offsets, o.heads * o.pos_dim, dtype=parts_dtype, device=x.device)
    blocks = cdiv(o.offsets, offsets_of(tile))
    launch(positions_kernel, (o.pairs * blocks,),
        ds, x, None, parts, o.center, o.keys, 0, o.frames, 0, None, None, None, o.batch, blocks,
        o.heads, o.offsets, row, x.stride(0), x.stride(1), DIM=o.dim, POS_DIM=o.pos_dim, ADD=False, COLUMNS=1, **tile,
    )  # fmt: skip
    if not shared:
        return parts
    dpos = x.new_empty(1, *parts.shape[1:])
    add_tables(parts, dpos, o.batch)
    return dpos
