# SPDX-License-Identifier: Apache-2.0
"""Gate, padding mask, depthwise convolution over time (plain or chunk-causal) and SwooshR or SiLU, both passes.

    h (T, B, 2C) = (x, s)      u = x gate(s), by sigmoid or SiLU, 0 at padding and outside [0, T); K taps, P of them on
                               past frames
    plain:         z[t] = b + sum_k w[k] u[t + k - P]
    chunk-causal:  z[t] = b' + sum_(j <= P) v[j] u[t + j - P] + scale (b + sum_k w[k] u[t + k - P], t's chunk alone)
                   scale at position p of a chunk of S: 1 + L[p] (p < K) + R[p - (S - K)] (p >= S - K)
    y = z, SwooshR(z) or SiLU(z).    With q = dy act'(z), r = q scale, e the sum within the chunk:
    du[t] = sum_k w[k] r[t - k + P] (in the chunk) + sum_j v[j] q[t - j + P]
    dw[k] = sum r[t] u[t + k - P] (in the chunk)     dv[j] = sum q[t] u[t + j - P]     dL, dR: sums of q e by position

The first kernel of a pass writes u, after P rows of the cache or of zeros, and the weights as rows of channels, both in
tiles of channels. In the others a thread has groups of at most eight frames, which share each row of u and each tap's
weights from registers (_sliding_taps.py). A group lies in one chunk, so that sums within the chunk mask whole rows.
Where recordings lie one after the other in a sequence, a table says where groups begin, and which recording each is of.
Applying the gate in every tap would cost ten times the arithmetic; two Toeplitz products per channel need channel-major
memory, which h does not have. Launches: forward 2; backward 5 (4 without an activation), 7 in chunk-causal form. Calls
that share their starts share the tables of recordings, of two launches each.

Bytes per element of u, of e bytes: forward 3e and 2e for u; backward 5e, 2e for u and 2e for q (chunk-causal: 6e for
q, r and q e). A 1500x20x192 bf16 tensor at 2.9 TB/s: 20 us forward, 35 us backward. The weights' gradients are
added up in parts that depend on the shape alone, in registers, and the parts in float64: results repeat bit for bit,
without atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels import _sliding_taps as sliding
from fastasr.kernels._launch import as_bytes, cdiv, launch
from fastasr.kernels._recordings import group_at, groups
from fastasr.kernels._special import exp2, reciprocal
from fastasr.kernels._swoosh import exp_minus_abs, swoosh, swoosh_slope
from fastasr.kernels._vectors import load

SWOOSH_R, SILU = tl.constexpr(1), tl.constexpr(2)  # activations; 0: none
SILU_GATE = tl.constexpr(1)  # 0: sigmoid

BLOCK_T, BLOCK_C, NUM_WARPS = 32, sliding.BLOCK_C, 4  # a tile of 16 elements per thread
BATCH = tl.constexpr(4)  # frames whose loads wait for no store
BLOCK_R, EDGE_WARPS = 128, 8  # chunks that a program adds at once
BLOCK_K = 8


@triton.jit
def _logistic(x, SHORT: tl.constexpr):
    """Returns 1 / (1 + exp(-x)); unless SHORT, corrected as in swoosh.py to the error of torch's."""
    e = x * 1.4426950408889634
    u = exp2(-tl.abs(e))
    if not SHORT:
        r = tl.fma(e, -0.6931471805599453, x)
        u = tl.where(u > 1e-20, tl.fma(u, tl.where(x > 0.0, -r, r), u), u)  # r is nan for infinite x
    return tl.where(x > 0.0, 1.0, u) * reciprocal(1.0 + u, not SHORT)


@triton.jit(do_not_specialize=["frames", "batch", "past", "gate_programs"])
def gate_kernel(
    H, MASK, CACHE, WEIGHT, CAUSAL_WEIGHT, CHUNK_SCALE, U, TABLE,
    time_stride, batch_stride, frames, batch, C, taps, past, gate_programs,
    GATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # U, tiles of P + T frames: P of the cache, or zeros, then u. TABLE: rows of w (K), v (P + 1), L (K), R (K).
    pid = tl.program_id(0)
    if pid < gate_programs:
        SHORT: tl.constexpr = U.dtype.element_ty.primitive_bitwidth == 16
        c_tiles = tl.cdiv(C, BLOCK_C)
        row = pid // c_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        tile, lane = pid % c_tiles, tl.arange(0, BLOCK_C)
        c = tile * BLOCK_C + lane
        t, b = row // batch - past, row % batch
        valid = (t >= 0) & (t < frames)
        if MASK is not None:
            valid = valid & (tl.load(MASK + b * frames + t, mask=valid, other=1) == 0)
        keep = valid[:, None] & (c < C)[None, :]
        at = t[:, None].to(tl.int64) * time_stride + b[:, None].to(tl.int64) * batch_stride + c[None, :]
        x = tl.load(H + at, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
        s = tl.load(H + at + C, mask=keep, other=0.0).to(tl.float32)
        gate = _logistic(s, SHORT)
        if GATE == SILU_GATE:
            gate *= s
        u = tl.where(keep, x * gate, 0.0)
        if CACHE is not None:
            cached = (t < 0)[:, None] & (c < C)[None, :]
            before = (b[:, None].to(tl.int64) * C + c[None, :]) * past + past + t[:, None]
            u += tl.load(CACHE + before, mask=cached, other=0.0).to(tl.float32)
        at = sliding.in_tiles(tile, batch, b, past + frames, past + t, lane, BLOCK_C)
        tl.store(U + at, u.to(U.dtype.element_ty), mask=(t < frames)[:, None])
    else:
        tiles = tl.cdiv(taps, BLOCK_K) * tl.cdiv(C, BLOCK_C)
        pid -= gate_programs
        if CAUSAL_WEIGHT is None:
            sliding.lay_out(WEIGHT, TABLE, 0, taps, taps, C, pid, BLOCK_K, BLOCK_C)
        else:
            rows = 4 * taps + 1
            if pid < tiles:
                sliding.lay_out(WEIGHT, TABLE, 0, rows, taps, C, pid, BLOCK_K, BLOCK_C)
            elif pid < 2 * tiles:
                sliding.lay_out(
                    CAUSAL_WEIGHT, TABLE, taps, rows, taps // 2 + 1, C, pid - tiles, BLOCK_K, BLOCK_C
                )
            else:  # L, then R
                pid -= 2 * tiles
                right = pid // tiles
                row = taps + taps // 2 + 1 + right * taps
                sliding.lay_out(
                    CHUNK_SCALE + right * C * taps, TABLE, row, rows, taps, C, pid % tiles, BLOCK_K, BLOCK_C
                )


@triton.jit
def _place(
    GROUPS, groups, batch, frames, C, chunk, before, lead,
    CHUNKED: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Returns (first frames of groups, their chunks' first and end, their recordings' first and end, sequence, tile of
    channels) of this program: tiles vary fastest, then sequences. Without GROUPS, see _recordings.py, the recording is
    the sequence and ``lead`` frames before it.
    """
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    if GROUPS is None:
        b, t, first = sliding.groups(pid // c_tiles, batch, chunk, before, CHUNKED, GROUP, BLOCK_G)
        begin = tl.zeros_like(t) - lead
        end = tl.zeros_like(t) + frames
    else:
        b, block = pid // c_tiles % batch, pid // c_tiles // batch
        t, begin, end = group_at(GROUPS, groups, block * BLOCK_G + tl.arange(0, BLOCK_G), frames)
        first = begin + (t - begin) // chunk * chunk
    last = tl.maximum(tl.minimum(first + chunk, end), first)
    last = tl.where(t < 0, first, last)
    return t, first, last, begin, end, b, pid % c_tiles


@triton.jit
def _row(POINTER, c, C):
    return tl.load(POINTER + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _edge_scale(TABLE, position, lane, size, taps, BLOCK_C: tl.constexpr):
    """Returns the scale of rows at these positions of a chunk of ``size`` frames, [BLOCK_G, BLOCK_C]."""
    left = taps + taps // 2 + 1 + position
    right = left + taps - (size - taps)
    near = tl.broadcast_to((position < taps)[:, None], [position.shape[0], BLOCK_C])
    far = ((position >= size - taps) & (position < size))[:, None]
    scale = tl.load(TABLE + left[:, None] * BLOCK_C + lane[None, :], mask=near, other=0.0)
    return 1.0 + (scale + tl.load(TABLE + right[:, None] * BLOCK_C + lane[None, :], mask=far, other=0.0))


@triton.jit
def _convolve(
    U, TABLE, t, first, last, begin, end, b, tile, frames, batch, taps, past,
    CHUNKED: tl.constexpr, TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    CAUSAL_TAPS: tl.constexpr,
):  # fmt: skip
    """Returns the sums of groups over all frames of their recordings, and over those of their chunks, without biases.
    In plain form the first are with w; else with v, and the others with w.
    """
    at = U + sliding.in_tiles(tile, batch, b, past + frames, t, tl.arange(0, BLOCK_C), BLOCK_C)
    zero = sliding.zeros(GROUP, BLOCK_G, BLOCK_C)
    row = sliding.taps_at(TABLE, taps if CHUNKED else 0, BLOCK_G, BLOCK_C)
    z = sliding.sums(
        zero, at, t - past - begin, end - begin, row, None, BLOCK_C, BLOCK_C, CAUSAL_TAPS if CHUNKED else TAPS, GROUP,
        PAIRS=not CHUNKED,  # two sums with pairs would take 168 registers instead of 128
    )  # fmt: skip
    e = z
    if CHUNKED:
        skip = (taps - TAPS) // 2
        row = sliding.taps_at(TABLE, skip, BLOCK_G, BLOCK_C)
        e = sliding.sums(
            zero, at + skip * BLOCK_C, t - past + skip - first, last - first, row, None, BLOCK_C, BLOCK_C, TAPS, GROUP,
            PAIRS=False,
        )  # fmt: skip
    return z, e


@triton.jit
def _finish(
    z, e, TABLE, BIAS, CAUSAL_BIAS, position, lane, c, C, size, taps,
    CHUNKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Returns (z, e, scale) of frames at positions of a chunk of ``size``; e and scale in chunk-causal form alone."""
    scale = z
    if CHUNKED:
        if BIAS is not None:
            e += _row(BIAS, c, C)
        if CAUSAL_BIAS is not None:
            z += _row(CAUSAL_BIAS, c, C)
        scale = _edge_scale(TABLE, position, lane, size, taps, BLOCK_C)
        z = tl.fma(e, scale, z)
    else:
        if BIAS is not None:
            z += _row(BIAS, c, C)
    return z, e, scale


@triton.jit(do_not_specialize=["groups", "frames", "batch", "chunk", "taps", "past"])
def forward_kernel(
    U, TABLE, BIAS, CAUSAL_BIAS, GROUPS, Y, y_time_stride, y_batch_stride, groups, frames, batch, C, chunk, taps, past,
    CHUNKED: tl.constexpr, ACTIVATION: tl.constexpr, TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr, CAUSAL_TAPS: tl.constexpr,
):  # fmt: skip
    SHORT: tl.constexpr = Y.dtype.element_ty.primitive_bitwidth == 16
    t, first, last, begin, end, b, tile = _place(
        GROUPS, groups, batch, frames, C, chunk, 0, past, CHUNKED, GROUP, BLOCK_G, BLOCK_C
    )
    size = tl.minimum(chunk, end - begin)
    lane = tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + lane
    TABLE += tile * (4 * taps + 1 if CHUNKED else taps) * BLOCK_C
    of_all, of_chunk = _convolve(
        U, TABLE, t, first, last, begin, end, b, tile, frames, batch, taps, past, CHUNKED, TAPS, GROUP, BLOCK_G,
        BLOCK_C, CAUSAL_TAPS,
    )  # fmt: skip
    at = Y + (t[:, None].to(tl.int64) * y_time_stride + (b.to(tl.int64) * y_batch_stride + c)[None, :])
    step = tl.cast(y_time_stride, tl.int64)
    for r in tl.static_range(0, GROUP, min(GROUP, BATCH)):
        results = ()
        for n in tl.static_range(min(GROUP, BATCH)):
            z, _, _ = _finish(
                of_all[r + n], of_chunk[r + n], TABLE, BIAS, CAUSAL_BIAS, t + (r + n) - first, lane, c, C, size,
                taps, CHUNKED, BLOCK_C,
            )  # fmt: skip
            if ACTIVATION == SWOOSH_R:
                shifted, u = exp_minus_abs(z, True, SHORT)
                z = swoosh(z, shifted, u, True, SHORT)
            elif ACTIVATION == SILU:
                z *= _logistic(z, SHORT)
            results += (z.to(Y.dtype.element_ty),)
        for n in tl.static_range(min(GROUP, BATCH)):
            keep = (t + (r + n) < last)[:, None] & (c < C)[None, :]
            tl.store(at + (r + n) * step, results[n], mask=keep)


@triton.jit(do_not_specialize=["groups", "frames", "batch", "chunk", "taps", "past"])
def output_gradient_kernel(
    GRAD, U, TABLE, BIAS, CAUSAL_BIAS, GROUPS, Q, R, V, grad_time_stride, grad_batch_stride, groups, frames, batch, C,
    chunk, taps, past, CHUNKED: tl.constexpr, ACTIVATION: tl.constexpr, TAPS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, CAUSAL_TAPS: tl.constexpr,
):  # fmt: skip
    # Tiles of Q = q; in chunk-causal form of R = q scale and V = q e.
    SHORT: tl.constexpr = Q.dtype.element_ty.primitive_bitwidth == 16
    t, first, last, begin, end, b, tile = _place(
        GROUPS, groups, batch, frames, C, chunk, 0, past, CHUNKED, GROUP, BLOCK_G, BLOCK_C
    )
    size = tl.minimum(chunk, end - begin)
    lane = tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + lane
    TABLE += tile * (4 * taps + 1 if CHUNKED else taps) * BLOCK_C
    of_all, of_chunk = _convolve(
        U, TABLE, t, first, last, begin, end, b, tile, frames, batch, taps, past, CHUNKED, TAPS, GROUP, BLOCK_G,
        BLOCK_C, CAUSAL_TAPS,
    )  # fmt: skip
    at = GRAD + (
        t[:, None].to(tl.int64) * grad_time_stride + (b.to(tl.int64) * grad_batch_stride + c)[None, :]
    )
    step = tl.cast(grad_time_stride, tl.int64)
    out = sliding.in_tiles(tile, batch, b, frames, t, lane, BLOCK_C)
    for r in tl.static_range(0, GROUP, min(GROUP, BATCH)):
        results = ()
        for n in tl.static_range(min(GROUP, BATCH)):
            z, e, scale = _finish(
                of_all[r + n], of_chunk[r + n], TABLE, BIAS, CAUSAL_BIAS, t + (r + n) - first, lane, c, C, size,
                taps, CHUNKED, BLOCK_C,
            )  # fmt: skip
            keep = (t + (r + n) < last)[:, None] & (c < C)[None, :]
            q = load(at + (r + n) * step, keep)  # [BLOCK_G, BLOCK_C]
            if ACTIVATION == SWOOSH_R:
                shifted, u = exp_minus_abs(z, True, SHORT)
                q *= swoosh_slope(shifted, u, SHORT)
            elif ACTIVATION == SILU:
                s = _logistic(z, SHORT)
                q *= s * tl.fma(z, 1.0 - s, 1.0)
            results += (q.to(Q.dtype.element_ty),)
            if CHUNKED:
                results += ((q * scale).to(R.dtype.element_ty), (q * e).to(V.dtype.element_ty))
        for n in tl.static_range(min(GROUP, BATCH)):
            keep = tl.broadcast_to((t + (r + n) < last)[:, None], out.shape)
            if CHUNKED:
                tl.store(Q + out + (r + n) * BLOCK_C, results[3 * n], mask=keep)
                tl.store(R + out + (r + n) * BLOCK_C, results[3 * n + 1], mask=keep)
                tl.store(V + out + (r + n) * BLOCK_C, results[3 * n + 2], mask=keep)
            else:
                tl.store(Q + out + (r + n) * BLOCK_C, results[n], mask=keep)


@triton.jit(do_not_specialize=["groups", "frames", "batch", "chunk", "taps", "past"])
def input_gradient_kernel(
    Q, R, H, MASK, TABLE, GROUPS, DH, DCACHE, q_time_stride, q_batch_stride, time_stride, batch_stride, dh_time_stride,
    dh_batch_stride, groups, frames, batch, C, chunk, taps, past,
    GATE: tl.constexpr, CHUNKED: tl.constexpr, TILED: tl.constexpr, TAPS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, CAUSAL_TAPS: tl.constexpr,
):  # fmt: skip
    # Plain form: R is Q, in tiles where TILED, else (T, B, C) with strides. With DCACHE the first groups are of the P
    # frames before the first.
    SHORT: tl.constexpr = DH.dtype.element_ty.primitive_bitwidth == 16
    before = past if DCACHE is not None else 0
    t, first, last, begin, end, b, tile = _place(
        GROUPS, groups, batch, frames, C, chunk, before, 0, CHUNKED, GROUP, BLOCK_G, BLOCK_C
    )
    lane = tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + lane
    in_row = c < C
    column = (b.to(tl.int64) * C + c)[None, :]
    TABLE += tile * (4 * taps + 1 if CHUNKED else taps) * BLOCK_C
    skip = (taps - TAPS) // 2 if CHUNKED else 0
    start = t + (past - taps + 1 + skip)  # w and v are read from their last tap on
    row = sliding.taps_at(TABLE, taps - 1 - skip, BLOCK_G, BLOCK_C)
    zero = sliding.zeros(GROUP, BLOCK_G, BLOCK_C)
    if TILED:
        of_chunk = sliding.sums(
            zero, R + sliding.in_tiles(tile, batch, b, frames, start, lane, BLOCK_C),
            start - (first if CHUNKED else begin), (last - first) if CHUNKED else (end - begin),
            row, None, BLOCK_C, -BLOCK_C, TAPS, GROUP,
        )  # fmt: skip
    else:
        step = tl.cast(q_time_stride, tl.int64)
        of_sequence = (b.to(tl.int64) * q_batch_stride + c)[None, :]
        of_chunk = sliding.sums(
            zero, R + (start[:, None].to(tl.int64) * step + of_sequence), start - begin, end - begin, row, in_row, step,
            -BLOCK_C, TAPS, GROUP,
        )  # fmt: skip
    of_all = of_chunk
    if CHUNKED:
        of_all = sliding.sums(
            zero, Q + sliding.in_tiles(tile, batch, b, frames, t, lane, BLOCK_C), t - begin, end - begin,
            sliding.taps_at(TABLE, taps + past, BLOCK_G, BLOCK_C), None, BLOCK_C, -BLOCK_C, CAUSAL_TAPS, GROUP,
        )  # fmt: skip
    at = H + (t[:, None].to(tl.int64) * time_stride + (b.to(tl.int64) * batch_stride + c)[None, :])
    step = tl.cast(time_stride, tl.int64)
    out = DH + (t[:, None].to(tl.int64) * dh_time_stride + (b.to(tl.int64) * dh_batch_stride + c)[None, :])
    out_step = tl.cast(dh_time_stride, tl.int64)
    for r in tl.static_range(0, GROUP, min(GROUP, BATCH)):
        results = ()
        for n in tl.static_range(min(GROUP, BATCH)):
            now = t + (r + n)
            du = of_chunk[r + n] + of_all[r + n] if CHUNKED else of_chunk[r + n]
            if DCACHE is not None:
                before = ((now < 0) & (now >= -past))[:, None] & in_row[None, :]
                tl.store(
                    DCACHE + column * past + past + now[:, None], du.to(DCACHE.dtype.element_ty), mask=before
                )
            valid = (now >= 0) & (now < last)
            if MASK is not None:
                valid = valid & (tl.load(MASK + b.to(tl.int64) * frames + now, mask=valid, other=1) == 0)
            keep = valid[:, None] & in_row[None, :]
            here = at + (r + n) * step
            x = load(here, keep)
            s = load(here + C, keep)
            gate = _logistic(s, SHORT)
            du = tl.where(keep, du, 0.0)
            ds = du * (x * gate)
            if GATE == SILU_GATE:
                ds *= tl.fma(s, 1.0 - gate, 1.0)
                gate *= s
            else:
                ds *= 1.0 - gate
            results += ((du * gate).to(DH.dtype.element_ty), ds.to(DH.dtype.element_ty))
        for n in tl.static_range(min(GROUP, BATCH)):
            now, here = t + (r + n), out + (r + n) * out_step
            keep = ((now >= 0) & (now < last))[:, None] & in_row[None, :]
            tl.store(here, results[2 * n], mask=keep)
            tl.store(here + C, results[2 * n + 1], mask=keep)


@triton.jit(do_not_specialize=["groups", "frames", "batch", "chunk", "taps"])
def edge_gradient_kernel(
    V, GROUPS, DCHUNK_SCALE, groups, frames, batch, C, chunk, taps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One column of (dL, dR): the sum of V over the frames at its position, chunk by chunk, sequence by sequence. With
    # GROUPS these are the chunks.
    pid = tl.program_id(0)
    c_tiles = tl.cdiv(C, BLOCK_C)
    tile, lane = pid % c_tiles, tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + lane
    column = pid // c_tiles  # of 2 K
    right = column >= taps
    position = tl.where(right, chunk - 2 * taps + column, column)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if (position >= 0) & (position < chunk):
        here = (tl.cdiv(frames, chunk) if GROUPS is None else groups) * batch
        start = 0
        while start < here:
            i = start + tl.arange(0, BLOCK_R)
            t = i // batch * chunk + position
            keep = (i < here) & (t < frames)
            if GROUPS is not None:
                t, begin, end = group_at(GROUPS, groups, i // batch, frames)
                size = tl.minimum(chunk, end - begin)
                place = tl.where(right, size - chunk + position, position)
                t += place
                keep = (i < here) & (place >= 0) & (place < size) & (t < end)
            keep = tl.broadcast_to(keep[:, None], [BLOCK_R, BLOCK_C])
            at = sliding.in_tiles(tile, batch, i % batch, frames, t, lane, BLOCK_C)
            total += tl.load(V + at, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_C]
            start += BLOCK_R
    at = (tl.where(right, C, 0) + c).to(tl.int64) * taps + tl.where(right, column - taps, column)
    if V.dtype.element_ty == tl.float32:  # summed in float32, it would be less exact than eager's
        total = total.to(tl.float64)
    tl.store(DCHUNK_SCALE + at, tl.sum(total, axis=0).to(DCHUNK_SCALE.dtype.element_ty), mask=c < C)


def convolving(taps: int, chunk: int, chunked: bool) -> dict[str, int]:
    """Returns the constants of the convolving kernels. In a chunk no frame meets taps that are a chunk or more away.
    Two sums of each of eight groups would spill.
    """
    names = {
        "CHUNKED": chunked,
        "TAPS": min(taps, 2 * chunk - 1) if chunked else taps,
        "CAUSAL_TAPS": taps // 2 + 1,
    }
    block = sliding.BLOCK_G // 2 if chunked else sliding.BLOCK_G
    return names | {"GROUP": sliding.group_of(chunk), "BLOCK_G": block, "BLOCK_C": BLOCK_C}


class _Call:
    """The sizes of a call, u and the weights' table, which forward and backward share."""

    def __init__(self, h, weight, causal_weight, chunk_scale, mask, cache, starts, chunk_size, delay, gate):
        self.frames, self.batch, self.channels = h.shape[0], h.shape[1], h.shape[2] // 2
        self.taps, self.starts = weight.shape[-1], starts
        self.past = self.taps // 2 + delay
        self.chunked = causal_weight is not None
        whole = self.chunked and 0 < chunk_size < self.frames
        self.chunk = chunk_size if whole else self.frames
        self.c_tiles = cdiv(self.channels, BLOCK_C)
        most = self.frames + self.taps + sliding.BLOCK_G * sliding.MOST_FRAMES + BLOCK_T
        if most * self.batch >= 2**31:
            raise ValueError(
                f"fastasr.gated_depthwise_conv: h: expected fewer than 2**31 rows on CUDA, got shape {tuple(h.shape)}"
            )
        dtype = h.dtype if chunk_scale is None else torch.promote_types(h.dtype, chunk_scale.dtype)
        self.like = h.new_empty(0, dtype=dtype)
        self.form = convolving(self.taps, self.chunk, self.chunked) | {"num_warps": NUM_WARPS}
        self.groups = self.table_of_groups(self.form["GROUP"])
        self.u, self.u_steps = self.tiles(self.past + self.frames)
        table_rows = 4 * self.taps + 1 if self.chunked else self.taps
        self.table = torch.empty(self.c_tiles, table_rows, BLOCK_C, dtype=torch.float32, device=h.device)
        gates = cdiv((self.frames + self.past) * self.batch, BLOCK_T) * self.c_tiles
        tables = cdiv(self.taps, BLOCK_K) * self.c_tiles * (4 if self.chunked else 1)
        launch(gate_kernel, (gates + tables,),
            h, as_bytes(mask), cache, weight, causal_weight, chunk_scale, self.u, self.table,
            h.stride(0), h.stride(1), self.frames, self.batch, self.channels, self.taps, self.past, gates,
            GATE=gate, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS,
        )  # fmt: skip

    def table_of_groups(self, group: int) -> torch.Tensor | None:
        return None if self.starts is None else groups(self.starts, self.frames, self.chunk, group)

    def grid(self, before: int = 0) -> tuple[int]:
        group, block = self.form["GROUP"], self.form["BLOCK_G"]
        if self.groups is None:
            blocks = sliding.group_blocks(self.frames, self.chunk, before, group, block)
        else:
            blocks = cdiv(self.groups.shape[1], block)
        return (blocks * self.batch * self.c_tiles,)

    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        count = 0 if self.groups is None else self.groups.shape[1]
        return count, self.frames, self.batch, self.channels, self.chunk, self.taps, self.past

    def tiles(self, frames: int) -> tuple[torch.Tensor, sliding.Steps]:
        return sliding.tiles(self.batch, frames, self.channels, self.like)

    def cache(self) -> torch.Tensor:
        """Returns u of the last frames, (B, C, P)."""
        last = self.u[:, :, self.frames :].permute(1, 0, 3, 2)
        return last.flatten(1, 2)[:, : self.channels].contiguous()


def _as_laid(h: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns an empty (T, B, channels) in h's order of memory: its neighbours in a model need no copy."""
    frames, batch = h.shape[:2]
    if h.stride(1) > h.stride(0):
        return torch.empty((batch, frames, channels), dtype=dtype, device=h.device).transpose(0, 1)
    return torch.empty((frames, batch, channels), dtype=dtype, device=h.device)


def gated_depthwise_conv_forward(
    h,
    weight,
    bias,
    causal_weight,
    causal_bias,
    chunk_scale,
    mask,
    cache,
    starts,
    chunk_size: int,
    activation: int,
    need_cache: bool,
    delay: int = 0,
    gate: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (y (T, B, C), new cache (B, C, P), or a tensor without elements). y has the promoted dtype of h and
    chunk_scale, and lies in h's order of memory. The channels of h and all other tensors are contiguous.
    """
    if not h.numel() or not weight.numel():
        y = h.new_zeros(h.shape[0], h.shape[1], h.shape[2] // 2)
        past = weight.shape[-1] // 2 + delay
        before = h.new_zeros(h.shape[1], h.shape[2] // 2, past) if cache is None else cache.clone()
        return y, before if need_cache else h.new_empty(0)
    call = _Call(h, weight, causal_weight, chunk_scale, mask, cache, starts, chunk_size, delay, gate)
    y = _as_laid(h, call.channels, call.like.dtype)
    launch(forward_kernel, call.grid(),
        call.u, call.table, bias, causal_bias, call.groups, y, y.stride(0), y.stride(1), *call.sizes(),
        ACTIVATION=activation, **call.form,
    )  # fmt: skip
    return y, call.cache() if need_cache else h.new_empty(0)


def gated_depthwise_conv_backward(
    grad,
    h,
    weight,
    bias,
    causal_weight,
    causal_bias,
    chunk_scale,
    mask,
    cache,
    starts,
    chunk_size: int,
    activation: int,
    delay: int = 0,
    gate: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of h to chunk_scale and of cache, without elements where the tensor is None. The channels
    of grad and h and all other tensors are contiguous.
    """
    tensors = (h, weight, bias, causal_weight, causal_bias, chunk_scale, cache)
    if not h.numel() or not weight.numel():
        return tuple(h.new_empty(0) if t is None else torch.zeros_like(t) for t in tensors)
    dh = _as_laid(h, h.shape[2], h.dtype)
    found = [None if t is None else torch.empty_like(t) for t in tensors[1:]]
    dweight, dbias, dcausal_weight, dcausal_bias, dchunk_scale, dcache = found
    if dcache is not None and not dcache.shape[-1]:
        dcache = None  # a cache of no frames has no gradient
    call = _Call(h, weight, causal_weight, chunk_scale, mask, cache, starts, chunk_size, delay, gate)
    _, frames, batch, channels, chunk, taps, past = call.sizes()
    q = r = v = None
    tiled = call.chunked or activation != 0
    if tiled:
        q, q_steps = call.tiles(frames)
        if call.chunked:
            r, v = torch.empty_like(q), torch.empty_like(q)
        launch(output_gradient_kernel, call.grid(),
            grad, call.u, call.table, bias, causal_bias, call.groups, q, r, v, grad.stride(0), grad.stride(1),
            *call.sizes(), ACTIVATION=activation, **call.form,
        )  # fmt: skip
    else:
        q, q_steps = grad, sliding.Steps(BLOCK_C, grad.stride(1), grad.stride(0))
    if r is None:
        r = q
    launch(input_gradient_kernel, call.grid(0 if dcache is None else past),
        q, r, h, as_bytes(mask), call.table, call.groups, dh, dcache, grad.stride(0), grad.stride(1),
        h.stride(0), h.stride(1), dh.stride(0), dh.stride(1), *call.sizes(),
        GATE=gate, TILED=tiled, **call.form,
    )  # fmt: skip
    count = call.form["TAPS"]
    skip = (taps - count) // 2
    shared = call.c_tiles, sliding.MAX_PARTS, q.dtype, starts
    segments = of_causal = sliding.Segments(frames, batch, chunk, count, *shared)
    if call.chunked:
        of_causal = sliding.Segments(frames, batch, frames, past + 1, *shared)
    rows = 1 + taps + (2 + past if call.chunked else 0)
    parts = max(segments.parts, of_causal.parts)
    table = torch.empty(parts, rows, channels, dtype=torch.float32, device=h.device)
    steps = q_steps, call.u_steps, batch, channels
    sliding.gradients(r, call.u, table, segments, *steps, past - skip, past, 1 + skip, 0, call.chunked)
    if call.chunked:
        sliding.gradients(q, call.u, table, of_causal, *steps, past, past, taps + 2, taps + 1, False)
        chunks = call.table_of_groups(chunk)
        launch(edge_gradient_kernel, (2 * taps * call.c_tiles,),
            v, chunks, dchunk_scale, 0 if chunks is None else chunks.shape[1], frames, batch, channels, chunk, taps,
            BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=EDGE_WARPS,
        )  # fmt: skip
    launch(sliding.add_taps_kernel, (rows * call.c_tiles,),
        table, dweight, dbias, dcausal_weight, dcausal_bias, segments.parts, of_causal.parts, channels, taps, skip,
        BLOCK_P=sliding.MAX_PARTS, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dh, *(h.new_empty(0) if g is None else g for g in found)
