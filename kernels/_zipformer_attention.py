# SPDX-License-Identifier: Apache-2.0
"""Attention with Zipformer's relative positions: the gradients of positions, and how rows of W and dS lie in memory."""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import cdiv, next_power_of_2
from fastasr.kernels._recordings import blocks_of, rows_of
from fastasr.kernels._rel_position_tiles import MARGIN, load_packed, place

ROW = 16  # rows of W and dS are padded to this many elements
SIZES = ["frames", "keys", "left", "batch", "blocks", "heads", "offsets", "chunk", "left_chunks"]
UNALIGNED = ["R", "PADDING", "MASK"]


@triton.jit
def _partial(products, AXIS: tl.constexpr):
    """Returns sums of the columns of [queries, keys] in eighths: each thread adds up its own."""
    EIGHTHS: tl.constexpr = [products.shape[0], products.shape[1] // 8, 8]
    return tl.sum(tl.reshape(products, EIGHTHS), axis=AXIS)


@triton.jit
def add_positions(
    dp, parts, ds, rows, offsets, AXIS: tl.constexpr,
    BLOCK_P: tl.constexpr, POS_DIM: tl.constexpr, PACKED: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Returns dp + dS R of the pointers ``rows``, [BLOCK_M, BLOCK_P], and if PACKED only what ``whole_positions`` adds
    up of them: ``parts``, four of [BLOCK_M, eighths]."""
    if PACKED:
        d0, d1, d2, d3 = parts
        r0, r1, r2, r3 = load_packed(rows, ELEMENT)
        d0, d1 = d0 + _partial(ds * r0, AXIS), d1 + _partial(ds * r1, AXIS)
        d2, d3 = d2 + _partial(ds * r2, AXIS), d3 + _partial(ds * r3, AXIS)
        parts = d0, d1, d2, d3
    else:
        c = tl.arange(0, BLOCK_P)[None, :]
        for number in range(POS_DIM):
            r = tl.load(rows + number * (offsets + 2 * MARGIN)).to(tl.float32)
            dp += tl.where(c == number, tl.sum(ds * r, axis=1)[:, None], 0.0)
    return dp, parts


@triton.jit
def whole_positions(dp, parts, BLOCK_P: tl.constexpr, PACKED: tl.constexpr):
    """Returns dp."""
    if PACKED:
        c = tl.arange(0, BLOCK_P)[None, :]
        d0, d1, d2, d3 = parts
        d0, d1, d2, d3 = tl.sum(d0, axis=1), tl.sum(d1, axis=1), tl.sum(d2, axis=1), tl.sum(d3, axis=1)
        low = tl.where(c == 0, d0[:, None], d1[:, None])
        dp = tl.where(c < 2, low, tl.where(c == 2, d2[:, None], d3[:, None]))
    return dp


@triton.jit(do_not_specialize=[*SIZES, "center", "first", "rows", "base", "piece", "held", "shares"])
def positions_kernel(
    DS, X, PIECES, PARTS, center, keys, first, rows, base, piece, held, shares, batch, blocks, heads, offsets, ds_row,
    x_time, x_batch,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, ADD: tl.constexpr, COLUMNS: tl.constexpr, APART: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Writes sum_i dS[i, i - center + r] p[i] of ``offsets_of`` a tile of offsets r from ``base`` on, over the rows
    [first, first + rows), which DS holds. PARTS is (batch, offsets, heads POS_DIM). With ADD the sum is added to PARTS.
    With PIECES of _recordings.py, for ``held`` blocks of BLOCK_M rows, DS holds one of these, and a program adds up one
    of ``shares`` of its blocks: PARTS is then (shares, batch, offsets, heads POS_DIM).

    The key of the first offset moves by one from row to row, but a row is read in vectors, from the last multiple of
    APART keys before that. Rows that begin equally far from one are added up apart, each in BLOCK_P columns of one
    product; in the end these sums are moved as far, and added.
    """
    head, group, block = place(tl.program_id(0), blocks, batch if PIECES is None else batch * shares)
    sequence = group if PIECES is None else group % batch
    n, lanes, q = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_M), tl.arange(0, APART * BLOCK_P)
    X += sequence * x_batch + first.to(tl.int64) * x_time + 2 * heads * DIM + head * POS_DIM
    X += (lanes * x_time)[:, None] + (q % BLOCK_P)[None, :]
    if PIECES is None:
        DS += (head * batch + sequence) * rows * ds_row
    else:
        DS += (head * batch + sequence) * ds_row
    r = base + block * (BLOCK_O - APART + 1)
    own = r - (center - first)  # the key of the first offset in row 0
    begin = tl.maximum(1 - BLOCK_O - own, 0) // APART * APART
    end = tl.minimum(keys - own, rows)
    first_block = 0
    if PIECES is not None:
        first_block, end_block = blocks_of(PIECES, piece, held)
        each = tl.cdiv(end_block - first_block, shares)
        share = first_block + (group // batch).to(tl.int32) * each
        if ADD:  # noqa: SIM102, the inner condition is known on the device alone
            if share >= end_block:
                return
        begin = tl.maximum(begin // BLOCK_M, share) * BLOCK_M
        end = tl.minimum(end, tl.minimum(share + each, end_block) * BLOCK_M)
    far = (own & (APART - 1)) + lanes
    own = tl.multiple_of(own - (own & (APART - 1)), APART)
    vectors = far // APART * APART  # where the rows' vectors begin
    met = ((far - vectors)[:, None] == (q // BLOCK_P)[None, :]) & (q % BLOCK_P < POS_DIM)[None, :]
    dr = tl.zeros([BLOCK_O, APART * BLOCK_P], tl.float32)
    for start in range(begin, end, BLOCK_M):
        key, size, at = 0, ds_row, tl.cast(start, tl.int64) * ds_row
        if PIECES is not None:
            key, size, at = rows_of(PIECES, start // BLOCK_M, first_block, held, COLUMNS)
        key = own + start - key
        if (PIECES is None) or ((key < size) & (key + BLOCK_M + BLOCK_O > 0)):
            keep = start + lanes < rows
            vector = key + vectors[None, :] + (n // APART * APART)[:, None]
            inside = (vector >= 0) & (vector < size) & keep[None, :]
            ds = tl.load(
                DS + (at + key) + ((lanes * size + vectors)[None, :] + n[:, None]), mask=inside, other=0.0
            )
            p = tl.load(X + tl.cast(start, tl.int64) * x_time, mask=met & keep[:, None], other=0.0)
            dr = tl.dot(ds, p, dr)  # [BLOCK_O, APART BLOCK_P]
    if APART > 1:
        dr = tl.gather(dr, tl.minimum(n[:, None] + (q // BLOCK_P)[None, :], BLOCK_O - 1), axis=0)
        dr = tl.sum(tl.reshape(dr, [BLOCK_O, APART, BLOCK_P]), axis=1)
    c = tl.arange(0, BLOCK_P)
    out = PARTS + group * offsets * heads * POS_DIM + (r + n).to(tl.int64)[:, None] * (heads * POS_DIM)
    out += head * POS_DIM + c[None, :]
    whole = ((n <= BLOCK_O - APART) & (r + n < offsets))[:, None] & (c < POS_DIM)[None, :]
    dr = dr.to(PARTS.dtype.element_ty)
    if ADD:
        dr += tl.load(out, mask=whole, other=0.0)
    tl.store(out, dr, mask=whole)


def position_tile(pos_dim: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Returns the tile of ``positions_kernel`` of ``rows`` rows, for ``pos_dim`` channels."""
    columns = next_power_of_2(max(2, pos_dim))  # as many sums as threads
    apart = max(1, min(16 // dtype.itemsize, 32 // columns))  # 16 bytes, unless many channels take registers
    offsets = 128 if dtype.itemsize == 2 and columns <= 32 else 64
    sizes = {"BLOCK_O": offsets, "BLOCK_M": rows, "BLOCK_P": columns, "APART": apart}
    return sizes | {"num_warps": 4, "num_stages": 3}


def offsets_of(tile: dict[str, int]) -> int:
    """Returns how many offsets a program of ``positions_kernel`` writes."""
    return tile["BLOCK_O"] - tile["APART"] + 1


def row_size(keys: int) -> int:
    """Returns the elements from one row of W or dS to the next."""
    return cdiv(keys, ROW) * ROW
