# SPDX-License-Identifier: Apache-2.0
"""The small steps of a row of recordings (fastasr/ops/_row.py), each one launch: tables of its rates, the move of
recordings from one layout to another, and weighted means of F frames, in which a recording's last frame stands for
those that it lacks, as the last of all frames does in a padded batch.

    y[t] = sum_i share(t, i) x[F t + i]        share(t, i) = sum of the weights j with min(j, left[F t] - 1) = i
    dx[F t + i] = share(t, i) g[t]             dweight[j] = sum of g[t] . x[F t + min(j, left[F t] - 1)]

Per element of x, of e bytes: forward e (1 + 1 / F), backward e (2 + 1 / F). A program of the backward pass adds up
dweight over its groups and columns; a second kernel adds the programs' sums in float64 (_parts.py).
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import cdiv, launch, next_power_of_2, processors
from fastasr.kernels._parts import add_parts
from fastasr.kernels._recordings import RECORDINGS, tables

__all__ = ["averaged", "averaged_gradients", "moved", "tables"]

TILE = {"BLOCK_T": 16, "BLOCK_C": 128, "num_warps": 4}
RESIDENT = 4  # programs of a multiprocessor that the gradients are shared among


@triton.jit(
    do_not_specialize=["recordings", "rows"], do_not_specialize_on_alignment=["BEFORE", "AFTER", "LENGTHS"]
)  # fmt: skip
def move_kernel(
    X, BEFORE, AFTER, LENGTHS, Y, recordings, rows, columns, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Writes a tile of y: the frames of recordings that begin at BEFORE in x and at AFTER in y, and 0."""
    column_tiles = tl.cdiv(columns, BLOCK_C)
    t = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    number = tl.zeros([BLOCK_T], tl.int32)
    for n in range(1, recordings, RECORDINGS):
        r = n + tl.arange(0, RECORDINGS)
        begin = tl.load(AFTER + r, mask=r < recordings, other=0)
        begun = (begin[None, :] <= t[:, None]) & (r < recordings)[None, :]  # [BLOCK_T, RECORDINGS]
        number += tl.sum(begun.to(tl.int32), axis=1)
    within = t - tl.load(AFTER + number)
    there = (t < rows) & (within < tl.load(LENGTHS + number))
    at = (tl.load(BEFORE + number) + within)[:, None] * columns + c[None, :]  # [BLOCK_T, BLOCK_C]
    in_row = (c < columns)[None, :]
    x = tl.load(X + at, mask=there[:, None] & in_row, other=0.0)
    tl.store(Y + t[:, None] * columns + c[None, :], x, mask=(t < rows)[:, None] & in_row)


@triton.jit
def _share(WEIGHTS, left, i, FACTOR: tl.constexpr):
    """Returns the shares of frames i of groups of which ``left`` frames exist."""
    own = tl.zeros(left.shape, tl.float32)
    for j in tl.static_range(FACTOR):
        weight = tl.load(WEIGHTS + j).to(tl.float32)
        own += tl.where(tl.minimum(left - 1, j) == i, weight, 0.0)
    return own


@triton.jit
def _frames_left(LEFT, t, there, frames, FACTOR: tl.constexpr):
    """Returns how many frames of the recording, or of all, begin with the first of groups t."""
    left = frames - t * FACTOR
    if LEFT is not None:
        left = tl.load(LEFT + t * FACTOR, mask=there, other=0)
    return left


@triton.jit(do_not_specialize=["frames", "groups"], do_not_specialize_on_alignment=["LEFT", "WEIGHTS"])
def average_kernel(
    X, LEFT, WEIGHTS, Y, frames, groups, columns,
    FACTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes a tile of y."""
    column_tiles = tl.cdiv(columns, BLOCK_C)
    t = tl.program_id(0) // column_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    there, in_row = t < groups, c < columns
    left = _frames_left(LEFT, t, there, frames, FACTOR)
    first = t.to(tl.int64)[:, None] * FACTOR * columns + c[None, :]  # [BLOCK_T, BLOCK_C]
    y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for i in tl.static_range(FACTOR):
        keep = (there & (i < left))[:, None] & in_row[None, :]
        x = tl.load(X + first + i * columns, mask=keep, other=0.0).to(tl.float32)
        share = _share(WEIGHTS, left, i, FACTOR)[:, None]
        y = tl.fma(x, tl.broadcast_to(share, x.shape), y)
    at = t.to(tl.int64)[:, None] * columns + c[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=there[:, None] & in_row[None, :])


@triton.jit(
    do_not_specialize=["frames", "groups", "tiles", "shares"],
    do_not_specialize_on_alignment=["LEFT", "WEIGHTS"],
)
def average_gradient_kernel(
    G, X, LEFT, WEIGHTS, DX, PARTS, frames, groups, columns, tiles, shares,
    FACTOR: tl.constexpr, LANES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes dx of BLOCK_T groups and of one of ``shares`` of the columns, of ``tiles`` tiles, and a row of FACTOR
    numbers of PARTS, what they add to dweight.
    """
    t = tl.program_id(0) // shares * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0) % shares * tiles
    there = t < groups
    left = _frames_left(LEFT, t, there, frames, FACTOR)
    j = tl.arange(0, LANES)
    counted = tl.minimum(left[:, None] - 1, j[None, :])  # [BLOCK_T, LANES]
    dweight = tl.zeros([LANES], tl.float32)
    for i in tl.static_range(FACTOR):
        share = _share(WEIGHTS, left, i, FACTOR)[:, None]
        along = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for tile in range(first, tl.minimum(first + tiles, tl.cdiv(columns, BLOCK_C))):
            c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
            keep = there[:, None] & (c < columns)[None, :]
            at = (t.to(tl.int64)[:, None] * FACTOR + i) * columns + c[None, :]  # [BLOCK_T, BLOCK_C]
            g = tl.load(G + t.to(tl.int64)[:, None] * columns + c[None, :], mask=keep, other=0.0).to(
                tl.float32
            )
            x = tl.load(X + at, mask=keep & (i < left)[:, None], other=0.0).to(tl.float32)
            written = keep & (t * FACTOR + i < frames)[:, None]
            tl.store(DX + at, (share * g).to(DX.dtype.element_ty), mask=written)
            along = tl.fma(g, x, along)
        dweight += tl.sum(tl.where(counted == i, tl.sum(along, axis=1)[:, None], 0.0), axis=0)
    tl.store(PARTS + tl.program_id(0) * FACTOR + j, dweight, mask=j < FACTOR)


def moved(
    rows: torch.Tensor, before: torch.Tensor, after: torch.Tensor, lengths: torch.Tensor, count: int
) -> torch.Tensor:
    """Returns ``count`` rows of contiguous ones, see ``packed_frames.moved``; there is a recording."""
    y = rows.new_empty(count, *rows.shape[1:])
    if y.numel():
        columns = y[0].numel()
        launch(move_kernel, (cdiv(count, TILE["BLOCK_T"]) * cdiv(columns, TILE["BLOCK_C"]),),
            rows, before, after, lengths, y, len(lengths), count, columns, **TILE,
        )  # fmt: skip
    return y


def averaged(rows: torch.Tensor, left: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
    """Returns y (⌈N / F⌉, ...) of contiguous rows (N, ...) and weights (F,), in the promoted dtype of both."""
    factor, frames = len(weights), len(rows)
    groups = cdiv(frames, factor)
    y = rows.new_empty(groups, *rows.shape[1:], dtype=torch.promote_types(rows.dtype, weights.dtype))
    if y.numel():
        columns = y[0].numel()
        launch(average_kernel, (cdiv(groups, TILE["BLOCK_T"]) * cdiv(columns, TILE["BLOCK_C"]),),
            rows, left, weights.contiguous(), y, frames, groups, columns, FACTOR=factor, **TILE,
        )  # fmt: skip
    return y


def averaged_gradients(
    grad: torch.Tensor, rows: torch.Tensor, left: torch.Tensor | None, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of contiguous rows and weights in their dtypes; ``grad`` is contiguous."""
    factor, groups = len(weights), len(grad)
    drows, dweights = torch.empty_like(rows), torch.empty_like(weights)
    if not grad.numel():
        dweights.zero_()
    else:
        blocks, columns = cdiv(groups, TILE["BLOCK_T"]), grad[0].numel()
        # A padded batch has few groups of many columns, a row many groups of few.
        column_tiles = cdiv(columns, TILE["BLOCK_C"])
        tiles = cdiv(column_tiles, cdiv(RESIDENT * processors(grad), blocks))
        shares = cdiv(column_tiles, tiles)
        parts = torch.empty(blocks * shares, factor, dtype=torch.float32, device=grad.device)
        launch(average_gradient_kernel, (blocks * shares,),
            grad, rows, left, weights.contiguous(), drows, parts, len(rows), groups, columns, tiles, shares,
            FACTOR=factor, LANES=next_power_of_2(factor), **TILE,
        )  # fmt: skip
        add_parts(parts, dweights)
    return drows, dweights
