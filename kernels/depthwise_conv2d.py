# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution of maps (B, T, F, C), zeros around them, forward and backward.

    y[b, t, f, c] = bias[c] + sum_(i < K, j < L) w[c, i, j] x[b, t + i - P, f + j - Q, c]    (RESIDUAL: + x[b, t, f, c])
    dx: the same of the gradient g, taps turned around, padding (K - 1 - P, L - 1 - Q)
    dw[c, i, j] = sum_(b, t, f) g[b, t, f, c] x[b, t + i - P, f + j - Q, c]     dbias[c] = sum g

A program computes two frames of a tile of pixels and channels: each shifted tile of x is loaded once for both, from the
first-level cache but for its first use. The weights lie as rows of channels (one small copy). Launches: forward 2;
backward 3 for dx and dw with their parts, and one copy.

Bytes per element of e bytes: forward 2e; backward 2e for dx, 2e for dw. A 20x750x19x128 bf16 map at 4.3 TB/s: 34 us
forward, 68 us backward. The kernels are bound by instructions: two pixels per thread share the loads of weights, and
addresses and columns of a row are counted up (predicted for an H100 at 20x1500x19x128: 606 us, 900 with one pixel).
The weights' gradients are added up in parts that depend on the shape alone, and the parts in float64: results repeat
bit for bit, there are no atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BLOCK_R, BLOCK_C, NUM_WARPS = 32, 64, 4  # pixels and channels of a tile: 16 sums per thread and frame
TAPS, BLOCK_S = 8, 16  # a program's share of the taps' gradients: 64 sums per thread
MAX_PARTS = 64
LEAST_ROWS = 256  # least rows of a part


@triton.jit
def _add_row(
    X, TABLE, first, second, i, frame, f, pad_f, frames, width, taps_f, C, base, c, there,
    ONE: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Adds row i of the taps to the first frame and row i - 1 to the second."""
    in_time = (frame >= 0) & (frame < frames)
    pixel = tl.where(in_time, f - pad_f, width)  # of no column
    at = X + ((base + frame) * width + f - pad_f)[:, None] * C + c[None, :]
    row = TABLE + i * taps_f * C + c
    for _j in range(taps_f):
        keep = there & (pixel.to(tl.uint32) < width.to(tl.uint32))[:, None]
        x = tl.load(at, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_C]
        if ONE:
            w = tl.load(row, mask=c < C, other=0.0).to(tl.float32)
            first = tl.fma(x, w[None, :], first)
        if TWO:
            w = tl.load(row - taps_f * C, mask=c < C, other=0.0).to(tl.float32)
            second = tl.fma(x, w[None, :], second)
        pixel += 1
        at += C
        row += C
    return first, second


@triton.jit(do_not_specialize=["frames", "width", "out_frames", "out_width", "pad_t", "pad_f", "rows"])
def forward_kernel(
    X, TABLE, BIAS, Y, frames, width, out_frames, out_width, C, taps_t, taps_f, pad_t, pad_f, rows,
    RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A row: one pixel of two frames, (b, t / 2, f). TABLE: (taps, C). RESIDUAL: y is of x's size.
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // c_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    pairs = tl.cdiv(out_frames, 2)
    f = row % out_width
    t = row // out_width % pairs * 2
    b = row // out_width // pairs
    there = (row < rows)[:, None] & (c < C)[None, :]
    base = b.to(tl.int64) * frames
    first = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    start = t - pad_t
    first, second = _add_row(
        X, TABLE, first, second, 0, start, f, pad_f, frames, width, taps_f, C, base, c, there,
        ONE=True, TWO=False,
    )  # fmt: skip
    for i in range(1, taps_t):
        first, second = _add_row(
            X, TABLE, first, second, i, start + i, f, pad_f, frames, width, taps_f, C, base, c, there,
            ONE=True, TWO=True,
        )  # fmt: skip
    first, second = _add_row(
        X, TABLE, first, second, taps_t, start + taps_t, f, pad_f, frames, width, taps_f, C, base, c, there,
        ONE=False, TWO=True,
    )  # fmt: skip
    if BIAS is not None:
        bias = tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        first += bias
        second += bias
    at = ((b.to(tl.int64) * out_frames + t) * out_width + f)[:, None] * C + c[None, :]
    more = there & (t + 1 < out_frames)[:, None]
    if RESIDUAL:  # this load comes from the first-level cache
        first += tl.load(X + at, mask=there, other=0.0).to(tl.float32)
        second += tl.load(X + at + out_width * C, mask=more, other=0.0).to(tl.float32)
    tl.store(Y + at, first.to(Y.dtype.element_ty), mask=there)
    tl.store(Y + at + out_width * C, second.to(Y.dtype.element_ty), mask=more)


@triton.jit(
    do_not_specialize=[
        "frames",
        "width",
        "out_frames",
        "out_width",
        "pad_t",
        "pad_f",
        "rows",
        "rows_per_part",
    ]
)
def weight_gradient_kernel(
    G, X, PARTS, frames, width, out_frames, out_width, C, taps_t, taps_f, pad_t, pad_f, rows, rows_per_part,
    TAPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # TAPS taps of one row of the kernel, over a part's pixels of the output. PARTS: (parts, taps + 1, C), G's sum last.
    c_tiles, groups = tl.cdiv(C, BLOCK_C), tl.cdiv(taps_f, TAPS)
    pid = tl.program_id(0)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = pid // c_tiles
    j = rest % groups * TAPS + tl.arange(0, TAPS)
    i = rest // groups % taps_t
    part = rest // groups // taps_t
    in_row = c < C
    total = tl.zeros([TAPS, BLOCK_S, BLOCK_C], tl.float32)
    # float64 and few programs: bias gradients of few pixels would else be less exact than eager's
    sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    adds_bias = (i == 0) & (rest % groups == 0)
    steps = (j * C)[:, None, None]  # from a pixel's first tap to the others
    shifts = tl.where(j < taps_f, j, 1 << 30)
    start = part * rows_per_part
    end = tl.minimum(start + rows_per_part, rows)
    while start < end:
        r = start + tl.arange(0, BLOCK_S)
        f, t, b = r % out_width, r // out_width % out_frames, r // out_width // out_frames
        keep = (r < end)[:, None] & in_row[None, :]
        g = tl.load(G + r[:, None].to(tl.int64) * C + c[None, :], mask=keep, other=0.0).to(tl.float32)
        frame = t + i - pad_t
        near = tl.where((r < end) & (frame >= 0) & (frame < frames), f - pad_f, width)  # or of no column
        pixel = (near[None, :] + shifts[:, None]).to(
            tl.uint32
        )  # [TAPS, BLOCK_S], large left of the first column
        seen = pixel < width.to(tl.uint32)
        at = ((b.to(tl.int64) * frames + frame) * width + f - pad_f)[:, None] * C + c[None, :]
        x = tl.load(X + at[None, :, :] + steps, mask=seen[:, :, None] & in_row[None, None, :], other=0.0)
        total += x.to(tl.float32) * g[None, :, :]
        if adds_bias:
            sums += g.to(tl.float64)
        start += BLOCK_S
    at = PARTS + part.to(tl.int64) * (taps_t * taps_f + 1) * C + c
    keep = (j < taps_f)[:, None] & in_row[None, :]
    tl.store(at[None, :] + (i * taps_f + j)[:, None] * C, tl.sum(total, axis=1), mask=keep)
    if adds_bias:
        tl.store(at + taps_t * taps_f * C, tl.sum(sums, axis=0).to(tl.float32), mask=in_row)


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(PARTS, DWEIGHT, DBIAS, parts, C, taps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    k = pid // c_tiles
    p = tl.arange(0, BLOCK_P)
    keep = (p < parts)[:, None] & (c < C)[None, :]
    at = (p[:, None] * (taps + 1) + k) * C + c[None, :]
    table = tl.load(PARTS + at, mask=keep, other=0.0)  # [BLOCK_P, BLOCK_C]
    total = tl.sum(table.to(tl.float64), axis=0).to(tl.float32)
    if k < taps:
        if DWEIGHT is not None:
            tl.store(DWEIGHT + c * taps + k, total.to(DWEIGHT.dtype.element_ty), mask=c < C)
    else:
        if DBIAS is not None:
            tl.store(DBIAS + c, total.to(DBIAS.dtype.element_ty), mask=c < C)


def convolve(op: str, x, weight, bias, padding, out_size, flip: bool, residual: bool = False) -> torch.Tensor:
    """Returns the convolution of x with the taps (reversed if ``flip``), plus x itself if ``residual``. out_size is
    (frames, width) of the result. Errors name ``op``.
    """
    batch, frames, width, channels = x.shape
    taps_t, taps_f = weight.shape[-2:]
    y = x.new_empty(batch, *out_size, channels)
    if not y.numel():
        return y
    rows = batch * triton.cdiv(out_size[0], 2) * out_size[1]
    _check_rows(op, max(2 * rows, batch * frames * width))
    table = weight.view(channels, taps_t * taps_f).t()  # rows of channels
    table = table.flip(0).contiguous() if flip else table.contiguous()
    grid = (triton.cdiv(rows, BLOCK_R) * triton.cdiv(channels, BLOCK_C),)
    launch(forward_kernel, grid,
        x, table, bias, y, frames, width, *out_size, channels, taps_t, taps_f, *padding, rows,
        RESIDUAL=residual, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


def parameter_gradients(
    op: str, grad, x, weight, padding, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns (dweight, dbias) of a convolution of x with this padding, None where not needed."""
    batch, frames, width, channels = x.shape
    taps_t, taps_f = weight.shape[-2:]
    rows = grad.shape[:3].numel()
    if not grad.numel():
        dweight = torch.zeros_like(weight) if need_weight else None
        return dweight, weight.new_zeros(channels) if need_bias else None
    _check_rows(op, max(rows, batch * frames * width))
    rows_per_part = triton.cdiv(max(LEAST_ROWS, triton.cdiv(rows, MAX_PARTS)), BLOCK_S) * BLOCK_S
    parts = triton.cdiv(rows, rows_per_part)
    table = torch.empty(parts, taps_t * taps_f + 1, channels, dtype=torch.float32, device=x.device)
    c_tiles = triton.cdiv(channels, BLOCK_C)
    launch(weight_gradient_kernel, (parts * taps_t * triton.cdiv(taps_f, TAPS) * c_tiles,),
        grad, x, table, frames, width, *grad.shape[1:3], channels, taps_t, taps_f, *padding, rows, rows_per_part,
        TAPS=TAPS, BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = weight.new_empty(channels) if need_bias else None
    launch(add_parts_kernel, ((taps_t * taps_f + 1) * c_tiles,),
        table, dweight, dbias, parts, channels, taps_t * taps_f,
        BLOCK_P=MAX_PARTS, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dweight, dbias


def _check_rows(op: str, rows: int) -> None:
    if rows + BLOCK_R >= 2**31:
        raise ValueError(f"fastasr.{op}: x: expected fewer than 2**31 pixels on CUDA, got {rows}")


def depthwise_conv2d_forward(x, weight, bias, pad_t: int, pad_f: int) -> torch.Tensor:
    """Returns y of contiguous x (B, T, F, C), weight (C, 1, K, L) or (C, K, L) and bias (C,) or None, all
    of one dtype.
    """
    taps_t, taps_f = weight.shape[-2:]
    size = x.shape[1] + 2 * pad_t - taps_t + 1, x.shape[2] + 2 * pad_f - taps_f + 1
    return convolve("depthwise_conv2d", x, weight, bias, (pad_t, pad_f), size, False)


def depthwise_conv2d_backward(
    grad, x, weight, pad_t: int, pad_f: int, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dweight, dbias), each without elements if not needed."""
    op, nothing = "depthwise_conv2d", x.new_empty(0)
    dx = nothing
    if need_x:
        padding = weight.shape[-2] - 1 - pad_t, weight.shape[-1] - 1 - pad_f
        dx = convolve(op, grad, weight, None, padding, x.shape[1:3], True)
    if not (need_weight or need_bias):
        return dx, nothing, nothing
    found = parameter_gradients(op, grad, x, weight, (pad_t, pad_f), need_weight, need_bias)
    return dx, *(nothing if g is None else g for g in found)
