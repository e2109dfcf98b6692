# SPDX-License-Identifier: Apache-2.0
"""The relative shift of Transformer-XL in registers.

Queries i0 + m and keys j0 + n of a tile of BLOCK_M x BLOCK_N meet the offsets j - i of a band of BLOCK_M + BLOCK_N - 1
rows of positions. Tensor cores multiply the band with the queries in pieces of BLOCK_N columns. The tile is column n -
m + BLOCK_M - 1 of row m: each row is shifted one further left than the one above. The tile of the next keys needs one
new piece.

In a square tile, a row needs only one of the columns that are BLOCK_N apart, so two pieces are merged into one, and a
rotation of the rows is the shift. ``tl.gather`` rotates where a warp has whole rows, a column per lane: the tile passes
through shared memory twice.

In a tile of 64 x 32, the tensor cores leave 16 rows to each of four warps. Four neighbouring lanes share a row, with 2
columns out of 8 each. The shift stays in these registers: by multiples of 8 columns it renames them, or chooses one of
two where warps differ; by 0 to 7 columns it is a shuffle among the four lanes.
"""

import triton
import triton.language as tl


@triton.jit
def _diagonal(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns [BLOCK_M, BLOCK_N] of m + n, where m counts the rows of a square."""
    return (tl.arange(0, BLOCK_M) % BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def merged(first, second, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the columns that a square tile, or each half of a taller one, needs out of two pieces of a band."""
    return tl.where(_diagonal(BLOCK_M, BLOCK_N) >= BLOCK_N - 1, first, second)


@triton.jit
def by_offset(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Inverts ``by_key`` for square tiles and both halves of a taller one: returns two pieces of a band merged into
    one, see ``merged``."""
    return tl.gather(tile, (_diagonal(BLOCK_M, BLOCK_N) + 1) & (BLOCK_N - 1), axis=1)


@triton.jit
def ready(before, piece, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns a piece of a band as ``by_key`` takes it; ``before`` is the one before it. In a tile of 64 x 32 the rows
    of the lower half need the columns of the one before, and in rows that move by an odd number of columns the two of
    a pair change places.
    """
    if BLOCK_M > BLOCK_N:
        m = tl.arange(0, BLOCK_M)[:, None]
        even, odd = tl.where(m >= BLOCK_N, before, piece).reshape([BLOCK_M, BLOCK_N // 2, 2]).split()
        swapped = m % 2 == 0
        piece = tl.join(tl.where(swapped, odd, even), tl.where(swapped, even, odd)).reshape(
            [BLOCK_M, BLOCK_N]
        )
    return piece


@triton.jit
def by_key(first, second, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the tile by keys of two pieces that are ``ready``. Tiles are square or 64 x 32."""
    if BLOCK_M > BLOCK_N:
        tile = _shifted(first, second, BLOCK_M, BLOCK_N)
    else:
        m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        turn = (n - m + (BLOCK_M - 1)) & (BLOCK_N - 1)
        tile = tl.gather(merged(first, second, BLOCK_M, BLOCK_N), turn, axis=1)
    return tile


@triton.jit
def _halves(parts):
    """Returns the two halves of each tensor along its last dimension."""
    halves = ()
    for n in tl.static_range(len(parts)):
        halves += parts[n].split()
    return halves


@triton.jit
def _wholes(parts):
    """Inverts ``_halves``."""
    wholes = ()
    for n in tl.static_range(len(parts) // 2):
        wholes += (tl.join(parts[2 * n], parts[2 * n + 1]),)
    return wholes


@triton.jit
def _registers(piece, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the numbers of each lane as tensors of [warp, row of 8, lane of 4], counted by the 8 rows that are first
    or second, then by 8 columns, then by the columns of a pair."""
    if COLUMNS == 32:
        bits = piece.reshape([WARPS, 2, 8, 2, 2, 4, 2]).permute(0, 2, 5, 6, 4, 3, 1)
        parts = _halves(_halves(_halves(_halves((bits,)))))
    else:
        bits = piece.reshape([WARPS, 2, 8, 2, 4, 2]).permute(0, 2, 4, 5, 3, 1)
        parts = _halves(_halves(_halves((bits,))))
    return parts


@triton.jit
def _shifted(first, second, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns ``by_key`` of a tile of 64 x 32: row 16 warp + 8 below + r moves by 16 (3 - warp), of which ``ready`` has
    done the 32, and by 8 (1 - below) and 7 - r columns. Of 32 x 16, for tests, ``ready`` has done all of the first."""
    WARPS: tl.constexpr = ROWS // 16
    first, second = _registers(first, WARPS, COLUMNS), _registers(second, WARPS, COLUMNS)
    own: tl.constexpr = COLUMNS // 4  # numbers of a row that a lane has
    warp, lane = tl.arange(0, WARPS)[:, None, None], tl.arange(0, 4)[None, None, :]
    left = 7 - tl.arange(0, 8)[None, :, None]
    moved = ()
    for below in tl.static_range(2):
        columns = ()
        for n in tl.static_range(own):
            columns += (first[own * below + n],)
        for n in tl.static_range(own):
            columns += (second[own * below + n],)
        near = ()  # 8 columns more than the tile has, of which the lanes still move by 0 to 7
        for n in tl.static_range(2 - 2 * below, own + 4 - 2 * below):
            if COLUMNS == 32:
                near += (tl.where(warp % 2 == 0, columns[n + 4], columns[n]),)
            else:
                near += (columns[n],)
        for n in tl.static_range(own):
            pairs = (left + n % 2) // 2
            sent = tl.where(lane < pairs, near[n + 2], near[n])
            moved += (tl.gather(sent, (lane + pairs + tl.zeros_like(sent).to(tl.int32)) % 4, axis=2),)
    if COLUMNS == 32:
        bits = _wholes(_wholes(_wholes(_wholes(moved))))[0].permute(0, 6, 1, 5, 4, 2, 3)
    else:
        bits = _wholes(_wholes(_wholes(moved)))[0].permute(0, 5, 1, 4, 2, 3)
    return bits.reshape([ROWS, COLUMNS])
