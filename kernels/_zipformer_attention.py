# SPDX-License-Identifier: Apache-2.0
"""Attention with Zipformer's relative positions: the gradients of positions, and how rows of W and dS lie in memory."""

import triton
import triton.language as tl

from fastasr.kernels._attention_tiles import load_rows
from fastasr.kernels._launch import cdiv
from fastasr.kernels._recordings import blocks_of, rows_of
from fastasr.kernels._rel_position_tiles import MARGIN, place, unpacked

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
        r0, r1, r2, r3 = unpacked(tl.load(rows), ELEMENT)
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


@triton.jit
def _diagonals(dr, at, inside, DS, i, ds_row, X, x_time, c, keep_i, POS_DIM: tl.constexpr):
    """Adds the products of dS, read at columns ``at``, and p of rows i."""
    ds = tl.load(DS + i.to(tl.int64)[None, :] * ds_row + at, mask=inside, other=0.0)  # [BLOCK_O, BLOCK_M]
    p = load_rows(X, i, x_time, c, keep_i, POS_DIM)  # [BLOCK_M, BLOCK_P]
    return tl.dot(ds, p, dr)


@triton.jit(do_not_specialize=[*SIZES, "center", "first", "rows", "base", "piece", "held", "shares"])
def positions_kernel(
    DS, X, BOUNDS, PIECES, PARTS,
    center, frames, keys, first, rows, base, piece, held, shares, batch, blocks, heads, offsets, ds_row,
    x_time, x_batch,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, ADD: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Writes sum_i dS[i, i - center + r] p[i] of a block of offsets r from ``base`` on, over the rows [first, first +
    rows), which DS holds. PARTS is (batch, offsets, heads POS_DIM). With ADD the sum is added to PARTS. With PIECES of
    _recordings.py, for ``held`` blocks of BLOCK_M rows, DS holds one of these, and a program adds up one of ``shares``
    of its blocks: PARTS is then (shares, batch, offsets, heads POS_DIM).
    """
    head, group, block = place(tl.program_id(0), blocks, batch if PIECES is None else batch * shares)
    sequence = group if PIECES is None else group % batch
    r = base + block * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_P)
    X += sequence * x_batch + first.to(tl.int64) * x_time + 2 * heads * DIM + head * POS_DIM
    if PIECES is None:
        DS += (head * batch + sequence) * rows * ds_row
    else:
        DS += (head * batch + sequence) * ds_row
    shift = center - first  # row i and offset r are key r - shift + i
    low = shift - base - block * BLOCK_O  # the row whose key 0 the first offset is
    begin = tl.maximum(low - (BLOCK_O - 1), 0)
    end = tl.minimum(low + keys, rows)
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
    dr = tl.zeros([BLOCK_O, BLOCK_P], tl.float32)
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        keep_i = i < rows
        j = (r - shift)[:, None] + i[None, :]  # [BLOCK_O, BLOCK_M]
        if PIECES is None:
            inside = (j.to(tl.uint32) < keys.to(tl.uint32)) & keep_i[None, :]  # none below 0
            dr = _diagonals(dr, j, inside, DS, i, ds_row, X, x_time, c, keep_i, POS_DIM)
        else:
            begun = tl.load(BOUNDS + i, mask=keep_i, other=0)
            ended = tl.load(BOUNDS + frames + i, mask=keep_i, other=0)
            own = i + (base + block * BLOCK_O - shift)  # the key of the first of these offsets
            met = tl.maximum(own, begun) < tl.minimum(own + BLOCK_O, ended)
            if tl.max(met.to(tl.int32)) > 0:
                inside = (j >= begun[None, :]) & (j < ended[None, :]) & (r < offsets)[:, None]
                key, size, before = rows_of(PIECES, start // BLOCK_M, first_block, held, COLUMNS)
                at = before - key - size.to(tl.int64) * start + j
                dr = _diagonals(dr, at, inside, DS, i, size, X, x_time, c, keep_i, POS_DIM)
    out = PARTS + group * offsets * heads * POS_DIM + r.to(tl.int64)[:, None] * (heads * POS_DIM)
    out += head * POS_DIM + c[None, :]
    whole = (r < offsets)[:, None] & (c < POS_DIM)[None, :]
    dr = dr.to(PARTS.dtype.element_ty)
    if ADD:
        dr += tl.load(out, mask=whole, other=0.0)
    tl.store(out, dr, mask=whole)


def row_size(keys: int) -> int:
    """Returns the elements from one row of W or dS to the next."""
    return cdiv(keys, ROW) * ROW
