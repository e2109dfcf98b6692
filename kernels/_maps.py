# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution of maps (B, T, F, C), zeros around them, and the gradients of its parameters.

Column by column of the taps, a thread convolves a group of frames of one pixel along time (_sliding_taps.py): each
frame is loaded once for all taps of a column. Threads of a program have neighbouring pixels, so that most loads come
from the first-level cache. The weights lie as rows of channels, in float32 (one small copy).
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels import _sliding_taps as sliding
from fastasr.kernels._launch import cdiv, launch
from fastasr.kernels._parts import sum_parts
from fastasr.kernels._vectors import load

MOST_FRAMES = 16  # A group has at most this many frames.
BLOCK_G, BLOCK_C, NUM_WARPS = sliding.BLOCK_G, sliding.BLOCK_C, 4  # groups and channels of a tile
MAX_PARTS = 128


@triton.jit(do_not_specialize=["frames", "out_frames", "pad_t", "pad_f", "rows"])
def forward_kernel(
    X, TABLE, BIAS, Y, frames, out_frames, pad_t, pad_f, rows,
    WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, C: tl.constexpr, TAPS_F: tl.constexpr, TURNED: tl.constexpr,
    RESIDUAL: tl.constexpr, TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A row: one pixel of GROUP frames, (b, t / GROUP, f). TABLE: (taps, C). RESIDUAL: y is of x's size. Widths and
    # channels are constants, so that steps to the next frame or tap cost no instruction.
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // c_tiles * BLOCK_G + tl.arange(0, BLOCK_G)
    groups = tl.cdiv(out_frames, GROUP)
    f = row % OUT_WIDTH
    t = row // OUT_WIDTH % groups * GROUP
    b = (row // OUT_WIDTH // groups).to(tl.int64)
    in_row = c < C
    pixel = f - pad_f
    at = X + (((b * frames + (t - pad_t)) * WIDTH + pixel) * C)[:, None] + c[None, :]
    # One tap per group: a row of taps would be laid out anew in shared memory.
    taps = TABLE + tl.broadcast_to(c[None, :], at.shape)
    if TURNED:
        taps += (TAPS * TAPS_F - 1) * C
    w_step: tl.constexpr = -TAPS_F * C if TURNED else TAPS_F * C
    z = sliding.zeros(GROUP, BLOCK_G, BLOCK_C)
    for _j in range(TAPS_F):
        span = tl.where((pixel.to(tl.uint32) < WIDTH) & (row < rows), frames, 0)
        z = sliding.sums(z, at, t - pad_t, span, taps, in_row, WIDTH * C, w_step, TAPS, GROUP)
        pixel += 1
        at += C
        taps += -C if TURNED else C
    bias = tl.zeros([1, BLOCK_C], tl.float32)
    if BIAS is not None:
        bias += tl.load(BIAS + c, mask=in_row, other=0.0).to(tl.float32)[None, :]
    y_step: tl.constexpr = OUT_WIDTH * C
    at = (((b * out_frames + t) * OUT_WIDTH + f) * C)[:, None] + c[None, :]
    results = ()
    for r in tl.static_range(GROUP):
        y = z[r] + bias
        if RESIDUAL:
            keep = ((t + r < out_frames) & (row < rows))[:, None] & in_row[None, :]
            y += load(X + at + r * y_step, keep)
        results += (y.to(Y.dtype.element_ty),)
    for r in tl.static_range(GROUP):
        keep = ((t + r < out_frames) & (row < rows))[:, None] & in_row[None, :]
        tl.store(Y + at + r * y_step, results[r], mask=keep)


@triton.jit
def add_map_taps(PARTS, DWEIGHT, DBIAS, parts, C, taps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds up the rows of a table (parts, taps + 1, C), whose last row of each part is the bias's."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    k = pid // c_tiles
    p = tl.arange(0, BLOCK_P)
    keep = (p < parts)[:, None] & (c < C)[None, :]
    total = sum_parts(PARTS + ((p[:, None] * (taps + 1) + k) * C + c[None, :]), keep)
    if k < taps:
        if DWEIGHT is not None:
            tl.store(DWEIGHT + c * taps + k, total.to(DWEIGHT.dtype.element_ty), mask=c < C)
    else:
        if DBIAS is not None:
            tl.store(DBIAS + c, total.to(DBIAS.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["parts"])
def add_map_taps_kernel(PARTS, DWEIGHT, DBIAS, parts, C, taps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    add_map_taps(PARTS, DWEIGHT, DBIAS, parts, C, taps, BLOCK_P, BLOCK_C)


def form(taps: int, frames: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the constants of the convolving kernel, for taps of a column."""
    few = taps < sliding.FEW
    group = sliding.group_of(frames, 4 if few else MOST_FRAMES)
    block = (
        BLOCK_G if few or dtype != torch.float32 else BLOCK_G // 2
    )  # float32 would spill with as many groups
    return {"TAPS": taps, "GROUP": group, "BLOCK_G": block, "BLOCK_C": BLOCK_C}


def convolve(op: str, x, weight, bias, padding, out_size, flip: bool, residual: bool = False) -> torch.Tensor:
    """Returns the convolution of x with the taps (reversed if ``flip``), plus x itself if ``residual``. out_size is
    (frames, width) of the result. Errors name ``op``.
    """
    batch, frames, width, channels = x.shape
    taps_t, taps_f = weight.shape[-2:]
    y = x.new_empty(batch, *out_size, channels)
    if not y.numel():
        return y
    constants = form(taps_t, out_size[0], x.dtype)
    group = constants["GROUP"]
    rows = batch * cdiv(out_size[0], group) * out_size[1]
    _check_rows(op, max(group * rows, batch * frames * width))
    table = weight.new_empty(taps_t * taps_f, channels, dtype=torch.float32)
    table.copy_(weight.view(channels, taps_t * taps_f).t())  # rows of channels
    grid = (cdiv(rows, constants["BLOCK_G"]) * cdiv(channels, BLOCK_C),)
    launch(forward_kernel, grid,
        x, table, bias, y, frames, out_size[0], *padding, rows,
        WIDTH=width, OUT_WIDTH=out_size[1], C=channels, TAPS_F=taps_f, TURNED=flip, RESIDUAL=residual, **constants,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


def parameter_gradients(
    op: str, grad, x, weight, padding, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns (dweight, dbias) of a convolution of x with this padding, None where not needed: dbias in the promoted
    dtype of x and weight.
    """
    batch, frames, width, channels = x.shape
    taps_t, taps_f = weight.shape[-2:]
    bias_dtype = torch.promote_types(x.dtype, weight.dtype)
    if not grad.numel():
        dweight = torch.zeros_like(weight) if need_weight else None
        return dweight, x.new_zeros(channels, dtype=bias_dtype) if need_bias else None
    _check_rows(op, max(grad.shape[:3].numel(), batch * frames * width))
    out_frames, out_width = grad.shape[1:3]
    segments = sliding.Segments(out_frames, batch * out_width, out_frames, taps_t, 1, MAX_PARTS, x.dtype)
    taps = taps_t * taps_f
    table = torch.empty(segments.parts, taps + 1, channels, dtype=torch.float32, device=x.device)
    steps = (sliding.Steps(BLOCK_C, t.stride(0), t.stride(1), t.stride(1)) for t in (grad, x))
    shape = sliding.Map(out_width, width, taps_f, padding[1])
    more = frames - out_frames
    sliding.gradients(
        grad, x, table, segments, *steps, batch, channels, padding[0] + more, more, 0, taps, False, shape
    )
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = x.new_empty(channels, dtype=bias_dtype) if need_bias else None
    launch(add_map_taps_kernel, ((taps + 1) * cdiv(channels, BLOCK_C),),
        table, dweight, dbias, segments.parts, channels, taps,
        BLOCK_P=MAX_PARTS, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dweight, dbias


def _check_rows(op: str, rows: int) -> None:
    if rows + BLOCK_G * MOST_FRAMES >= 2**31:
        raise ValueError(f"fastasr.{op}: x: expected fewer than 2**31 pixels on CUDA, got {rows}")
