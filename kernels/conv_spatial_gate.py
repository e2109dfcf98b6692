# SPDX-License-Identifier: Apache-2.0
"""The spatial gating unit of cgMLP: LayerNorm of the gate, depthwise convolution over time, product; forward, backward.

    x (B, T, 2C) = (r, g)      u = LayerNorm(g), 0 at padding and outside [0, T); K taps, P = K // 2
    z[t] = b + sum_k w[k] u[t + k - P]      y = r act(z)
    With q = dy r act'(z): dr = dy act(z), du[t] = sum_k w[k] q[t - k + P], dw[k] = sum q[t] u[t + k - P], db = sum q,
    and with d = du norm_weight, n the normalised row, per row: dg = (d - mean d - n mean(d n)) / sqrt(var g + eps)

Rows are normalised once and written as u: applied in every tap, mean, scale, weight and bias would triple the
arithmetic. A convolving thread computes groups of eight frames, which share each row of u and each tap's weights from
registers; so do 16 taps in their gradients (_sliding_taps.py). u, q and the taps are in tiles of channels. du stays
where dg will be. Launches: forward 2 (the first writes u and the taps as rows of channels), backward 7.

Bytes per element of g, of e bytes: forward 3e, and 2e for u; backward 5e, and 9e between the kernels: u and q three
times each, du twice, g once more (the taps' gradients read u and q once per 16 taps, from the L2 cache where they
fit). A 4x400x1536 bf16 tensor at 4.3 TB/s: 6 us forward, 16 us backward; by count of instructions (about 1.6 per tap
and element) 4 us and 13 us. Sums over rows are made in parts (_parts.py), and the parts added in float64: on one kind
of device results repeat bit for bit, without atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels import _sliding_taps as sliding
from fastasr.kernels._activation import IDENTITY, activate_with_slope
from fastasr.kernels._launch import cdiv, contiguous_like, launch
from fastasr.kernels._layer_norm import MAX_CHANNELS, normalise, normed_with, row_tile, row_width, through
from fastasr.kernels._parts import add_pair, split_rows, store_pair
from fastasr.kernels._vectors import load

BLOCK_C, NUM_WARPS = sliding.BLOCK_C, 4  # for a program that convolves
BLOCK_K = 4
# Of whole rows: the elements per warp and the least warps of a program that normalises; the elements and warps of one
# that computes gradients, of which a multiprocessor holds RESIDENT, as they wait at barriers.
NORMALISE_ELEMENTS, NORMALISE_WARPS = 512, 4
GRADIENT_ELEMENTS, GRADIENT_WARPS, RESIDENT = 2048, 8, 4


# --------------------------------------------------------------------------- whole rows
@triton.jit
def _rows(r, frames, x_batch, x_time):
    """Returns the offsets in x at which rows r = (b, t) start."""
    return (r // frames).to(tl.int64) * x_batch + (r % frames).to(tl.int64) * x_time


@triton.jit(do_not_specialize=["frames", "rows", "row_programs", "taps"])
def normalise_kernel(
    GATE, MASK, NORM_WEIGHT, NORM_BIAS, WEIGHT, U, TABLE, x_batch, x_time, frames, rows, row_programs, C, taps, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILE_K: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    # The first programs write U, the others the taps as rows of channels, TABLE; both in tiles.
    pid = tl.program_id(0)
    if pid < row_programs:
        PRECISE: tl.constexpr = U.dtype.element_ty == tl.float32
        r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        keep = (r < rows)[:, None] & (c < C)[None, :]
        at = _rows(r, frames, x_batch, x_time)[:, None] + c[None, :]
        g = load(GATE + at, keep)  # [BLOCK_R, BLOCK_C]
        n, scale = normalise(g, keep, eps, C, PRECISE)
        w = load(NORM_WEIGHT + c, c < C, False)
        b = load(NORM_BIAS + c, c < C, False)
        u = tl.fma(n * scale[:, None], w[None, :], b[None, :])
        if MASK is not None:
            u = tl.where((tl.load(MASK + r, mask=r < rows, other=1) == 0)[:, None], u, 0.0)
        at = ((c // TILE_C)[None, :].to(tl.int64) * rows + r[:, None]) * TILE_C + (c % TILE_C)[None, :]
        tl.store(U + at, u.to(U.dtype.element_ty), mask=keep)
    else:
        sliding.lay_out(WEIGHT, TABLE, 0, taps, taps, C, pid - row_programs, TILE_K, TILE_C)


@triton.jit(do_not_specialize=["frames", "rows", "rows_per_part"])
def norm_gradient_kernel(
    GATE, NORM_WEIGHT, DGATE, PARTS, x_batch, x_time, frames, rows, rows_per_part, C, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Writes dg over du, and a part's sums of du n and of du as rows of two tables.
    PRECISE: tl.constexpr = DGATE.dtype.element_ty == tl.float32
    part = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    in_row = c < C
    w = load(NORM_WEIGHT + c, in_row, False)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        keep = (r < end)[:, None] & in_row[None, :]
        at = _rows(r, frames, x_batch, x_time)[:, None] + c[None, :]
        g = load(GATE + at, keep)  # [BLOCK_R, BLOCK_C]
        at = r[:, None].to(tl.int64) * (2 * C) + c[None, :]
        du = load(DGATE + at, keep)
        d = du * w[None, :]
        n, scale, mean, along = normed_with(g, d, r < end, keep, eps, C, True, PRECISE)
        dweight = tl.fma(du, n, dweight)
        dbias += du
        dg = through(d, n, scale, mean, along)
        tl.store(DGATE + at, dg.to(DGATE.dtype.element_ty), mask=keep)
        first += BLOCK_R
    store_pair(PARTS, c, C, dweight, dbias)


# --------------------------------------------------------------------------- tiles of groups of frames
@triton.jit
def _place(frames, batch, C, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns (sequence, its first row, first frames of groups, tile). Tiles vary fastest, then sequences."""
    pid = tl.program_id(0)
    c_tiles = tl.cdiv(C, BLOCK_C)
    b, t, _ = sliding.groups(pid // c_tiles, batch, frames, 0, False, GROUP, BLOCK_G)
    return b, b.to(tl.int64) * frames, t, pid % c_tiles


@triton.jit
def _convolve(
    POINTER, TABLE, tile, batch, b, t, frames, TURNED: tl.constexpr, ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Returns the convolution of groups, without the bias, with the taps as they are or reversed."""
    UNROLLED: tl.constexpr = ACTIVATION == IDENTITY and TAPS <= 4 * GROUP  # others would take more registers
    start = t - TAPS // 2
    at = POINTER + sliding.in_tiles(tile, batch, b, frames, start, tl.arange(0, BLOCK_C), BLOCK_C)
    row = sliding.taps_at(TABLE, tile * TAPS + (TAPS - 1 if TURNED else 0), BLOCK_G, BLOCK_C)
    return sliding.sums(
        sliding.zeros(GROUP, BLOCK_G, BLOCK_C), at, start, tl.full([BLOCK_G], 0, tl.int32) + frames, row, None,
        BLOCK_C, -BLOCK_C if TURNED else BLOCK_C, TAPS, GROUP, UNROLLED,
    )  # fmt: skip


@triton.jit
def _with_bias(z, BIAS, c, C):
    if BIAS is not None:
        z += load(BIAS + c, c < C, False)[None, :]
    return z


@triton.jit(do_not_specialize=["frames", "batch"])
def forward_kernel(
    FACTOR, U, TABLE, BIAS, Y, x_batch, x_time, frames, batch, C, ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = Y.dtype.element_ty == tl.float32
    b, base, first, tile = _place(frames, batch, C, GROUP, BLOCK_G, BLOCK_C)
    lane = tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + lane
    found = _convolve(
        U, TABLE, tile, batch, b, first, frames, False, ACTIVATION, TAPS, GROUP, BLOCK_G, BLOCK_C
    )
    at = FACTOR + ((b.to(tl.int64) * x_batch + first.to(tl.int64) * x_time)[:, None] + c[None, :])
    step = tl.cast(x_time, tl.int64)
    results = ()
    for n in tl.static_range(GROUP):
        keep = (first + n < frames)[:, None] & (c < C)[None, :]
        r = load(at + n * step, keep)
        act, _ = activate_with_slope(_with_bias(found[n], BIAS, c, C), ACTIVATION, PRECISE)
        results += ((r * act).to(Y.dtype.element_ty),)
    at = Y + ((base + first)[:, None] * C + c[None, :])
    for n in tl.static_range(GROUP):
        tl.store(at + n * C, results[n], mask=(first + n < frames)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["frames", "batch"])
def output_gradient_kernel(
    GRAD, FACTOR, U, TABLE, BIAS, DFACTOR, Q, x_batch, x_time, frames, batch, C, ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = DFACTOR.dtype.element_ty == tl.float32
    b, base, first, tile = _place(frames, batch, C, GROUP, BLOCK_G, BLOCK_C)
    lane = tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + lane
    found = _convolve(
        U, TABLE, tile, batch, b, first, frames, False, ACTIVATION, TAPS, GROUP, BLOCK_G, BLOCK_C
    )
    at = FACTOR + ((b.to(tl.int64) * x_batch + first.to(tl.int64) * x_time)[:, None] + c[None, :])
    step = tl.cast(x_time, tl.int64)
    row = (base + first)[:, None]
    results = ()
    for n in tl.static_range(GROUP):
        keep = (first + n < frames)[:, None] & (c < C)[None, :]
        r = load(at + n * step, keep)
        dy = load(GRAD + (row * C + c[None, :]) + n * C, keep)
        act, slope = activate_with_slope(_with_bias(found[n], BIAS, c, C), ACTIVATION, PRECISE)
        results += ((dy * r * slope).to(Q.dtype.element_ty), (dy * act).to(DFACTOR.dtype.element_ty))
    at = sliding.in_tiles(tile, batch, b, frames, first, lane, BLOCK_C)
    for n in tl.static_range(GROUP):
        keep = tl.broadcast_to((first + n < frames)[:, None], at.shape)
        tl.store(Q + at + n * BLOCK_C, results[2 * n], mask=keep)
        keep = keep & (c < C)[None, :]
        tl.store(DFACTOR + (row * (2 * C) + c[None, :]) + n * 2 * C, results[2 * n + 1], mask=keep)


@triton.jit(do_not_specialize=["frames", "batch"])
def input_gradient_kernel(
    Q, MASK, TABLE, DGATE, frames, batch, C,
    TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Writes du, 0 at padding, where dg will be.
    b, base, first, tile = _place(frames, batch, C, GROUP, BLOCK_G, BLOCK_C)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    found = _convolve(Q, TABLE, tile, batch, b, first, frames, True, None, TAPS, GROUP, BLOCK_G, BLOCK_C)
    at = DGATE + ((base + first)[:, None] * (2 * C) + c[None, :])
    results = ()
    for n in tl.static_range(GROUP):
        du = found[n]
        if MASK is not None:
            there = tl.load(MASK + base + first + n, mask=first + n < frames, other=1) == 0
            du = tl.where(there[:, None], du, 0.0)
        results += (du.to(DGATE.dtype.element_ty),)
    for n in tl.static_range(GROUP):
        tl.store(at + n * 2 * C, results[n], mask=(first + n < frames)[:, None] & (c < C)[None, :])


# --------------------------------------------------------------------------- launches
def convolving(taps: int, frames: int) -> dict[str, int]:
    """Returns the constants of the convolving kernels."""
    group = sliding.group_of(frames)
    return {"TAPS": taps, "GROUP": group, "BLOCK_G": sliding.BLOCK_G, "BLOCK_C": BLOCK_C}


class _Call:
    """The sizes of a call, u and the table of the taps, which forward and backward share."""

    def __init__(self, x, norm_weight, norm_bias, weight, mask, eps: float):
        self.batch, self.frames, self.channels = x.shape[0], x.shape[1], x.shape[2] // 2
        self.taps, self.eps, self.rows = weight.shape[-1], eps, x.shape[0] * x.shape[1]
        if self.channels > MAX_CHANNELS or self.rows + sliding.BLOCK_G * sliding.MOST_FRAMES >= 2**31:
            raise ValueError(
                f"fastasr.conv_spatial_gate: x: expected at most {MAX_CHANNELS} channels of each half and fewer than "
                f"2**31 rows on CUDA, got shape {tuple(x.shape)}"
            )
        self.factor, self.gate = x.chunk(2, -1)
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.strides = x.stride(0), x.stride(1)
        self.c_tiles = cdiv(self.channels, BLOCK_C)
        self.u, self.u_steps = sliding.tiles(self.batch, self.frames, self.channels, x)
        self.table = torch.empty(self.c_tiles, self.taps, BLOCK_C, dtype=torch.float32, device=x.device)
        tile = row_tile(self.channels, NORMALISE_ELEMENTS, NORMALISE_WARPS)
        programs = cdiv(self.rows, tile["BLOCK_R"])
        tables = cdiv(self.taps, BLOCK_K) * self.c_tiles
        launch(normalise_kernel, (programs + tables,),
            self.gate, self.mask, norm_weight, norm_bias, weight, self.u, self.table, *self.strides,
            self.frames, self.rows, programs, self.channels, self.taps, eps,
            TILE_K=BLOCK_K, TILE_C=BLOCK_C, **tile,
        )  # fmt: skip
        self.sizes = self.frames, self.batch, self.channels
        self.form = convolving(self.taps, self.frames) | {"num_warps": NUM_WARPS}
        blocks = sliding.group_blocks(self.frames, self.frames, 0, self.form["GROUP"])
        self.grid = (blocks * self.batch * self.c_tiles,)

    def norm_gradients(self, norm_weight, norm_bias, dgate) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes dg over du in dgate and returns (dnorm_weight, dnorm_bias)."""
        block_c = row_width(self.channels)
        block_r, rows_per_part, parts = split_rows(
            self.rows, block_c, dgate, elements=GRADIENT_ELEMENTS, resident=RESIDENT
        )
        shares = torch.float64 if dgate.dtype == torch.float32 else torch.float32
        table = torch.empty((2, parts, self.channels), dtype=shares, device=dgate.device)
        launch(norm_gradient_kernel, (parts,),
            self.gate, norm_weight, dgate, table, *self.strides, self.frames, self.rows, rows_per_part,
            self.channels, self.eps,
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        dweight, dbias = torch.empty_like(norm_weight), torch.empty_like(norm_bias)
        add_pair(table, dweight, dbias)
        return dweight, dbias


def conv_spatial_gate_forward(
    x, norm_weight, norm_bias, weight, bias, mask, eps: float, activation: int
) -> torch.Tensor:
    """Returns y (B, T, C) in x's dtype. The channels of x and all other tensors are contiguous."""
    y = torch.empty(x.shape[0], x.shape[1], x.shape[2] // 2, dtype=x.dtype, device=x.device)
    if y.numel():
        call = _Call(x, norm_weight, norm_bias, weight, mask, eps)
        launch(forward_kernel, call.grid,
            call.factor, call.u, call.table, bias, y, *call.strides, *call.sizes, ACTIVATION=activation, **call.form,
        )  # fmt: skip
    return y


def conv_spatial_gate_backward(
    grad, x, norm_weight, norm_bias, weight, bias, mask, eps: float, activation: int
) -> tuple[torch.Tensor, ...]:
    """Returns (dx, dnorm_weight, dnorm_bias, dweight, dbias) for a contiguous ``grad``; dbias is computed even without
    a bias.
    """
    dx = contiguous_like(x)
    if not grad.numel():
        return dx, *(torch.zeros_like(t) for t in (norm_weight, norm_bias, weight, norm_bias))
    call = _Call(x, norm_weight, norm_bias, weight, mask, eps)
    q = torch.empty_like(call.u)
    dfactor, dgate = dx.chunk(2, -1)
    launch(output_gradient_kernel, call.grid,
        grad, call.factor, call.u, call.table, bias, dfactor, q, *call.strides, *call.sizes,
        ACTIVATION=activation, **call.form,
    )  # fmt: skip
    launch(input_gradient_kernel, call.grid, q, call.mask, call.table, dgate, *call.sizes, **call.form)
    dnorm_weight, dnorm_bias = call.norm_gradients(norm_weight, norm_bias, dgate)
    (frames, batch, channels), taps = call.sizes, call.taps
    segments = sliding.Segments(frames, batch, frames, taps, call.c_tiles, sliding.MAX_PARTS, q.dtype)
    table = torch.empty(segments.parts, 1 + taps, channels, dtype=torch.float32, device=x.device)
    sliding.gradients(
        q, call.u, table, segments, call.u_steps, call.u_steps, batch, channels, taps // 2, 0, 1, 0, False
    )
    dweight, dbias = torch.empty_like(weight), torch.empty_like(norm_bias if bias is None else bias)
    launch(sliding.add_taps_kernel, ((1 + taps) * call.c_tiles,),
        table, dweight, dbias, None, None, segments.parts, 0, channels, taps, 0,
        BLOCK_P=sliding.MAX_PARTS, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, dnorm_weight, dnorm_bias, dweight, dbias
