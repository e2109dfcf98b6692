# SPDX-License-Identifier: Apache-2.0
"""Sums over rows in two kernels: every program of the first adds up the rows of its part, the second adds up the parts.

One or two programs of 16 warps on each multiprocessor have as many rows in flight as several small ones would, and the
table of the parts stays small: half a megabyte for two sums of 512 columns. Which rows a part has depends on their
number and on the device's multiprocessors: on one kind of device results repeat bit for bit, without atomics.
"""

import torch
import triton

from fastasr.kernels._launch import processors

ELEMENTS = 4096  # of a tile: 8 in each thread
WARPS = 16
ADDING = {"BLOCK_C": 8, "num_warps": 8}


def deal(
    rows: int, columns: int, like: torch.Tensor, tiles: int = 1, elements: int = ELEMENTS, resident: int = 1
) -> tuple[int, int, int]:
    """Returns (rows per tile of that many columns, rows per part, parts) for ``tiles`` programs of each part, of which
    a multiprocessor of the tensor's device holds ``resident``.
    """
    block = max(1, elements // columns)
    most = max(1, resident * processors(like) // tiles)
    rows_per_part = triton.cdiv(triton.cdiv(rows, most), block) * block
    return block, rows_per_part, triton.cdiv(rows, rows_per_part)


def adding(parts: int) -> dict[str, int]:
    """Returns the tile and the warps of a kernel that adds up so many parts."""
    return {"BLOCK_P": max(128, triton.next_power_of_2(parts)), **ADDING}
