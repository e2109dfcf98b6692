# SPDX-License-Identifier: Apache-2.0
"""Swoosh activations, optionally times a dropout mask, forward and backward in one pass over memory each.

    swoosh(x)  = log(1 + exp(x - a)) - 0.08 x - c
                 SwooshL: a = 4, c = 0.035; SwooshR: a = 1, c = 0.313261687
    swoosh'(x) = sigmoid(x - a) - 0.08
    forward:  y  = swoosh(x) * mask
    backward: dx = grad * mask * swoosh'(x), and y once more for the weight gradient of a linear that follows

With z = x - a and u = exp(-|z|) in [0, 1], nothing overflows:

    log(1 + exp(z)) = max(z, 0) + log1p(u)             sigmoid(z) = (1 if z > 0 else u) / (1 + u)

log1p is a polynomial: Triton's log costs about 40 instructions per element, this one 9 (6 for 16-bit outputs).

Bytes per element of e bytes: forward 2e, backward 3e, or 4e with y; a shared mask adds next to nothing.
Instructions per element, counted in SASS: forward 28 (18 for 16-bit outputs), backward 34 (19), with y 47
(31). A 1500x20x512 bf16 tensor takes 14 us forward and 21 us backward at 4.3 TB/s; the instructions issue in
9 and 10 us: memory-bound.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._flat import flat_range, flat_tail
from fastasr.kernels._launch import cdiv, launch
from fastasr.kernels._swoosh import exp_minus_abs, swoosh, swoosh_slope
from fastasr.kernels._vectors import load

# 16 elements per thread: two (16-bit) or four (32-bit) 128-bit loads in flight in every thread.
BLOCK = 2048
NUM_WARPS = 4

NO_MASK, FULL_MASK, ROW_MASK, COLUMN_MASK, NAMED_MASK = 0, 1, 2, 3, 4  # NAMED: each row of x names its row


@triton.jit
def _forward_at(X, Y, offsets, keep, mask, RIGHT: tl.constexpr):
    SHORT: tl.constexpr = Y.dtype.element_ty.primitive_bitwidth == 16
    x = load(X + offsets, keep)
    z, u = exp_minus_abs(x, RIGHT, SHORT)
    y = swoosh(x, z, u, RIGHT, SHORT) * mask
    tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=keep)


@triton.jit
def _backward_at(GRAD, X, DX, Y, offsets, keep, mask, RIGHT: tl.constexpr, OUTPUT: tl.constexpr):
    SHORT: tl.constexpr = DX.dtype.element_ty.primitive_bitwidth == 16
    x = tl.load(X + offsets, mask=keep, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + offsets, mask=keep, other=0.0).to(tl.float32)
    z, u = exp_minus_abs(x, RIGHT, SHORT)
    dx = grad * mask * swoosh_slope(z, u, SHORT)
    tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=keep)
    if OUTPUT:
        y = swoosh(x, z, u, RIGHT, SHORT) * mask
        tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=keep)


@triton.jit
def _tile_range(
    MASK, MASK_ROW, rows, columns, row_tiles, column_tiles,
    KIND: tl.constexpr, GROUPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Returns offsets, bounds and mask values of this program's tile of x viewed as (group, rows,
    columns).
    """
    program = tl.program_id(0)
    row_tile = program // column_tiles
    column_tile = program - row_tile * column_tiles
    group = 0
    if GROUPED:
        group = row_tile // row_tiles
        row_tile -= group * row_tiles
        group = group.to(tl.int64)
    r = row_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = column_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    offsets = (group * rows + r)[:, None] * columns + c[None, :]  # [BLOCK_R, BLOCK_C]
    keep = (r < rows)[:, None] & (c < columns)[None, :]
    if KIND == 4:  # NAMED_MASK: (any, columns)
        row = tl.load(MASK_ROW + r, mask=r < rows, other=0)
        mask = tl.load(MASK + row[:, None] * columns + c[None, :], mask=keep, other=0.0).to(tl.float32)
    elif KIND == 3:  # COLUMN_MASK: (group, columns)
        mask = tl.load(MASK + group * columns + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    else:  # ROW_MASK: (rows,)
        mask = tl.load(MASK + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    return offsets, keep, mask


@triton.jit(do_not_specialize=["groups", "tail"])
def forward_flat(
    X, MASK, Y, groups, tail, RIGHT: tl.constexpr, KIND: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr
):
    offsets, keep = flat_range(groups, BLOCK)
    mask = 1.0
    if KIND == 1:
        mask = tl.load(MASK + offsets, mask=keep, other=0.0).to(tl.float32)
    _forward_at(X, Y, offsets, keep, mask, RIGHT)
    if TAIL:
        offsets, keep = flat_tail(groups, tail)
        mask = 1.0
        if KIND == 1:
            mask = tl.load(MASK + offsets, mask=keep, other=0.0).to(tl.float32)
        _forward_at(X, Y, offsets, keep, mask, RIGHT)


@triton.jit(do_not_specialize=["rows", "row_tiles", "column_tiles"])
def forward_tile(
    X, MASK, MASK_ROW, Y, rows, columns, row_tiles, column_tiles,
    RIGHT: tl.constexpr, KIND: tl.constexpr, GROUPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C:
    tl.constexpr,
):  # fmt: skip
    offsets, keep, mask = _tile_range(
        MASK, MASK_ROW, rows, columns, row_tiles, column_tiles, KIND, GROUPED, BLOCK_R, BLOCK_C
    )
    _forward_at(X, Y, offsets, keep, mask, RIGHT)


@triton.jit(do_not_specialize=["groups", "tail"])
def backward_flat(
    GRAD, X, MASK, DX, Y, groups, tail,
    RIGHT: tl.constexpr, KIND: tl.constexpr, OUTPUT: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, keep = flat_range(groups, BLOCK)
    mask = 1.0
    if KIND == 1:
        mask = tl.load(MASK + offsets, mask=keep, other=0.0).to(tl.float32)
    _backward_at(GRAD, X, DX, Y, offsets, keep, mask, RIGHT, OUTPUT)
    if TAIL:
        offsets, keep = flat_tail(groups, tail)
        mask = 1.0
        if KIND == 1:
            mask = tl.load(MASK + offsets, mask=keep, other=0.0).to(tl.float32)
        _backward_at(GRAD, X, DX, Y, offsets, keep, mask, RIGHT, OUTPUT)


@triton.jit(do_not_specialize=["rows", "row_tiles", "column_tiles"])
def backward_tile(
    GRAD, X, MASK, MASK_ROW, DX, Y, rows, columns, row_tiles, column_tiles,
    RIGHT: tl.constexpr, KIND: tl.constexpr, OUTPUT: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offsets, keep, mask = _tile_range(
        MASK, MASK_ROW, rows, columns, row_tiles, column_tiles, KIND, GROUPED, BLOCK_R, BLOCK_C
    )
    _backward_at(GRAD, X, DX, Y, offsets, keep, mask, RIGHT, OUTPUT)


def _view(shape: torch.Size, shared_dim: int) -> tuple[int, int, int, int]:
    """Returns (groups, rows, columns, kind) of a tensor whose mask is constant along ``shared_dim``."""
    outer, size, inner = shape[:shared_dim].numel(), shape[shared_dim], shape[shared_dim + 1 :].numel()
    if inner == 1:
        return 1, outer, size, ROW_MASK
    return outer, size, inner, COLUMN_MASK


def _launch(flat, tile, before, mask, after, shape, shared_dim: int, mask_row, **options) -> None:
    """Runs ``flat`` on (*before, mask, *after), or ``tile`` on (*before, mask, mask_row, *after) when rows share the
    mask.
    """
    numel = shape.numel()
    if mask is None or (shared_dim < 0 and mask_row is None):
        options |= {"KIND": NO_MASK if mask is None else FULL_MASK, "TAIL": numel % 16 != 0, "BLOCK": BLOCK}
        grid = (max(1, cdiv(numel // 16 * 16, BLOCK)),)
        launch(flat, grid, *before, mask, *after, numel // 16, numel % 16, num_warps=NUM_WARPS, **options)
        return
    if mask_row is None:
        groups, rows, columns, kind = _view(shape, shared_dim)
    else:
        groups, rows, columns, kind = 1, mask_row.numel(), shape[-1], NAMED_MASK
    block_c = 32 if columns <= 32 else 256
    block_r = BLOCK // block_c
    tiles = cdiv(rows, block_r), cdiv(columns, block_c)
    options |= {"KIND": kind, "GROUPED": groups > 1, "BLOCK_R": block_r, "BLOCK_C": block_c}
    grid = (groups * tiles[0] * tiles[1],)
    launch(tile, grid, *before, mask, mask_row, *after, rows, columns, *tiles, num_warps=NUM_WARPS, **options)


def swoosh_forward(
    x: torch.Tensor,
    swoosh_r: bool,
    mask: torch.Tensor | None,
    shared_dim: int,
    mask_row: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns swoosh(x), times ``mask`` if there is one.

    ``swoosh_r`` chooses SwooshR, else SwooshL. ``mask`` has x's shape, or size 1 in the non-negative ``shared_dim``
    (-1: full size or no mask), or with ``mask_row`` (...), int64, it is (R, K), and the rows of x (..., K) name theirs.
    The result has x's shape and the promoted dtype of x and mask.
    """
    dtype = x.dtype if mask is None else torch.promote_types(x.dtype, mask.dtype)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        _launch(forward_flat, forward_tile, (x,), mask, (y,), x.shape, shared_dim, mask_row, RIGHT=swoosh_r)
    return y


def swoosh_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    swoosh_r: bool,
    mask: torch.Tensor | None,
    shared_dim: int,
    mask_row: torch.Tensor | None,
    need_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (grad * mask * swoosh'(x) in x's dtype, swoosh(x) * mask as the forward returns it).

    The second is an empty tensor of 0 elements unless ``need_output``. ``grad`` has the forward's shape.
    """
    dtype = x.dtype if mask is None else torch.promote_types(x.dtype, mask.dtype)
    dx = torch.empty_like(x)
    y = torch.empty_like(x, dtype=dtype) if need_output else x.new_empty(0, dtype=dtype)
    if x.numel():
        after = (dx, y if need_output else None)
        options = {"RIGHT": swoosh_r, "OUTPUT": need_output}
        _launch(
            backward_flat, backward_tile, (grad, x), mask, after, x.shape, shared_dim, mask_row, **options
        )
    return dx, y
