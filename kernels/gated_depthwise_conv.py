# SPDX-License-Identifier: Apache-2.0
"""Gate, padding mask, depthwise convolution over time (plain or chunk-causal) and SwooshR or SiLU, both passes.

    h (T, B, 2C) = (x, s)      u = x sigmoid(s), 0 at padding and outside [0, T); K taps, P of them on past frames
    plain:         z[t] = b + sum_k w[k] u[t + k - P]
    chunk-causal:  z[t] = b' + sum_(j <= P) v[j] u[t + j - P] + scale (b + sum_k w[k] u[t + k - P], t's chunk alone)
                   scale at position p of a chunk of S: 1 + L[p] (p < K) + R[p - (S - K)] (p >= S - K)
    y = z, SwooshR(z) or SiLU(z).    With q = dy act'(z), r = q scale, e the sum within the chunk:
    du[t] = sum_k w[k] r[t - k + P] (in the chunk) + sum_j v[j] q[t - j + P]
    dw[k] = sum r[t] u[t + k - P] (in the chunk)     dv[j] = sum q[t] u[t + j - P]     dL, dR: sums of q e by position

The first kernel of a pass writes u, after P rows of the cache or of zeros, and the weights as rows of channels. In the
others a program computes groups of four frames, which share each row of u and each tap's weights from registers
(_sliding_taps.py): a load and a conversion per four taps and element. A group lies in one chunk, so that sums within
the chunk hide whole rows. Applying the gate in every tap would cost ten times the arithmetic; two Toeplitz products per
channel need channel-major memory, which h does not have. Launches: forward 2; backward 5 (4 without an activation), 7
in chunk-causal form.

Bytes per element of u, of e bytes: forward 3e and 2e for u; backward 5e, 2e for u and 2e for q (chunk-causal: 6e for
q, r and q e). A 1500x20x192 bf16 tensor at 2.9 TB/s: 20 us forward, 35 us backward; predicted for an H100 with 31 taps
about 27 us for each of two convolutions and for the weights' gradients (with a load per tap: 46 to 54 us each).
The weights' gradients are added up in parts that depend on the
shape alone, in registers, and the parts in float64: results repeat bit for bit, there are no atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels import _sliding_taps as sliding
from fastasr.kernels._launch import launch
from fastasr.kernels.swoosh import _activation, _exp_minus_abs, _slope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SWOOSH_R, SILU = tl.constexpr(1), tl.constexpr(2)  # activations; 0: none

BLOCK_T, BLOCK_C, NUM_WARPS = 32, 64, 4  # a tile of 16 elements per thread
BLOCK_R = 16
MAX_PARTS = 64
BLOCK_K = 32


@triton.jit
def _logistic(x, SHORT: tl.constexpr):
    """Returns 1 / (1 + exp(-x)); unless SHORT, corrected as in swoosh.py to the error of torch's."""
    e = x * 1.4426950408889634
    u = tl.exp2(-tl.abs(e))
    if not SHORT:
        r = tl.fma(e, -0.6931471805599453, x)
        u = tl.where(u > 1e-20, tl.fma(u, tl.where(x > 0.0, -r, r), u), u)  # r is nan for infinite x
    d = 1.0 + u
    r = 1.0 / d
    if not SHORT:
        r = tl.fma(r, tl.fma(-d, r, 1.0), r)
    return tl.where(x > 0.0, 1.0, u) * r


@triton.jit
def _lay_out(SOURCE, TABLE, row, taps, C, pid, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Copies SOURCE (C, taps) to the rows of TABLE (rows, C) from ``row`` on."""
    k = pid // tl.cdiv(C, BLOCK_C) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = pid % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    keep = (k < taps)[:, None] & (c < C)[None, :]
    w = tl.load(SOURCE + c[None, :] * taps + k[:, None], mask=keep, other=0.0)  # [BLOCK_K, BLOCK_C]
    tl.store(TABLE + (row + k[:, None]) * C + c[None, :], w.to(TABLE.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames", "batch", "past", "gate_programs"])
def gate_kernel(
    H, MASK, CACHE, WEIGHT, CAUSAL_WEIGHT, CHUNK_SCALE, U, TABLE,
    time_stride, batch_stride, frames, batch, C, taps, past, gate_programs,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # U (P + T, B, C): P rows of the cache, or zeros, then u. TABLE: rows of w (K), v (P + 1), L (K), R (K).
    pid = tl.program_id(0)
    if pid < gate_programs:
        SHORT: tl.constexpr = U.dtype.element_ty.primitive_bitwidth == 16
        c_tiles = tl.cdiv(C, BLOCK_C)
        row = pid // c_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        t, b = row // batch - past, row % batch
        valid = (t >= 0) & (t < frames)
        if MASK is not None:
            valid = valid & (tl.load(MASK + b * frames + t, mask=valid, other=1) == 0)
        keep = valid[:, None] & (c < C)[None, :]
        at = t[:, None].to(tl.int64) * time_stride + b[:, None].to(tl.int64) * batch_stride + c[None, :]
        x = tl.load(H + at, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
        s = tl.load(H + at + C, mask=keep, other=0.0).to(tl.float32)
        u = tl.where(keep, x * _logistic(s, SHORT), 0.0)
        if CACHE is not None:
            cached = (t < 0)[:, None] & (c < C)[None, :]
            before = (b[:, None].to(tl.int64) * C + c[None, :]) * past + past + t[:, None]
            u += tl.load(CACHE + before, mask=cached, other=0.0).to(tl.float32)
        inside = (t < frames)[:, None] & (c < C)[None, :]
        tl.store(U + row[:, None].to(tl.int64) * C + c[None, :], u.to(U.dtype.element_ty), mask=inside)
    else:
        tiles = tl.cdiv(taps, BLOCK_K) * tl.cdiv(C, BLOCK_C)
        pid -= gate_programs
        if pid < tiles:
            _lay_out(WEIGHT, TABLE, 0, taps, C, pid, BLOCK_K, BLOCK_C)
        else:
            if CAUSAL_WEIGHT is not None:
                if pid < 2 * tiles:
                    _lay_out(CAUSAL_WEIGHT, TABLE, taps, taps // 2 + 1, C, pid - tiles, BLOCK_K, BLOCK_C)
                elif pid < 3 * tiles:
                    row = taps + taps // 2 + 1
                    _lay_out(CHUNK_SCALE, TABLE, row, taps, C, pid - 2 * tiles, BLOCK_K, BLOCK_C)
                else:
                    row = 2 * taps + taps // 2 + 1
                    _lay_out(CHUNK_SCALE + C * taps, TABLE, row, taps, C, pid - 3 * tiles, BLOCK_K, BLOCK_C)


@triton.jit
def _place(batch, frames, C, chunk, before, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns (first frames of groups, their chunks' first and end, sequence, channels) of this program: channels vary
    fastest, then sequences.
    """
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    b, t, first = sliding.groups(pid // c_tiles, batch, chunk, before, BLOCK_G)
    last = tl.maximum(tl.minimum(first + chunk, frames), first)
    last = tl.where(t < 0, first, last)
    return t, first, last, b, pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _row(POINTER, c, C):
    return tl.load(POINTER + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _edge_scale(TABLE, position, c, C, chunk, taps):
    """Returns the scale of rows at these positions of a chunk, [BLOCK_T, BLOCK_C]."""
    left = taps + taps // 2 + 1 + position
    right = 2 * taps + taps // 2 + 1 + position - (chunk - taps)
    near = (position < taps)[:, None] & (c < C)[None, :]
    far = ((position >= chunk - taps) & (position < chunk))[:, None] & (c < C)[None, :]
    scale = tl.load(TABLE + left[:, None] * C + c[None, :], mask=near, other=0.0)
    return 1.0 + (scale + tl.load(TABLE + right[:, None] * C + c[None, :], mask=far, other=0.0))


@triton.jit
def _convolve(
    U, TABLE, t, first, last, b, c, frames, batch, C, taps, past,
    CHUNKED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    TAIL: tl.constexpr, FEW: tl.constexpr, CAUSAL_TAIL: tl.constexpr, CAUSAL_FEW: tl.constexpr,
):  # fmt: skip
    """Returns the sums of groups over all frames, and over those of their chunks, without biases. In plain form the
    first are with w; else with v, and the others with w.
    """
    step = batch.to(tl.int64) * C
    at = U + (t[:, None].to(tl.int64) * step + (b.to(tl.int64) * C + c)[None, :])
    row = TABLE + tl.broadcast_to(c[None, :], at.shape)
    some = tl.full([BLOCK_G], 0, tl.int32)
    z = sliding.sums(
        at, t, some + frames + past, row + taps * C if CHUNKED else row, past + 1 if CHUNKED else taps, c < C, step, C,
        CAUSAL_TAIL if CHUNKED else TAIL, CAUSAL_FEW if CHUNKED else FEW, BLOCK_G, BLOCK_C,
    )  # fmt: skip
    e = z
    if CHUNKED:
        e = sliding.sums(
            at, t - past - first, last - first, row, taps, c < C, step, C, TAIL, FEW, BLOCK_G, BLOCK_C
        )
    return z, e


@triton.jit
def _finish(z, e, TABLE, BIAS, CAUSAL_BIAS, position, c, C, chunk, taps, CHUNKED: tl.constexpr):
    """Returns (z, e, scale) of frames at positions of a chunk; e and scale in chunk-causal form alone."""
    scale = z
    if CHUNKED:
        if BIAS is not None:
            e += _row(BIAS, c, C)
        if CAUSAL_BIAS is not None:
            z += _row(CAUSAL_BIAS, c, C)
        scale = _edge_scale(TABLE, position, c, C, chunk, taps)
        z = tl.fma(e, scale, z)
    else:
        if BIAS is not None:
            z += _row(BIAS, c, C)
    return z, e, scale


@triton.jit(do_not_specialize=["frames", "batch", "chunk", "taps", "past"])
def forward_kernel(
    U, TABLE, BIAS, CAUSAL_BIAS, Y, frames, batch, C, chunk, taps, past,
    CHUNKED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    TAIL: tl.constexpr, FEW: tl.constexpr, CAUSAL_TAIL: tl.constexpr, CAUSAL_FEW: tl.constexpr,
):  # fmt: skip
    SHORT: tl.constexpr = Y.dtype.element_ty.primitive_bitwidth == 16
    t, first, last, b, c = _place(batch, frames, C, chunk, 0, BLOCK_G, BLOCK_C)
    of_all, of_chunk = _convolve(
        U, TABLE, t, first, last, b, c, frames, batch, C, taps, past, CHUNKED, BLOCK_G, BLOCK_C,
        TAIL, FEW, CAUSAL_TAIL, CAUSAL_FEW,
    )  # fmt: skip
    for r in tl.static_range(sliding.GROUP):
        position = t + r - first
        z, _, _ = _finish(
            of_all[r], of_chunk[r], TABLE, BIAS, CAUSAL_BIAS, position, c, C, chunk, taps, CHUNKED
        )
        if ACTIVATION == SWOOSH_R:
            shifted, u = _exp_minus_abs(z, True, SHORT)
            z = _activation(z, shifted, u, True, SHORT)
        elif ACTIVATION == SILU:
            z *= _logistic(z, SHORT)
        keep = (t + r < last)[:, None] & (c < C)[None, :]
        at = (t + r)[:, None].to(tl.int64) * batch + b
        tl.store(Y + at * C + c[None, :], z.to(Y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames", "batch", "chunk", "taps", "past"])
def output_gradient_kernel(
    GRAD, U, TABLE, BIAS, CAUSAL_BIAS, Q, R, V, grad_time_stride, grad_batch_stride, frames, batch, C, chunk, taps,
    past, CHUNKED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    TAIL: tl.constexpr, FEW: tl.constexpr, CAUSAL_TAIL: tl.constexpr, CAUSAL_FEW: tl.constexpr,
):  # fmt: skip
    # Q = q (T, B, C); in chunk-causal form R = q scale and V = q e.
    SHORT: tl.constexpr = Q.dtype.element_ty.primitive_bitwidth == 16
    t, first, last, b, c = _place(batch, frames, C, chunk, 0, BLOCK_G, BLOCK_C)
    of_all, of_chunk = _convolve(
        U, TABLE, t, first, last, b, c, frames, batch, C, taps, past, CHUNKED, BLOCK_G, BLOCK_C,
        TAIL, FEW, CAUSAL_TAIL, CAUSAL_FEW,
    )  # fmt: skip
    for r in tl.static_range(sliding.GROUP):
        position = t + r - first
        z, e, scale = _finish(
            of_all[r], of_chunk[r], TABLE, BIAS, CAUSAL_BIAS, position, c, C, chunk, taps, CHUNKED
        )
        keep = (t + r < last)[:, None] & (c < C)[None, :]
        at = (t + r)[:, None].to(tl.int64) * grad_time_stride + (b.to(tl.int64) * grad_batch_stride + c)[
            None, :
        ]
        q = tl.load(GRAD + at, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_G, BLOCK_C]
        if ACTIVATION == SWOOSH_R:
            shifted, u = _exp_minus_abs(z, True, SHORT)
            q *= _slope(shifted, u, SHORT)
        elif ACTIVATION == SILU:
            s = _logistic(z, SHORT)
            q *= s * tl.fma(z, 1.0 - s, 1.0)
        at = ((t + r)[:, None].to(tl.int64) * batch + b) * C + c[None, :]
        tl.store(Q + at, q.to(Q.dtype.element_ty), mask=keep)
        if CHUNKED:
            tl.store(R + at, (q * scale).to(R.dtype.element_ty), mask=keep)
            tl.store(V + at, (q * e).to(V.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames", "batch", "chunk", "taps", "past"])
def input_gradient_kernel(
    Q, R, H, MASK, TABLE, DH, DCACHE, time_stride, batch_stride, frames, batch, C, chunk, taps, past,
    CHUNKED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    TAIL: tl.constexpr, FEW: tl.constexpr, CAUSAL_TAIL: tl.constexpr, CAUSAL_FEW: tl.constexpr,
):  # fmt: skip
    # Plain form: R is Q. With DCACHE the first groups are of the P frames before the first.
    SHORT: tl.constexpr = DH.dtype.element_ty.primitive_bitwidth == 16
    t, first, last, b, c = _place(
        batch, frames, C, chunk, past if DCACHE is not None else 0, BLOCK_G, BLOCK_C
    )
    in_row = c < C
    step = batch.to(tl.int64) * C
    column = (b.to(tl.int64) * C + c)[None, :]
    start = t + (past - taps + 1)  # w and v are read from their last tap on
    row = TABLE + tl.broadcast_to(c[None, :], [BLOCK_G, BLOCK_C])
    every = tl.full([BLOCK_G], 0, tl.int32) + frames
    of_chunk = sliding.sums(
        R + (start[:, None].to(tl.int64) * step + column), start - first if CHUNKED else start,
        last - first if CHUNKED else every, row + (taps - 1) * C, taps, in_row, step, -C, TAIL, FEW, BLOCK_G, BLOCK_C,
    )  # fmt: skip
    of_all = of_chunk
    if CHUNKED:
        of_all = sliding.sums(
            Q + (t[:, None].to(tl.int64) * step + column), t, every, row + (taps + past) * C, past + 1, in_row, step,
            -C, CAUSAL_TAIL, CAUSAL_FEW, BLOCK_G, BLOCK_C,
        )  # fmt: skip
    for r in tl.static_range(sliding.GROUP):
        now = t + r
        du = of_chunk[r] + of_all[r] if CHUNKED else of_chunk[r]
        if DCACHE is not None:
            before = ((now < 0) & (now >= -past))[:, None] & in_row[None, :]
            tl.store(
                DCACHE + column * past + past + now[:, None], du.to(DCACHE.dtype.element_ty), mask=before
            )
        stored = (now >= 0) & (now < last)
        valid = stored
        if MASK is not None:
            valid = valid & (tl.load(MASK + b.to(tl.int64) * frames + now, mask=stored, other=1) == 0)
        keep = valid[:, None] & in_row[None, :]
        at = now[:, None].to(tl.int64) * time_stride + (b.to(tl.int64) * batch_stride + c)[None, :]
        x = tl.load(H + at, mask=keep, other=0.0).to(tl.float32)
        s = tl.load(H + at + C, mask=keep, other=0.0).to(tl.float32)
        gate = _logistic(s, SHORT)
        du = tl.where(keep, du, 0.0)
        at = (now[:, None].to(tl.int64) * batch + b) * (2 * C) + c[None, :]
        tl.store(DH + at, (du * gate).to(DH.dtype.element_ty), mask=stored[:, None] & in_row[None, :])
        ds = du * (x * gate) * (1.0 - gate)
        tl.store(DH + at + C, ds.to(DH.dtype.element_ty), mask=stored[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=["frames", "batch", "chunk", "taps"])
def edge_gradient_kernel(
    V, DCHUNK_SCALE, frames, batch, C, chunk, taps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    # One column of (dL, dR): the sum of V over the frames at its position, chunk by chunk, sequence by sequence.
    pid = tl.program_id(0)
    c_tiles = tl.cdiv(C, BLOCK_C)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    column = pid // c_tiles  # of 2 K
    right = column >= taps
    position = tl.where(right, chunk - 2 * taps + column, column)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if (position >= 0) & (position < chunk):
        here = tl.cdiv(frames, chunk) * batch
        start = 0
        while start < here:
            i = start + tl.arange(0, BLOCK_R)
            t = i // batch * chunk + position
            keep = ((i < here) & (t < frames))[:, None] & (c < C)[None, :]
            at = (t * batch + i % batch)[:, None].to(tl.int64) * C + c[None, :]
            total += tl.load(V + at, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_C]
            start += BLOCK_R
    at = (tl.where(right, C, 0) + c).to(tl.int64) * taps + tl.where(right, column - taps, column)
    tl.store(DCHUNK_SCALE + at, tl.sum(total, axis=0).to(DCHUNK_SCALE.dtype.element_ty), mask=c < C)


@triton.jit
def _store_column(POINTER, total, c, C, columns, column):
    at = POINTER + c.to(tl.int64) * columns + column
    tl.store(at, total.to(POINTER.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["parts", "taps"])
def add_parts_kernel(
    PARTS, DWEIGHT, DBIAS, DCAUSAL_WEIGHT, DCAUSAL_BIAS, parts, C, taps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Rows of a part: dbias, dweight (K), and in chunk-causal form dcausal_bias, dcausal_weight (P + 1).
    pid = tl.program_id(0)
    c_tiles = tl.cdiv(C, BLOCK_C)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // c_tiles
    rows = tl.num_programs(0) // c_tiles
    p = tl.arange(0, BLOCK_P)
    keep = (p < parts)[:, None] & (c < C)[None, :]
    table = tl.load(
        PARTS + (p[:, None] * rows + row) * C + c[None, :], mask=keep, other=0.0
    )  # [BLOCK_P, BLOCK_C]
    total = tl.sum(table.to(tl.float64), axis=0).to(tl.float32)
    if row == 0:
        if DBIAS is not None:
            _store_column(DBIAS, total, c, C, 1, 0)
    elif row <= taps:
        _store_column(DWEIGHT, total, c, C, taps, row - 1)
    elif row == taps + 1:
        if DCAUSAL_BIAS is not None:
            _store_column(DCAUSAL_BIAS, total, c, C, 1, 0)
    else:
        if DCAUSAL_WEIGHT is not None:
            _store_column(DCAUSAL_WEIGHT, total, c, C, taps // 2 + 1, row - taps - 2)


def convolving(taps: int, chunked: bool, dtype: torch.dtype) -> dict[str, int]:
    """Returns the constants of the convolving kernels. Two sums of each of 16 groups would spill in float32."""
    (tail, few), (causal_tail, causal_few) = sliding.remainder(taps), sliding.remainder(taps // 2 + 1)
    names = {"TAIL": tail, "FEW": few, "CAUSAL_TAIL": causal_tail, "CAUSAL_FEW": causal_few}
    block = sliding.BLOCK_G // 2 if chunked and dtype == torch.float32 else sliding.BLOCK_G
    return names | {"CHUNKED": chunked, "BLOCK_G": block, "BLOCK_C": BLOCK_C}


class _Call:
    """The sizes of a call, u and the weights' table, which forward and backward share."""

    def __init__(self, h, weight, causal_weight, chunk_scale, mask, cache, chunk_size, delay):
        self.frames, self.batch, self.channels = h.shape[0], h.shape[1], h.shape[2] // 2
        self.taps = weight.shape[-1]
        self.past = self.taps // 2 + delay
        self.chunked = causal_weight is not None
        whole = self.chunked and 0 < chunk_size < self.frames
        self.chunk = chunk_size if whole else self.frames
        self.c_tiles = triton.cdiv(self.channels, BLOCK_C)
        if (self.frames + self.taps + 4 * sliding.BLOCK_G + BLOCK_T) * self.batch >= 2**31:
            raise ValueError(
                f"fastasr.gated_depthwise_conv: h: expected fewer than 2**31 rows on CUDA, got shape {tuple(h.shape)}"
            )
        self.dtype = h.dtype if chunk_scale is None else torch.promote_types(h.dtype, chunk_scale.dtype)
        self.form = convolving(self.taps, self.chunked, self.dtype) | {"num_warps": NUM_WARPS}
        rows = 4 * self.taps + 1 if self.chunked else self.taps
        self.u = torch.empty(
            self.frames + self.past, self.batch, self.channels, dtype=self.dtype, device=h.device
        )
        self.table = torch.empty(rows, self.channels, dtype=torch.float32, device=h.device)
        gates = triton.cdiv((self.frames + self.past) * self.batch, BLOCK_T) * self.c_tiles
        tables = triton.cdiv(self.taps, BLOCK_K) * self.c_tiles * (4 if self.chunked else 1)
        launch(gate_kernel, (gates + tables,),
            h, _bytes(mask), cache, weight, causal_weight, chunk_scale, self.u, self.table,
            h.stride(0), h.stride(1), self.frames, self.batch, self.channels, self.taps, self.past, gates,
            BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS,
        )  # fmt: skip

    def grid(self, before: int = 0) -> tuple[int]:
        blocks = sliding.group_blocks(self.frames, self.chunk, before, self.form["BLOCK_G"])
        return (blocks * self.batch * self.c_tiles,)

    def sizes(self) -> tuple[int, int, int, int, int, int]:
        return self.frames, self.batch, self.channels, self.chunk, self.taps, self.past

    def empty(self) -> torch.Tensor:
        return torch.empty(self.frames, self.batch, self.channels, dtype=self.dtype, device=self.u.device)


def _bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def gated_depthwise_conv_forward(
    h,
    weight,
    bias,
    causal_weight,
    causal_bias,
    chunk_scale,
    mask,
    cache,
    chunk_size: int,
    activation: int,
    need_cache: bool,
    delay: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (y (T, B, C), new cache (B, C, P), or a tensor without elements). y has the promoted dtype of h and
    chunk_scale. The channels of h and all other tensors are contiguous.
    """
    if not h.numel() or not weight.numel():
        y = h.new_zeros(h.shape[0], h.shape[1], h.shape[2] // 2)
        past = weight.shape[-1] // 2 + delay
        before = h.new_zeros(h.shape[1], h.shape[2] // 2, past) if cache is None else cache.clone()
        return y, before if need_cache else h.new_empty(0)
    call = _Call(h, weight, causal_weight, chunk_scale, mask, cache, chunk_size, delay)
    y = call.empty()
    launch(forward_kernel, call.grid(),
        call.u, call.table, bias, causal_bias, y, *call.sizes(), ACTIVATION=activation, **call.form,
    )  # fmt: skip
    return y, call.u[call.frames :].permute(1, 2, 0).contiguous() if need_cache else h.new_empty(0)


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
    chunk_size: int,
    activation: int,
    delay: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of h to chunk_scale and of cache, without elements where the tensor is None. The channels
    of grad and h and all other tensors are contiguous.
    """
    tensors = (h, weight, bias, causal_weight, causal_bias, chunk_scale, cache)
    if not h.numel() or not weight.numel():
        return tuple(h.new_empty(0) if t is None else torch.zeros_like(t) for t in tensors)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    found = [None if t is None else torch.empty_like(t) for t in tensors[1:]]
    dweight, dbias, dcausal_weight, dcausal_bias, dchunk_scale, dcache = found
    if dcache is not None and not dcache.shape[-1]:
        dcache = None  # a cache of no frames has no gradient
    call = _Call(h, weight, causal_weight, chunk_scale, mask, cache, chunk_size, delay)
    frames, batch, channels, _, taps, past = call.sizes()
    q = r = v = None
    if call.chunked or activation:
        q = call.empty()
        if call.chunked:
            r, v = call.empty(), call.empty()
        launch(output_gradient_kernel, call.grid(),
            grad, call.u, call.table, bias, causal_bias, q, r, v, grad.stride(0), grad.stride(1),
            *call.sizes(), ACTIVATION=activation, **call.form,
        )  # fmt: skip
    else:
        q = grad.contiguous()
    if r is None:
        r = q
    launch(input_gradient_kernel, call.grid(0 if dcache is None else past),
        q, r, h, _bytes(mask), call.table, dh, dcache, h.stride(0), h.stride(1), *call.sizes(), **call.form,
    )  # fmt: skip
    rows = 1 + taps + (2 + past if call.chunked else 0)
    segments = sliding.Segments(frames, batch, call.chunk, MAX_PARTS)
    table = torch.empty(segments.parts, rows, channels, dtype=torch.float32, device=h.device)
    form = (batch * channels, channels), (frames, batch, channels, call.chunk), past, past
    sliding.gradients(r, call.u, table, segments, *form, taps, 0, call.chunked)
    if call.chunked:
        sliding.gradients(q, call.u, table, segments, *form, past + 1, taps + 1, False)
    if call.chunked:
        launch(edge_gradient_kernel, (2 * taps * call.c_tiles,),
            v, dchunk_scale, *call.sizes()[:5], BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
        )  # fmt: skip
    launch(add_parts_kernel, (rows * call.c_tiles,),
        table, dweight, dbias, dcausal_weight, dcausal_bias, segments.parts, channels, taps,
        BLOCK_P=MAX_PARTS, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dh, *(h.new_empty(0) if g is None else g for g in found)
