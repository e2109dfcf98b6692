# SPDX-License-Identifier: Apache-2.0
"""The sum over rows, which is the gradient of a linear layer's bias: x is read once, in two kernels (_parts.py)."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._launch import cdiv, launch
from fastasr.kernels._parts import WARPS, add_parts, split_rows
from fastasr.kernels._vectors import load

COLUMNS = 64  # columns of a tile: models have multiples of 64 channels
PROGRAMS = 4  # programs per multiprocessor, to keep as many bytes in flight as memory needs


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def sum_kernel(X, PARTS, rows, rows_per_part, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Writes a part's sums of the columns of X."""
    column_tiles = tl.cdiv(columns, BLOCK_C)
    part = (tl.program_id(0) // column_tiles).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    X += part * rows_per_part * columns
    left = tl.minimum(rows - part * rows_per_part, rows_per_part).to(tl.int32)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, left, BLOCK_R):
        keep = (start + r < left)[:, None] & (c < columns)[None, :]
        total += load(X + r[:, None] * columns + c[None, :], keep)
        X += BLOCK_R * columns
    total = column_sums(total.to(PARTS.dtype.element_ty))
    tl.store(PARTS + part * columns + c, total, mask=c < columns)


def sum_rows(x: torch.Tensor, later: Callable[..., bool] | None = None) -> torch.Tensor:
    """Returns the sums over all dimensions of a contiguous, not empty x but the last, added up in float32 within a
    program, in float64 among them and, of float32, within its tile. ``later`` is that of ``add_parts``.
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    column_tiles = cdiv(columns, COLUMNS)
    block_r, rows_per_part, parts = split_rows(rows, COLUMNS, x, column_tiles, resident=PROGRAMS)
    table = x.new_empty((parts, columns), dtype=torch.float64 if x.dtype == torch.float32 else torch.float32)
    total = x.new_empty(columns)
    launch(sum_kernel, (parts * column_tiles,),
        x, table, rows, rows_per_part, columns, BLOCK_R=block_r, BLOCK_C=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    add_parts(table, total, later)
    return total
