# SPDX-License-Identifier: Apache-2.0
"""The spatial gating unit of cgMLP: LayerNorm of the gate, depthwise convolution over time, product; forward, backward.

    x (B, T, 2C) = (r, g)      u = LayerNorm(g), 0 at padding and outside [0, T); K taps, P = K // 2
    z[t] = b + sum_k w[k] u[t + k - P]      y = r act(z)
    With q = dy r act'(z): dr = dy act(z), du[t] = sum_k w[k] q[t - k + P], dw[k] = sum q[t] u[t + k - P], db = sum q,
    and with d = du norm_weight, n the normalised row, per row: dg = (d - mean d - n mean(d n)) / sqrt(var g + eps)

Rows are normalised once and written as u: applied in every tap, mean, scale, weight and bias would triple the
arithmetic. A convolving program computes groups of four frames, which share each row of u and each tap's weights from
registers; so do eight taps in their gradients (_sliding_taps.py). du stays where dg will be.
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

from fastasr.kernels import _sliding_taps as sliding
from fastasr.kernels import gated_depthwise_conv, residual_norm
from fastasr.kernels._activation import activate_with_slope
from fastasr.kernels._launch import launch
from fastasr.kernels.gated_depthwise_conv import _lay_out
from fastasr.kernels.residual_norm import MAX_CHANNELS, _centred, _mean

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BLOCK_C, NUM_WARPS = 64, 4  # of a convolving program
BLOCK_K = 32
NORMALISE_ELEMENTS, GRADIENT_ELEMENTS = 512, 256  # of whole rows, per warp
MAX_WARPS = 2048  # of the gradient of the norm


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


# --------------------------------------------------------------------------- tiles of groups of frames
@triton.jit
def _place(frames, batch, C, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns (sequence, its first row, first frames of groups, channels). Channels vary fastest, then sequences."""
    pid = tl.program_id(0)
    c_tiles = tl.cdiv(C, BLOCK_C)
    b, t, _ = sliding.groups(pid // c_tiles, batch, frames, 0, BLOCK_G)
    b = b.to(tl.int64)
    return b, b * frames, t, pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _convolve(
    POINTER, TABLE, base, t, c, frames, C, taps, TURNED: tl.constexpr,
    TAIL: tl.constexpr, FEW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Returns the convolution of groups, without the bias, with the taps as they are or reversed."""
    start = t - taps // 2
    at = POINTER + ((base + start)[:, None] * C + c[None, :])
    row = TABLE + tl.broadcast_to(c[None, :], [BLOCK_G, BLOCK_C])
    return sliding.sums(
        at, start, tl.full([BLOCK_G], 0, tl.int32) + frames, row + (taps - 1) * C if TURNED else row, taps, c < C,
        C, -C if TURNED else C, TAIL, FEW, BLOCK_G, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _with_bias(z, BIAS, c, C):
    if BIAS is not None:
        z += tl.load(BIAS + c, mask=c < C, other=0.0)[None, :]
    return z


@triton.jit
def _factor(X, b, t, c, keep, x_batch, x_time):
    at = b * x_batch + t.to(tl.int64) * x_time
    return _load(X, at[:, None] + c[None, :], keep)


@triton.jit(do_not_specialize=["frames", "batch", "taps"])
def forward_kernel(
    X, U, TABLE, BIAS, Y, x_batch, x_time, frames, batch, C, taps, ACTIVATION: tl.constexpr,
    TAIL: tl.constexpr, FEW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = Y.dtype.element_ty == tl.float32
    b, base, first, c = _place(frames, batch, C, BLOCK_G, BLOCK_C)
    found = _convolve(U, TABLE, base, first, c, frames, C, taps, False, TAIL, FEW, BLOCK_G, BLOCK_C)
    for n in tl.static_range(sliding.GROUP):
        t = first + n
        keep = (t < frames)[:, None] & (c < C)[None, :]
        r = _factor(X, b, t, c, keep, x_batch, x_time)
        act, _ = activate_with_slope(_with_bias(found[n], BIAS, c, C), ACTIVATION, PRECISE)
        tl.store(Y + (base + t)[:, None] * C + c[None, :], (r * act).to(Y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames", "batch", "taps"])
def output_gradient_kernel(
    GRAD, X, U, TABLE, BIAS, DX, Q, x_batch, x_time, frames, batch, C, taps, ACTIVATION: tl.constexpr,
    TAIL: tl.constexpr, FEW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # q, and dr in the first half of DX.
    PRECISE: tl.constexpr = DX.dtype.element_ty == tl.float32
    b, base, first, c = _place(frames, batch, C, BLOCK_G, BLOCK_C)
    found = _convolve(U, TABLE, base, first, c, frames, C, taps, False, TAIL, FEW, BLOCK_G, BLOCK_C)
    for n in tl.static_range(sliding.GROUP):
        t = first + n
        keep = (t < frames)[:, None] & (c < C)[None, :]
        r = _factor(X, b, t, c, keep, x_batch, x_time)
        row = (base + t)[:, None]
        dy = _load(GRAD, row * C + c[None, :], keep)
        act, slope = activate_with_slope(_with_bias(found[n], BIAS, c, C), ACTIVATION, PRECISE)
        tl.store(Q + row * C + c[None, :], (dy * r * slope).to(Q.dtype.element_ty), mask=keep)
        tl.store(DX + row * (2 * C) + c[None, :], (dy * act).to(DX.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames", "batch", "taps"])
def input_gradient_kernel(
    Q, MASK, TABLE, DX, frames, batch, C, taps,
    TAIL: tl.constexpr, FEW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # du, 0 at padding, in the second half of DX.
    _, base, first, c = _place(frames, batch, C, BLOCK_G, BLOCK_C)
    found = _convolve(Q, TABLE, base, first, c, frames, C, taps, True, TAIL, FEW, BLOCK_G, BLOCK_C)
    for n in tl.static_range(sliding.GROUP):
        t = first + n
        keep = (t < frames)[:, None] & (c < C)[None, :]
        du = found[n]
        if MASK is not None:
            du = tl.where((tl.load(MASK + base + t, mask=t < frames, other=1) == 0)[:, None], du, 0.0)
        at = (base + t)[:, None] * (2 * C) + (C + c)[None, :]
        tl.store(DX + at, du.to(DX.dtype.element_ty), mask=keep)


# --------------------------------------------------------------------------- launches
def convolving(taps: int) -> dict[str, int]:
    """Returns the constants of the convolving kernels."""
    tail, few = sliding.remainder(taps)
    return {"TAIL": tail, "FEW": few, "BLOCK_G": sliding.BLOCK_G, "BLOCK_C": BLOCK_C}


class _Call:
    """The sizes of a call, u and the table of the taps, which forward and backward share."""

    def __init__(self, x, norm_weight, norm_bias, weight, mask, eps: float):
        self.batch, self.frames, self.channels = x.shape[0], x.shape[1], x.shape[2] // 2
        self.taps, self.eps, self.rows = weight.shape[-1], eps, x.shape[0] * x.shape[1]
        if self.channels > MAX_CHANNELS or self.rows + 4 * sliding.BLOCK_G >= 2**31:
            raise ValueError(
                f"fastasr.conv_spatial_gate: x: expected at most {MAX_CHANNELS} channels of each half and fewer than "
                f"2**31 rows on CUDA, got shape {tuple(x.shape)}"
            )
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.strides = x.stride(0), x.stride(1)
        self.u = torch.empty(self.batch, self.frames, self.channels, dtype=x.dtype, device=x.device)
        self.table = torch.empty(self.taps, self.channels, dtype=torch.float32, device=x.device)
        block_r, block_c, warps = residual_norm._blocks(self.channels, NORMALISE_ELEMENTS)
        programs = triton.cdiv(self.rows, block_r)
        tables = triton.cdiv(self.taps, BLOCK_K) * triton.cdiv(self.channels, BLOCK_C)
        launch(normalise_kernel, (programs + tables,),
            x, self.mask, norm_weight, norm_bias, weight, self.u, self.table, *self.strides, self.frames, self.rows,
            programs, self.channels, self.taps, eps,
            BLOCK_R=block_r, BLOCK_C=block_c, TILE_K=BLOCK_K, TILE_C=BLOCK_C, num_warps=warps,
        )  # fmt: skip
        self.c_tiles = triton.cdiv(self.channels, BLOCK_C)
        self.grid = (
            sliding.group_blocks(self.frames, self.frames, 0, sliding.BLOCK_G) * self.batch * self.c_tiles,
        )
        self.sizes = self.frames, self.batch, self.channels, self.taps
        self.form = convolving(self.taps) | {"num_warps": NUM_WARPS}

    def norm_gradients(self, x, norm_weight, dx) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes dg over du in dx and returns (dnorm_weight, dnorm_bias)."""
        block_r, block_c, warps = residual_norm._blocks(self.channels, GRADIENT_ELEMENTS)
        rows_per_part = triton.cdiv(self.rows, MAX_WARPS // warps)
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
            x, call.u, call.table, bias, y, *call.strides, *call.sizes, ACTIVATION=activation, **call.form,
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
        grad, x, call.u, call.table, bias, dx, q, *call.strides, *call.sizes, ACTIVATION=activation, **call.form
    )  # fmt: skip
    launch(input_gradient_kernel, call.grid, q, call.mask, call.table, dx, *call.sizes, **call.form)
    dnorm_weight, dnorm_bias = call.norm_gradients(x, norm_weight, dx)
    frames, batch, channels, taps = call.sizes
    parts = gated_depthwise_conv.MAX_PARTS
    segments = sliding.Segments(frames, batch, frames, parts)
    table = torch.empty(segments.parts, 1 + taps, channels, dtype=torch.float32, device=x.device)
    sliding.gradients(
        q, call.u, table, segments, (channels, frames * channels), (frames, batch, channels, frames), taps // 2, 0,
        taps, 0, False,
    )  # fmt: skip
    dweight, dbias = torch.empty_like(weight), torch.empty_like(norm_bias)
    launch(gated_depthwise_conv.add_parts_kernel, ((1 + taps) * call.c_tiles,),
        table, dweight, dbias, None, None, segments.parts, channels, taps,
        BLOCK_P=parts, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, dnorm_weight, dnorm_bias, dweight, dbias
