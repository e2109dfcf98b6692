# SPDX-License-Identifier: Apache-2.0
"""The relative shift of Transformer-XL in registers.

Queries i0 + m and keys j0 + n of a tile of BLOCK_M x BLOCK_N meet the offsets j - i of a band of BLOCK_M + BLOCK_N - 1
rows of positions. Its products with the queries come from tensor cores, in pieces of BLOCK_N columns; the tile is
column n - m + BLOCK_M - 1 of row m: each row one further left than the one above. Of the columns that are a multiple of
BLOCK_N apart a row needs one: the pieces are merged, and one rotation of rows is the shift. The tile of the next keys
needs one new piece.
"""

import triton
import triton.language as tl


@triton.jit
def _diagonal(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: m + n, from BLOCK_M - 1 on where the tile needs the column of the first piece."""
    return tl.arange(0, BLOCK_M)[:, None] + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def merged(first, second, third, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of three pieces of a band, or of the first two where tiles are square, the columns that a tile needs."""
    at = _diagonal(BLOCK_M, BLOCK_N)
    if BLOCK_M > BLOCK_N:
        second = tl.where(at >= BLOCK_M - 1 - BLOCK_N, second, third)
    return tl.where(at >= BLOCK_M - 1, first, second)


@triton.jit
def by_key(first, second, third, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile by keys; BLOCK_M is BLOCK_N, and ``third`` not read, or twice BLOCK_N."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    turn = (n - m + (BLOCK_M - 1)) & (BLOCK_N - 1)
    return tl.gather(merged(first, second, third, BLOCK_M, BLOCK_N), turn, axis=1)


@triton.jit
def moved(first, second, third, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, second) piece of the tile of the next keys."""
    if BLOCK_M == BLOCK_N:
        return second, second
    # not ``second`` itself: a loop that hands values on unchanged is not pipelined
    return tl.where(_diagonal(BLOCK_M, BLOCK_N) >= BLOCK_M - 1, second, 0.0), third


@triton.jit
def by_offset(tile, BLOCK: tl.constexpr):
    """The inverse, for square tiles: by keys to both pieces of a band in one, see ``merged``."""
    return tl.gather(tile, (_diagonal(BLOCK, BLOCK) + 1) & (BLOCK - 1), axis=1)
