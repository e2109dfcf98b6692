# SPDX-License-Identifier: Apache-2.0
"""The elementwise passes around the two products of NonlinAttention, over (frames, batch, width).

s, v, z are the thirds of a row of P; o and dx are (batch, frames, width), as the products give them:

    gate       x = v tanh(s)
    product    y = o z
    operands   x again, and u = grad z
    gradient   ds = dx v (1 - tanh(s)^2)    dv = dx tanh(s)    dz = grad o

Bytes per element of y, of e bytes: 3e, 3e, 6e and 8e. One pass each, in float32, rounded once. A program takes a tile
of frames of one sequence, so that rows of either layout are evenly spaced.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import TANH, activate_with_slope
from fastasr.kernels._launch import cdiv, launch

ELEMENTS, MOST, LEAST, NUM_WARPS = 1024, 128, 32, 4  # elements of a tile, and the bounds of its channels


@triton.jit
def _tile(frames, width, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the frames, the channels and the mask of this program's tile."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return t, c, (t < frames)[:, None] & (c < width)[None, :]


@triton.jit(do_not_specialize=["frames"])
def gate_kernel(
    P, X, frames, batch, width, stride, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PRECISE: tl.constexpr
):
    t, c, keep = _tile(frames, width, BLOCK_T, BLOCK_C)
    rows = t * batch + tl.program_id(2)
    at = rows[:, None] * stride + c[None, :]  # [BLOCK_T, BLOCK_C]
    s = tl.load(P + at, mask=keep, other=0.0).to(tl.float32)
    v = tl.load(P + at + width, mask=keep, other=0.0).to(tl.float32)
    y, _ = activate_with_slope(s, TANH, PRECISE)
    tl.store(X + rows[:, None] * width + c[None, :], (v * y).to(X.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames"])
def product_kernel(P, SUMS, Y, frames, batch, width, stride, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    t, c, keep = _tile(frames, width, BLOCK_T, BLOCK_C)
    rows, across = t * batch + tl.program_id(2), tl.program_id(2).to(tl.int64) * frames + t
    z = tl.load(P + rows[:, None] * stride + 2 * width + c[None, :], mask=keep, other=0.0).to(tl.float32)
    o = tl.load(SUMS + across[:, None] * width + c[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(Y + rows[:, None] * width + c[None, :], (o * z).to(Y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames"])
def operands_kernel(
    GRAD, P, CONSTANT, X, U, frames, batch, width, stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    t, c, keep = _tile(frames, width, BLOCK_T, BLOCK_C)
    rows = t * batch + tl.program_id(2)
    at, dense = rows[:, None] * stride + c[None, :], rows[:, None] * width + c[None, :]  # [BLOCK_T, BLOCK_C]
    s = tl.load(P + at, mask=keep, other=0.0).to(tl.float32)
    v = tl.load(P + at + width, mask=keep, other=0.0).to(tl.float32)
    z = tl.load(P + at + 2 * width, mask=keep, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + dense, mask=keep, other=0.0).to(tl.float32)
    y, _ = activate_with_slope(s, TANH, PRECISE)
    x = v * y
    if CONSTANT is not None:
        x = tl.where(tl.load(CONSTANT) != 0.0, 0.0, x)
    tl.store(X + dense, x.to(X.dtype.element_ty), mask=keep)
    tl.store(U + dense, (grad * z).to(U.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["frames"])
def gradient_kernel(
    DX, GRAD, P, SUMS, DP, frames, batch, width, stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    t, c, keep = _tile(frames, width, BLOCK_T, BLOCK_C)
    rows, across = t * batch + tl.program_id(2), tl.program_id(2).to(tl.int64) * frames + t
    at, batch_major = rows[:, None] * stride + c[None, :], across[:, None] * width + c[None, :]
    s = tl.load(P + at, mask=keep, other=0.0).to(tl.float32)
    v = tl.load(P + at + width, mask=keep, other=0.0).to(tl.float32)
    dx = tl.load(DX + batch_major, mask=keep, other=0.0).to(tl.float32)
    y, slope = activate_with_slope(s, TANH, PRECISE)
    out = rows[:, None] * (3 * width) + c[None, :]
    tl.store(DP + out, (dx * v * slope).to(DP.dtype.element_ty), mask=keep)
    tl.store(DP + out + width, (dx * y).to(DP.dtype.element_ty), mask=keep)
    grad = tl.load(GRAD + rows[:, None] * width + c[None, :], mask=keep, other=0.0).to(tl.float32)
    o = tl.load(SUMS + batch_major, mask=keep, other=0.0).to(tl.float32)
    tl.store(DP + out + 2 * width, (grad * o).to(DP.dtype.element_ty), mask=keep)


def tile(width: int) -> dict[str, int]:
    """Returns the tile that reaches least past the end of a row, the widest of these."""
    block_c = min((MOST, MOST // 2, LEAST), key=lambda block: cdiv(width, block) * block)
    return {"BLOCK_T": ELEMENTS // block_c, "BLOCK_C": block_c, "num_warps": NUM_WARPS}


def _launch(kernel, projected: torch.Tensor, *tensors: torch.Tensor, **options) -> None:
    frames, batch, channels = projected.shape
    width = channels // 3
    if projected.numel() == 0:
        return
    stride = projected.stride(1) if batch > 1 else projected.stride(0) if frames > 1 else channels
    shape = tile(width)
    grid = (cdiv(frames, shape["BLOCK_T"]), cdiv(width, shape["BLOCK_C"]), batch)
    launch(kernel, grid, *tensors, frames, batch, width, stride, **shape, **options)


def _like(projected: torch.Tensor, parts: int = 1) -> torch.Tensor:
    frames, batch, channels = projected.shape
    return projected.new_empty((frames, batch, parts * (channels // 3)))


def _precise(projected: torch.Tensor) -> dict:
    return {"PRECISE": projected.dtype is torch.float32}


def _padded(projected: torch.Tensor, rows: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns room for x (T, B, D), and the tensor of which it is the beginning: it has ``rows`` rows (None: T), with
    zeros behind x.
    """
    frames, batch, channels = projected.shape
    whole = projected.new_empty((rows or frames, batch, channels // 3))
    if rows is not None and rows > frames:
        whole[frames:].zero_()
    return whole[:frames], whole


def nonlin_attention_gate(projected: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Returns x (T, B, D) of projected (T, B, 3 D), whose rows are dense and evenly spaced; with ``rows``, so many,
    with zeros behind x.
    """
    x, whole = _padded(projected, rows)
    _launch(gate_kernel, projected, projected, x, **_precise(projected))
    return whole


def nonlin_attention_product(projected: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """Returns y (T, B, D) of o (B, T, D)."""
    y = _like(projected)
    _launch(product_kernel, projected, projected, o, y)
    return y


def nonlin_attention_operands(
    grad: torch.Tensor, projected: torch.Tensor, rows: int | None = None, constant: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x, as ``nonlin_attention_gate``, and u, (T, B, D). Where the number ``constant`` is not 0, x is 0: the
    weights have no gradient then.
    """
    (x, whole), u = _padded(projected, rows), _like(projected)
    _launch(operands_kernel, projected, grad, projected, constant, x, u, **_precise(projected))
    return whole, u


def nonlin_attention_gradient(
    dx: torch.Tensor, grad: torch.Tensor, projected: torch.Tensor, o: torch.Tensor
) -> torch.Tensor:
    """Returns the gradient of projected, (T, B, 3 D), for dx and o (B, T, D)."""
    dprojected = _like(projected, 3)
    _launch(gradient_kernel, projected, dx, grad, projected, o, dprojected, **_precise(projected))
    return dprojected
