# SPDX-License-Identifier: Apache-2.0
"""The relative shift of Transformer-XL in registers.

Queries i0 + m and keys j0 + n of a tile of BLOCK_M x BLOCK_N meet the offsets j - i of a band of BLOCK_M + BLOCK_N - 1
rows of positions. Tensor cores multiply the band with the queries in pieces of BLOCK_N columns. The tile is column n -
m + BLOCK_M - 1 of row m: each row is shifted one further left than the one above. A row needs only one of the columns
that are a multiple of BLOCK_N apart, so the pieces are merged, and one rotation of the rows is the shift. The tile of
the next keys needs one new piece.
"""

import triton
import triton.language as tl


@triton.jit
def _diagonal(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns [BLOCK_M, BLOCK_N] of m + n; it is BLOCK_M - 1 or more where the tile needs the column of the first
    piece.
    """
    return tl.arange(0, BLOCK_M)[:, None] + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def merged(first, second, third, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the columns that a tile needs out of three pieces of a band, or out of the first two for
    square tiles.
    """
    at = _diagonal(BLOCK_M, BLOCK_N)
    if BLOCK_M > BLOCK_N:
        second = tl.where(at >= BLOCK_M - 1 - BLOCK_N, second, third)
    return tl.where(at >= BLOCK_M - 1, first, second)


@triton.jit
def by_key(first, second, third, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the tile by keys. Either BLOCK_M is BLOCK_N and ``third`` is not read, or BLOCK_M is twice
    BLOCK_N.
    """
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    turn = (n - m + (BLOCK_M - 1)) & (BLOCK_N - 1)
    return tl.gather(merged(first, second, third, BLOCK_M, BLOCK_N), turn, axis=1)


@triton.jit
def moved(first, second, third, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the (first, second) piece of the tile of the next keys."""
    if BLOCK_M == BLOCK_N:
        return second, second
    # not ``second`` itself: Triton does not pipeline a loop that hands values on unchanged
    return tl.where(_diagonal(BLOCK_M, BLOCK_N) >= BLOCK_M - 1, second, 0.0), third


@triton.jit
def by_offset(tile, BLOCK: tl.constexpr):
    """Inverts ``by_key`` for square tiles: returns both pieces of a band merged into one, see ``merged``."""
    return tl.gather(tile, (_diagonal(BLOCK, BLOCK) + 1) & (BLOCK - 1), axis=1)
