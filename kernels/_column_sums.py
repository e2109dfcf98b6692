# SPDX-License-Identifier: Apache-2.0
"""The sums over the rows of a tile, for kernels whose warps hold rows."""

import triton
import triton.language as tl

LEAST = tl.constexpr(64)  # columns from which whole columns go round


@triton.constexpr_function
def _halvings(rows: int) -> int:
    return rows.bit_length() - 1


@triton.jit
def column_sums(tile):
    """Returns the sums over the rows of a tile [R, C], sizes that are powers of 2, as a tree.

    ``tl.sum`` leaves the sums of each warp in shared memory a column at a time, so that most lanes of a warp wait for
    one bank, once to write and once to read. Here the tile itself goes through shared memory, in an order without such
    waits; then each thread holds whole columns and adds up their halves. Narrow tiles have too few columns for that.
    """
    if tile.shape[1] < LEAST:
        total = tl.sum(tile, axis=0)
    else:
        columns = tl.trans(tile)
        for _ in tl.static_range(_halvings(tile.shape[0])):
            even, odd = tl.split(tl.reshape(columns, [columns.shape[0], columns.shape[1] // 2, 2]))
            columns = even + odd
        total = tl.reshape(columns, [tile.shape[1]])
    return total
