# SPDX-License-Identifier: Apache-2.0
"""Bypass: a learned mix of a layer's input and output, forward and backward, one pass over memory each.

    y = x_orig + (x - x_orig) * scale
    dx_orig = grad (1 - scale)      dx = grad scale      dscale = sum over the dimensions scale lacks of
                                                                  grad (x - x_orig)

On a row of recordings the scale is 0 in those that skip the module, which numbers on the device say.

x is seen as a matrix (rows, K) with K = scale.numel(): scale is (C,) or (B, C), the last dimensions of x.

Bytes per element of e bytes: forward 3e, backward 5e. FLOPs per element: 3 and 5. A 1500x20x192 bf16 tensor
takes 8 us forward and 13 us backward at 4.3 TB/s.

In the backward, each program walks its share of the rows of 64 or 256 columns, adds up dscale in registers, and
writes it as one row of a float32 table; a second kernel adds the rows of the table in float64 (_parts.py).
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._launch import cdiv, launch
from fastasr.kernels._parts import WARPS, add_parts, split_rows
from fastasr.kernels._vectors import neighbours

NUM_WARPS = 4  # forward


@triton.jit
def _where_kept(values, DRAWN, RATE, OF, r, rows):
    """Returns values of rows r, 0 in the rows of recordings whose number is not above the rate."""
    if DRAWN is not None:
        number = tl.load(DRAWN + tl.load(OF + r, mask=r < rows, other=0)).to(tl.float32)
        values = tl.where((number > tl.load(RATE).to(tl.float32))[:, None], values, 0.0)
    return values


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["DRAWN", "RATE", "OF"])
def forward_kernel(
    X_ORIG, X, SCALE, DRAWN, RATE, OF, Y, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    column_tiles = tl.cdiv(columns, BLOCK_C)
    r = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_C + neighbours(BLOCK_C, X_ORIG, X)
    offsets = r[:, None] * columns + c[None, :]  # [BLOCK_R, BLOCK_C]
    keep = (r < rows)[:, None] & (c < columns)[None, :]
    x_orig = tl.load(X_ORIG + offsets, mask=keep, other=0.0).to(tl.float32)
    x = tl.load(X + offsets, mask=keep, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + c, mask=c < columns, other=0.0).to(tl.float32)
    y = tl.fma(
        _where_kept(x - x_orig, DRAWN, RATE, OF, r, rows), tl.broadcast_to(scale[None, :], x.shape), x_orig
    )
    tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=keep)


@triton.jit(
    do_not_specialize=["rows", "rows_per_part"], do_not_specialize_on_alignment=["DRAWN", "RATE", "OF"]
)
def backward_kernel(
    GRAD, X_ORIG, X, SCALE, DRAWN, RATE, OF, DX_ORIG, DX, PARTS, rows, rows_per_part, columns,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(columns, BLOCK_C)
    part = (tl.program_id(0) // column_tiles).to(tl.int64)
    c = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_C + neighbours(BLOCK_C, X_ORIG, X)
    in_row = c < columns
    scale = tl.load(SCALE + c, mask=in_row, other=0.0).to(tl.float32)
    scale = tl.broadcast_to(scale[None, :], [BLOCK_R, BLOCK_C])
    dscale = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        offsets = r[:, None] * columns + c[None, :]  # [BLOCK_R, BLOCK_C]
        keep = (r < end)[:, None] & in_row[None, :]
        grad = tl.load(GRAD + offsets, mask=keep, other=0.0).to(tl.float32)
        x_orig = tl.load(X_ORIG + offsets, mask=keep, other=0.0).to(tl.float32)
        x = tl.load(X + offsets, mask=keep, other=0.0).to(tl.float32)
        kept = _where_kept(grad, DRAWN, RATE, OF, r, end)
        dx_orig = tl.fma(-kept, scale, grad)  # one rounding: grad (1 - scale) would have two
        tl.store(DX_ORIG + offsets, dx_orig.to(DX_ORIG.dtype.element_ty), mask=keep)
        tl.store(DX + offsets, (kept * scale).to(DX.dtype.element_ty), mask=keep)
        dscale = tl.fma(kept, x - x_orig, dscale)
        first += BLOCK_R
    tl.store(PARTS + part * columns + c, column_sums(dscale), mask=in_row)


def _block_columns(columns: int) -> int:
    return 32 if columns <= 32 else 256


def backward_columns(columns: int, dtype: torch.dtype) -> int:
    """Returns the columns of a tile of the backward, for an output of that dtype.

    With 256, a quarter of the lanes is idle at 192 columns: 64 took less time on an H200. In float32 they stay, as a
    part of 64 columns has more rows: their sum, one chain, was further off than eager's.
    """
    return 64 if columns > 32 and dtype.itemsize == 2 else _block_columns(columns)


def _output_dtype(x_orig: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x_orig.dtype, x.dtype), scale.dtype)


def bypass_forward(
    x_orig: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, numbers=None, rate=None, of=None
) -> torch.Tensor:
    """Returns x_orig + (x - x_orig) * scale; x_orig and x have one shape, which ends in scale's shape.

    Returns that shape in the promoted dtype of all three. With ``numbers`` (R,) it is x_orig in the rows ``of`` whose
    number is not above the rate; the scale is (C,) then.
    """
    y = torch.empty_like(x, dtype=_output_dtype(x_orig, x, scale))
    if x.numel():
        columns = scale.numel()
        rows = x.numel() // columns
        block_c = _block_columns(columns)
        block_r = 2048 // block_c
        launch(forward_kernel, (cdiv(rows, block_r) * cdiv(columns, block_c),),
            x_orig, x, scale, numbers, rate, of, y, rows, columns,
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


def bypass_backward(
    grad: torch.Tensor,
    x_orig: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    numbers=None,
    rate=None,
    of=None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx_orig, dx, dscale) in the dtypes and shapes of x_orig, x and scale; ``grad`` is the
    output's gradient.
    """
    dx_orig, dx = torch.empty_like(x_orig), torch.empty_like(x)
    if not x.numel():
        return dx_orig, dx, torch.zeros_like(scale)
    columns = scale.numel()
    rows = x.numel() // columns
    block_c = backward_columns(columns, grad.dtype)
    column_tiles = cdiv(columns, block_c)
    block_r, rows_per_part, parts = split_rows(rows, block_c, x, column_tiles)
    dscale = torch.empty_like(scale)
    table = x.new_empty((parts, columns), dtype=torch.float32)
    launch(backward_kernel, (parts * column_tiles,),
        grad, x_orig, x, scale, numbers, rate, of, dx_orig, dx, table, rows, rows_per_part, columns,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    add_parts(table, dscale)
    return dx_orig, dx, dscale
