# SPDX-License-Identifier: Apache-2.0
"""The spatial gating unit of cgMLP: LayerNorm of the gate, depthwise convolution over time, product; forward, backward.

    x (B, T, 2C) = (r, g)      u = LayerNorm(g), 0 at padding and outside [0, T); K taps, P = K // 2
    z[t] = b + sum_k w[k] u[t + k - P]      y = r act(z)
    With q = dy r act'(z): dr = dy act(z), du[t] = sum_k w[k] q[t - k + P], dw[k] = sum q[t] u[t + k - P], db = sum q,
    and with d = du norm_weight, n the normalised row, per row: dg = (d - mean d - n mean(d n)) / sqrt(var g + eps)

Rows are normalised once and written as u: applied in every tap, mean, scale, weight and bias would triple the
arithmetic. A convolving program computes two frames of each row of its tile, so a row of u that is loaded, from the
first-level cache but for its first use, serves both, and a tap's weights go from one frame to the next in registers.
du stays where dg will be. The taps' gradients are those of a map of one row (depthwise_conv2d.py).
Launches: forward 2 (the first writes u and the taps as rows of channels), backward 7.

Bytes per element of g, of e bytes: forward 3e, and 2e for u; backward 5e, and 9e between the kernels: u and q three
times each, du twice, g once more (the taps' gradients read u and q once per eight taps, from the L2 cache where they
fit). A 4x400x1536 bf16 tensor at 4.3 TB/s: 6 us forward, 16 us backward; by count of instructions (about 2 per tap and
element) 5 us and 17 us. Sums over rows are made in parts that depend on the shape alone, and the parts added in
float64: results repeat bit for bit, there are no atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels import residual_norm
from fastasr.kernels._activation import activate_with_slope
from fastasr.kernels._launch import launch
from fastasr.kernels.depthwise_conv2d import depthwise_conv2d_backward
from fastasr.kernels.gated_depthwise_conv import _lay_out
from fastasr.kernels.residual_norm import MAX_CHANNELS, _centred, _mean

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BLOCK_R, BLOCK_C, NUM_WARPS = 16, 64, 4  # pairs of frames and channels of a tile: 16 sums per thread
BLOCK_K = 32


# --------------------------------------------------------------------------- whole rows
@triton.jit
def _rows(r, frames, x_batch, x_time):
    """Returns the offsets in x at which rows r = (b, t) start."""
    return (r // frames).to(tl.int64) * x_batch + (r % frames).to(tl.int64) * x_time


@triton.jit
def _load(POINTER, at, keep):
    return tl.load(POINTER + at, mask=keep, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["frames", "rows", "row_programs", "taps"])
def normalise_kernel(
    X, MASK, NORM_WEIGHT, NORM_BIAS, WEIGHT, U, TABLE, x_batch, x_time, frames, rows, row_programs, C, taps, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILE_K: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    # U (B, T, C) from the first programs; the taps as rows of channels, TABLE (K, C), from the others.
    pid = tl.program_id(0)
    if pid < row_programs:
        PRECISE: tl.constexpr = U.dtype.element_ty == tl.float32
        r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        keep = (r < rows)[:, None] & (c < C)[None, :]
        at = _rows(r, frames, x_batch, x_time)[:, None] + (C + c)[None, :]
        g = _load(X, at, keep)  # [BLOCK_R, BLOCK_C]
        n, scale = _centred(g, keep, eps, C, PRECISE)
        w = tl.load(NORM_WEIGHT + c, mask=c < C, other=0.0)
        b = tl.load(NORM_BIAS + c, mask=c < C, other=0.0)
        u = tl.fma(n * scale[:, None], w[None, :], b[None, :])
        if MASK is not None:
            u = tl.where((tl.load(MASK + r, mask=r < rows, other=1) == 0)[:, None], u, 0.0)
        tl.store(U + r[:, None].to(tl.int64) * C + c[None, :], u.to(U.dtype.element_ty), mask=keep)
    else:
        _lay_out(WEIGHT, TABLE, 0, taps, C, pid - row_programs, TILE_K, TILE_C)


@triton.jit(do_not_specialize=["frames", "rows", "rows_per_part"])
def norm_gradient_kernel(
    X, NORM_WEIGHT, DX, PARTS, x_batch, x_time, frames, rows, rows_per_part, C, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dg in place of du; sums of du n and of du over a part's rows, as rows of two tables.
    PRECISE: tl.constexpr = DX.dtype.element_ty == tl.float32
    part = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    in_row = c < C
    w = tl.load(NORM_WEIGHT + c, mask=in_row, other=0.0)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        keep = (r < end)[:, None] & in_row[None, :]
        at = _rows(r, frames, x_batch, x_time)[:, None] + (C + c)[None, :]
        g = _load(X, at, keep)  # [BLOCK_R, BLOCK_C]
        n, scale = _centred(g, keep, eps, C, PRECISE)
        # With eps = 0 the scale of a row past the end is infinite.
        n = tl.where(keep, n * scale[:, None], 0.0)
        at = r[:, None].to(tl.int64) * (2 * C) + (C + c)[None, :]
        du = _load(DX, at, keep)
        dweight = tl.fma(du, n, dweight)
        dbias += du
        d = du * w[None, :]
        mean = _mean(d, C, PRECISE).to(tl.float32)
        along = _mean(d * n, C, PRECISE).to(tl.float32)
        dg = tl.fma(-n, along[:, None], d - mean[:, None]) * scale[:, None]
        tl.store(DX + at, dg.to(DX.dtype.element_ty), mask=keep)
        first += BLOCK_R
    row = PARTS + part.to(tl.int64) * C + c
    tl.store(row, tl.sum(dweight.to(PARTS.dtype.element_ty), axis=0), mask=in_row)
    row += tl.num_programs(0).to(tl.int64) * C
    tl.store(row, tl.sum(dbias.to(PARTS.dtype.element_ty), axis=0), mask=in_row)


# --------------------------------------------------------------------------- tiles of pairs of frames
@triton.jit
def _place(frames, pairs, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns (sequence, its first row, first frame of each pair, channels, their mask). Channels vary fastest. Past
    the last pair the first frame is ``frames``."""
    pid = tl.program_id(0)
    c_tiles = tl.cdiv(C, BLOCK_C)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    pair = pid // c_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    per_sequence = tl.cdiv(frames, 2)
    there = (pair < pairs)[:, None] & (c < C)[None, :]
    b = (pair // per_sequence).to(tl.int64)
    return b, b * frames, tl.where(pair < pairs, pair % per_sequence * 2, frames), c, there


@triton.jit
def _frame(POINTER, at, start, k, c, there, frames, C):
    """Loads the frames k after ``start``, which lies at ``at``, with 0 outside the sequence."""
    keep = there & ((start + k >= 0) & (start + k < frames))[:, None]
    return _load(POINTER, (at + k * C)[:, None] + c[None, :], keep)  # [BLOCK_R, BLOCK_C]


@triton.jit
def _taps(TABLE, k, taps, c, C, TURNED: tl.constexpr):
    k = taps - 1 - k if TURNED else k
    return tl.load(TABLE + k * C + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _convolve(
    POINTER, TABLE, BIAS, base, t, c, there, frames, C, taps,
    TURNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Returns the convolution at frames t and t + 1, with the taps as they are or reversed."""
    one = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    two = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    start = t - taps // 2
    at = (base + start) * C
    w = _taps(TABLE, 0, taps, c, C, TURNED)
    one = tl.fma(_frame(POINTER, at, start, 0, c, there, frames, C), w, one)
    for k in range(1, taps):
        x = _frame(POINTER, at, start, k, c, there, frames, C)
        two = tl.fma(x, w, two)
        w = _taps(TABLE, k, taps, c, C, TURNED)
        one = tl.fma(x, w, one)
    two = tl.fma(_frame(POINTER, at, start, taps, c, there, frames, C), w, two)
    if BIAS is not None:
        b = tl.load(BIAS + c, mask=c < C, other=0.0)[None, :]
        one += b
        two += b
    return one, two


@triton.jit
def _factor(X, b, t, c, keep, x_batch, x_time):
    at = b * x_batch + t.to(tl.int64) * x_time
    return _load(X, at[:, None] + c[None, :], keep)


@triton.jit
def _store_gated(
    X, Y, z, b, base, t, c, there, frames, C, x_batch, x_time, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr
):
    keep = there & (t < frames)[:, None]
    r = _factor(X, b, t, c, keep, x_batch, x_time)
    act, _ = activate_with_slope(z, ACTIVATION, PRECISE)
    tl.store(Y + (base + t)[:, None] * C + c[None, :], (r * act).to(Y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames", "pairs", "taps"])
def forward_kernel(
    X, U, TABLE, BIAS, Y, x_batch, x_time, frames, pairs, C, taps,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = Y.dtype.element_ty == tl.float32
    b, base, t, c, there = _place(frames, pairs, C, BLOCK_R, BLOCK_C)
    one, two = _convolve(U, TABLE, BIAS, base, t, c, there, frames, C, taps, False, BLOCK_R, BLOCK_C)
    _store_gated(X, Y, one, b, base, t, c, there, frames, C, x_batch, x_time, ACTIVATION, PRECISE)
    _store_gated(X, Y, two, b, base, t + 1, c, there, frames, C, x_batch, x_time, ACTIVATION, PRECISE)


@triton.jit
def _store_output_gradients(
    GRAD, X, DX, Q, z, b, base, t, c, there, frames, C, x_batch, x_time,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    keep = there & (t < frames)[:, None]
    r = _factor(X, b, t, c, keep, x_batch, x_time)
    row = (base + t)[:, None]
    dy = _load(GRAD, row * C + c[None, :], keep)
    act, slope = activate_with_slope(z, ACTIVATION, PRECISE)
    tl.store(Q + row * C + c[None, :], (dy * r * slope).to(Q.dtype.element_ty), mask=keep)
    tl.store(DX + row * (2 * C) + c[None, :], (dy * act).to(DX.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames", "pairs", "taps"])
def output_gradient_kernel(
    GRAD, X, U, TABLE, BIAS, DX, Q, x_batch, x_time, frames, pairs, C, taps,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # q, and dr in the first half of DX.
    PRECISE: tl.constexpr = DX.dtype.element_ty == tl.float32
    b, base, t, c, there = _place(frames, pairs, C, BLOCK_R, BLOCK_C)
    one, two = _convolve(U, TABLE, BIAS, base, t, c, there, frames, C, taps, False, BLOCK_R, BLOCK_C)
    _store_output_gradients(
        GRAD, X, DX, Q, one, b, base, t, c, there, frames, C, x_batch, x_time, ACTIVATION, PRECISE
    )
    _store_output_gradients(
        GRAD, X, DX, Q, two, b, base, t + 1, c, there, frames, C, x_batch, x_time, ACTIVATION, PRECISE
    )


@triton.jit
def _store_input_gradient(MASK, DX, du, base, t, c, there, frames, C):
    keep = there & (t < frames)[:, None]
    row = base + t
    if MASK is not None:
        du = tl.where((tl.load(MASK + row, mask=t < frames, other=1) == 0)[:, None], du, 0.0)
    tl.store(DX + row[:, None] * (2 * C) + (C + c)[None, :], du.to(DX.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames", "pairs", "taps"])
def input_gradient_kernel(
    Q, MASK, TABLE, DX, frames, pairs, C, taps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    # du, 0 at padding, in the second half of DX.
    _, base, t, c, there = _place(frames, pairs, C, BLOCK_R, BLOCK_C)
    one, two = _convolve(Q, TABLE, None, base, t, c, there, frames, C, taps, True, BLOCK_R, BLOCK_C)
    _store_input_gradient(MASK, DX, one, base, t, c, there, frames, C)
    _store_input_gradient(MASK, DX, two, base, t + 1, c, there, frames, C)


# --------------------------------------------------------------------------- launches
class _Call:
    """The sizes of a call, u and the table of the taps, which forward and backward share."""

    def __init__(self, x, norm_weight, norm_bias, weight, mask, eps: float):
        self.batch, self.frames, self.channels = x.shape[0], x.shape[1], x.shape[2] // 2
        self.taps, self.eps, self.rows = weight.shape[-1], eps, x.shape[0] * x.shape[1]
        if self.channels > MAX_CHANNELS or self.rows + 2 * BLOCK_R >= 2**31:
            raise ValueError(
                f"fastasr.conv_spatial_gate: x: expected at most {MAX_CHANNELS} channels of each half and fewer than "
                f"2**31 rows on CUDA, got shape {tuple(x.shape)}"
            )
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.strides = x.stride(0), x.stride(1)
        self.u = torch.empty(self.batch, self.frames, self.channels, dtype=x.dtype, device=x.device)
        self.table = torch.empty(self.taps, self.channels, dtype=torch.float32, device=x.device)
        block_r, block_c, warps = residual_norm._blocks(self.channels, residual_norm.FORWARD_ELEMENTS)
        programs = triton.cdiv(self.rows, block_r)
        tables = triton.cdiv(self.taps, BLOCK_K) * triton.cdiv(self.channels, BLOCK_C)
        launch(normalise_kernel, (programs + tables,),
            x, self.mask, norm_weight, norm_bias, weight, self.u, self.table, *self.strides, self.frames, self.rows,
            programs, self.channels, self.taps, eps,
            BLOCK_R=block_r, BLOCK_C=block_c, TILE_K=BLOCK_K, TILE_C=BLOCK_C, num_warps=warps,
        )  # fmt: skip
        self.pairs = self.batch * triton.cdiv(self.frames, 2)
        self.grid = (triton.cdiv(self.pairs, BLOCK_R) * triton.cdiv(self.channels, BLOCK_C),)
        self.sizes = self.frames, self.pairs, self.channels, self.taps
        self.tile = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": NUM_WARPS}

    def norm_gradients(self, x, norm_weight, dx) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes dg over du in dx and returns (dnorm_weight, dnorm_bias)."""
        block_r, block_c, warps = residual_norm._blocks(self.channels, residual_norm.BACKWARD_ELEMENTS)
        rows_per_part = triton.cdiv(self.rows, residual_norm.MAX_WARPS // warps)
        rows_per_part = triton.cdiv(rows_per_part, block_r) * block_r
        parts = triton.cdiv(self.rows, rows_per_part)
        shares = torch.float64 if x.dtype == torch.float32 else torch.float32
        table = torch.empty((2, parts, self.channels), dtype=shares, device=x.device)
        launch(norm_gradient_kernel, (parts,),
            x, norm_weight, dx, table, *self.strides, self.frames, self.rows, rows_per_part, self.channels, self.eps,
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
        dweight, dbias = torch.empty_like(norm_weight), torch.empty_like(norm_weight)
        block_p, warps = (128, 4) if parts <= 128 else (2048, 16)
        launch(residual_norm.add_parts_kernel, (triton.cdiv(self.channels, 16), 2),
            table, dweight, dbias, parts, self.channels, BLOCK_P=block_p, BLOCK_C=16, num_warps=warps,
        )  # fmt: skip
        return dweight, dbias


def conv_spatial_gate_forward(
    x, norm_weight, norm_bias, weight, bias, mask, eps: float, activation: int
) -> torch.Tensor:
    """Returns y (B, T, C) in x's dtype. The channels of x and all other tensors are contiguous;
    parameters are float32.
    """
    y = torch.empty(x.shape[0], x.shape[1], x.shape[2] // 2, dtype=x.dtype, device=x.device)
    if y.numel():
        call = _Call(x, norm_weight, norm_bias, weight, mask, eps)
        launch(forward_kernel, call.grid,
            x, call.u, call.table, bias, y, *call.strides, *call.sizes, ACTIVATION=activation, **call.tile,
        )  # fmt: skip
    return y


def conv_spatial_gate_backward(
    grad, x, norm_weight, norm_bias, weight, bias, mask, eps: float, activation: int
) -> tuple[torch.Tensor, ...]:
    """Returns (dx, dnorm_weight, dnorm_bias, dweight, dbias) for a contiguous ``grad``; dbias is computed even without
    a bias.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not grad.numel():
        return dx, *(torch.zeros_like(t) for t in (norm_weight, norm_bias, weight, norm_bias))
    call = _Call(x, norm_weight, norm_bias, weight, mask, eps)
    q = torch.empty_like(call.u)
    launch(output_gradient_kernel, call.grid,
        grad, x, call.u, call.table, bias, dx, q, *call.strides, *call.sizes, ACTIVATION=activation, **call.tile
    )  # fmt: skip
    launch(input_gradient_kernel, call.grid, q, call.mask, call.table, dx, *call.sizes, **call.tile)
    dnorm_weight, dnorm_bias = call.norm_gradients(x, norm_weight, dx)
    shape = call.batch, 1, call.frames, call.channels
    taps = weight.view(call.channels, 1, call.taps)
    pad = 0, call.taps // 2
    _, dweight, dbias = depthwise_conv2d_backward(
        q.view(shape), call.u.view(shape), taps, *pad, False, True, True
    )
    return dx, dnorm_weight, dnorm_bias, dweight.view(weight.shape), dbias
