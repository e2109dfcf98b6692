# SPDX-License-Identifier: Apache-2.0
"""The gradient of a balancer (fastasr/ops/balancer_gradient.py) in two launches: sums per channel, then the change.
A recorded pass finds the sums of all its calls in a few launches.

    s1 = sum(x - shift)    s2 = sum((x - shift)^2)    shift: the mean of a few elements, so that nothing cancels
    y = grad + |grad| (offset + slope (x - mean))

x is seen as (outer, inner, channels): rows of channels are (1, rows, channels) with channels side by side, and maps
with the channels in the middle are (outer, inner, channels) with the inner elements side by side. Rows that are
hidden, by a byte for each (outer, inner), are in no sum, and their gradient stays.

Bytes per element of e bytes: e for the sums, 3e for the change. A 1500x20x192 bf16 tensor takes 3 + 8 us at 4.3 TB/s.

Programs of both kernels have the same part of the same channels. A part's sums are rows of a table, which every program
of the second kernel adds up in float64 and in one order, for its channels: with 32 channels in a tile that is 11 KiB
for 192 channels. Results repeat bit for bit on one kind of device, without atomics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastasr.kernels import _jobs
from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._hidden import samples, visible
from fastasr.kernels._jobs import multiple, number, pointer
from fastasr.kernels._launch import as_bytes, cdiv, launch, next_power_of_2, processors

BYTES = 16384  # A tile has this many bytes: 32 in each thread.
WARPS = 16
CHANNELS = 32  # A tile has at most this many.
RESIDENT = 2  # programs on a multiprocessor
PARTS = 64  # rows of the table that are added up at a time

FLOOR = tl.constexpr(1.0e-20)  # as in fastasr/ops/balancer_gradient.py


@triton.jit
def _shift(X, HIDDEN, c, in_x, inner, count, x_row, outer_stride, channel_stride):
    """Returns the mean of a few elements of each channel, from all over it."""
    at, seen, share = samples(HIDDEN, count)
    outer = at // inner
    offsets = outer * outer_stride + (at - outer * inner) * x_row
    keep = seen[:, None] & in_x[None, :]
    x = tl.load(X + offsets[:, None] + (c * channel_stride)[None, :], mask=keep, other=0.0)
    return column_sums(x.to(tl.float32)) * share  # [BLOCK_C]


@triton.jit
def _place(channels, tiles, tiles_per_part, BLOCK_C: tl.constexpr):
    """Returns the part of this program, its first tile and the one behind its last, and its channels."""
    column_tiles = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // column_tiles
    first = part * tiles_per_part
    c = (tl.program_id(0) - part * column_tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return part, first, tl.minimum(first + tiles_per_part, tiles), c


@triton.jit
def _tile(HIDDEN, tile, tiles_of_run, inner, BLOCK_R: tl.constexpr):
    """Returns the outer index of a tile, its inner ones, which of these there are, and which are not hidden."""
    outer = tile // tiles_of_run
    r = (tile - outer * tiles_of_run).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    outer = outer.to(tl.int64)
    if HIDDEN is not None:
        HIDDEN += outer * inner
    return outer, r, r < inner, visible(HIDDEN, r, inner)


@triton.jit
def _sums(
    X, HIDDEN, TABLE, part, tile, end, c, channels, inner, count, tiles_of_run, x_row, outer_stride, channel_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the sums of a part of some channels."""
    TABLE_ROWS: tl.constexpr = 2 if HIDDEN is None else 3
    in_x = c < channels
    shift = _shift(X, HIDDEN, c, in_x, inner, count, x_row, outer_stride, channel_stride)
    s1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    number = tl.zeros([BLOCK_R], tl.int32)
    while tile < end:
        outer, r, in_run, seen = _tile(HIDDEN, tile, tiles_of_run, inner, BLOCK_R)
        keep = (
            in_run[:, None] & in_x[None, :]
        )  # hidden rows too, because a mask with holes makes narrow loads
        offsets = outer * outer_stride + (r * x_row)[:, None] + (c * channel_stride)[None, :]
        x = tl.load(X + offsets, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_C]
        d = tl.where(seen[:, None] & in_x[None, :], x - shift[None, :], 0.0)
        s1 += d
        s2 = tl.fma(d, d, s2)
        number += seen.to(tl.int32)
        tile += 1
    out = TABLE + part.to(tl.int64) * TABLE_ROWS * channels + c
    tl.store(out, column_sums(s1), mask=in_x)
    tl.store(out + channels, column_sums(s2), mask=in_x)
    if HIDDEN is not None:
        rows = tl.sum(number, axis=0).to(tl.float32)
        tl.store(out + 2 * channels, tl.zeros([BLOCK_C], tl.float32) + rows, mask=in_x)


@triton.jit(do_not_specialize=["count", "tiles", "tiles_of_run", "tiles_per_part"])
def sums_kernel(
    X, HIDDEN, ACT, TABLE,
    channels, inner, count, tiles, tiles_of_run, tiles_per_part, x_row, outer_stride, channel_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # TABLE: (parts, 2, channels), or (parts, 3, channels) with the number of rows that are not hidden
    part, tile, end, c = _place(channels, tiles, tiles_per_part, BLOCK_C)
    if ACT is not None:  # noqa: SIM102, the inner condition is known on the device alone
        if tl.load(ACT).to(tl.float32) == 0.0:
            return
    _sums(X, HIDDEN, TABLE, part, tile, end, c,
        channels, inner, count, tiles_of_run, x_row, outer_stride, channel_stride, BLOCK_R, BLOCK_C,
    )  # fmt: skip


@triton.jit
def sums_of_jobs_kernel(
    JOBS, FIELDS: tl.constexpr, DTYPE: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Does what ``sums_kernel`` does for each job, whose channels are side by side."""
    # the fields: X, ACT, TABLE, HIDDEN, channels, x_row, rows, tiles, tiles_per_part
    job = JOBS + tl.program_id(1) * FIELDS
    if tl.load(pointer(job, 1, tl.float32)) == 0.0:
        return
    channels, x_row = multiple(job, 4), multiple(job, 5)
    rows, tiles = number(job, 6), number(job, 7)
    part, tile, end, c = _place(channels, tiles, number(job, 8), BLOCK_C)
    if tile >= tiles:
        return
    HIDDEN = None
    if PADDED:
        HIDDEN = tl.load(job + 3).to(tl.pointer_type(tl.uint8))
    X, TABLE = pointer(job, 0, DTYPE), pointer(job, 2, tl.float32)
    _sums(X, HIDDEN, TABLE, part, tile, end, c, channels, rows, rows, tiles, x_row, 0, 1, BLOCK_R, BLOCK_C)


@triton.jit
def _coefficients(mu, centred, count, min_mean, max_mean, min_rms, max_rms, grad_scale):
    """Returns offset and slope of the change, by the formula's steps. The change is a small part of y, so reciprocals
    may be off by a unit or two; exact ones take more instructions than all else in the kernel.
    """
    square = tl.fma(mu, mu, centred)
    power = tl.maximum(square, FLOOR)
    of_s, of_power, share = tl.rsqrt(tl.maximum(centred, FLOOR)), 1.0 / power, 1.0 / count
    m, r = mu * of_s, tl.sqrt(power)
    e = tl.where(m > max_mean, 1.0, tl.where(m < min_mean, -1.0, 0.0))
    f = tl.where(r > max_rms, 1.0, tl.where(r < min_rms, -1.0, 0.0))
    e_slope = tl.where(centred >= FLOOR, e, 0.0)
    f = tl.where(square >= FLOOR, f, 0.0)
    p = tl.fma(e, of_s, f * mu * of_power)
    q = f * of_power - (e_slope * m) * of_s * of_s
    rms = tl.sqrt(p * p + q * q * centred) * share
    scale = grad_scale / tl.maximum(rms, FLOOR) * share
    return p * scale, q * scale


@triton.jit(do_not_specialize=["count", "tiles", "tiles_of_run", "tiles_per_part", "parts"])
def change_kernel(
    GRAD, X, HIDDEN, TABLE, LIMITS, ACT, Y, min_mean, max_mean, min_rms, max_rms, grad_scale, parts,
    channels, inner, count, tiles, tiles_of_run, tiles_per_part, grad_row, x_row, y_row, outer_stride, channel_stride,
    IN_PLACE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TABLE_ROWS: tl.constexpr = 2 if HIDDEN is None else 3
    _, tile, end, c = _place(channels, tiles, tiles_per_part, BLOCK_C)
    changed = channels  # those before this one
    if ACT is not None:
        act = tl.load(ACT).to(tl.float32)
        if IN_PLACE:  # noqa: SIM102, likewise; y is grad
            if act == 0.0:
                return
        changed = tl.where(act == 0.0, 0, changed)
        parts = tl.where(act == 0.0, 0, parts)
    if LIMITS is not None:
        min_mean = tl.load(LIMITS).to(tl.float32)
        max_mean = tl.load(LIMITS + 1).to(tl.float32)
        min_rms = tl.load(LIMITS + 2).to(tl.float32)
        max_rms = tl.load(LIMITS + 3).to(tl.float32)
        grad_scale = tl.load(LIMITS + 4).to(tl.float32)
    in_x, acts = c < channels, c < changed
    s1 = tl.zeros([BLOCK_C], tl.float64)
    s2 = tl.zeros([BLOCK_C], tl.float64)
    number = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P).to(tl.int64)
        keep = (p < parts)[:, None] & in_x[None, :]
        at = TABLE + p[:, None] * TABLE_ROWS * channels + c[None, :]  # [BLOCK_P, BLOCK_C]
        s1 += column_sums(tl.load(at, mask=keep, other=0.0).to(tl.float64))
        s2 += column_sums(tl.load(at + channels, mask=keep, other=0.0).to(tl.float64))
        if HIDDEN is not None:
            number += column_sums(tl.load(at + 2 * channels, mask=keep, other=0.0).to(tl.float64))
    shift = _shift(X, HIDDEN, c, acts, inner, count, x_row, outer_stride, channel_stride)
    rows = count
    if HIDDEN is not None:
        rows = tl.maximum(number, 1.0)
    share = 1.0 / rows.to(tl.float64)
    mean, square = s1 * share, s2 * share
    centred = tl.maximum(square - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float32)
    mu = (mean + shift.to(tl.float64)).to(tl.float32)
    offset, slope = _coefficients(
        mu, centred, rows.to(tl.float32), min_mean, max_mean, min_rms, max_rms, grad_scale
    )
    while tile < end:
        outer, r, in_run, seen = _tile(HIDDEN, tile, tiles_of_run, inner, BLOCK_R)
        keep, read = in_run[:, None] & in_x[None, :], in_run[:, None] & acts[None, :]
        base, across = outer * outer_stride, (c * channel_stride)[None, :]
        x = tl.load(X + base + (r * x_row)[:, None] + across, mask=read, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + base + (r * grad_row)[:, None] + across, mask=keep, other=0.0).to(tl.float32)
        change = tl.fma(slope[None, :], x - mu[None, :], offset[None, :])
        changes = acts[None, :] if HIDDEN is None else seen[:, None] & acts[None, :]
        y = tl.where(changes, tl.fma(tl.abs(grad), change, grad), grad)
        tl.store(Y + base + (r * y_row)[:, None] + across, y.to(Y.dtype.element_ty), mask=keep)
        tile += 1


def tiles(inner: int, channels: int, by_row: bool, element: int) -> tuple[int, int, int]:
    """Returns (inner elements, channels, warps) of a tile of elements of so many bytes."""
    block_c = min(CHANNELS, next_power_of_2(channels)) if by_row else 1
    block_r = min(BYTES // element // block_c, max(128, next_power_of_2(inner)))
    return block_r, block_c, max(4, min(WARPS, block_r * block_c * element // 1024))


class _Parts(NamedTuple):
    """How programs share x, seen as (outer, inner, channels)."""

    outer: int
    inner: int
    channels: int
    tile: dict[str, int]
    column_tiles: int
    tiles_of_run: int
    count: int  # tiles of each channel
    per_part: int
    parts: int

    @property
    def programs(self) -> int:
        return self.parts * self.column_tiles

    def table(self, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty((self.parts, 2 if hidden is None else 3, self.channels), dtype=torch.float32)


def _parts(x: torch.Tensor) -> _Parts:
    by_row = x.dim() == 2
    outer, channels, inner = (1, *x.shape[::-1]) if by_row else x.shape
    block_r, block_c, warps = tiles(inner, channels, by_row, x.element_size())
    column_tiles, tiles_of_run = cdiv(channels, block_c), cdiv(inner, block_r)
    count = outer * tiles_of_run
    per_part = cdiv(count, max(1, RESIDENT * processors(x) // column_tiles))
    tile = {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}
    return _Parts(
        outer, inner, channels, tile, column_tiles, tiles_of_run, count, per_part, cdiv(count, per_part)
    )


def sums_of_jobs(
    jobs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], table: _jobs.Table
) -> list[torch.Tensor | None]:
    """Returns the sums of each (x, act, hidden), None for those that are to add up by themselves: one launch for all
    that have the same dtype and tile.
    """
    found: list[torch.Tensor | None] = [None] * len(jobs)
    kinds: dict[tuple, list[tuple[int, _Parts]]] = {}
    for i, (x, _, hidden) in enumerate(jobs):
        if x.dim() == 2 and _jobs.fits(x):
            parts = _parts(x)
            kinds.setdefault((x.dtype, hidden is None, *parts.tile.items()), []).append((i, parts))
    for (dtype, bare, *tile), members in kinds.items():
        rows = []
        for i, p in members:
            x, act, hidden = jobs[i]
            found[i] = sums = p.table(x, hidden)
            sizes = p.channels, x.stride(0), p.inner, p.count, p.per_part
            rows.append(_jobs.row((x, act, sums, as_bytes(hidden), *sizes)))
        programs = max(p.programs for _, p in members)
        constants = {"DTYPE": _jobs.TYPES[dtype], "PADDED": not bare, **dict(tile)}
        _jobs.run(sums_of_jobs_kernel, table(rows), programs, **constants)
    return found


def balancer_gradient_forward(
    grad: torch.Tensor,
    x: torch.Tensor,
    min_mean: float | None,
    max_mean: float | None,
    min_rms: float | None,
    max_rms: float | None,
    grad_scale: float | None,
    limits: torch.Tensor | None = None,
    act: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    in_place: bool = False,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the changed gradient, written over ``grad`` if ``in_place``, for x (rows, channels), whose rows may lie
    apart, or contiguous x (outer, channels, inner).

    grad: as x. limits: (5,), in place of the five numbers. act: one number; if it is 0, the result is grad. hidden:
    (rows,) or (outer * inner,), bool. sums: what ``sums_of_jobs`` found for x, act and hidden.
    """
    p, by_row = _parts(x), x.dim() == 2
    y = grad if in_place else torch.empty_like(grad, memory_format=torch.contiguous_format)
    if by_row:
        rows, outer_stride, channel_stride = (t.stride(0) for t in (grad, x, y)), 0, 1
    else:
        rows, outer_stride, channel_stride = (1, 1, 1), p.channels * p.inner, p.inner
    grad_row, x_row, y_row = rows
    sizes = p.channels, p.inner, p.outer * p.inner, p.count, p.tiles_of_run, p.per_part
    grid = (p.programs,)
    as_read = as_bytes(hidden)
    if sums is None:
        sums = p.table(x, hidden)
        launch(
            sums_kernel, grid, x, as_read, act, sums, *sizes, x_row, outer_stride, channel_stride, **p.tile
        )
    numbers = (0.0,) * 5 if limits is not None else (min_mean, max_mean, min_rms, max_rms, grad_scale)
    launch(change_kernel, grid,
        grad, x, as_read, sums, limits, act, y, *numbers, p.parts, *sizes,
        grad_row, x_row, y_row, outer_stride, channel_stride,
        IN_PLACE=in_place, BLOCK_P=PARTS, **p.tile,
    )  # fmt: skip
    return y
