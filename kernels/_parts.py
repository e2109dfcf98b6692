# SPDX-License-Identifier: Apache-2.0
"""Sums over rows in two kernels: every program of the first adds up the rows of its part, the second adds up the parts.

One or two programs of 16 warps on each multiprocessor have as many rows in flight as several small ones would, and the
table of the parts stays small: half a megabyte for two sums of 512 columns. Which rows a part has depends on their
number and on the device's multiprocessors: on one kind of device results repeat bit for bit, without atomics.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from fastasr.kernels import _jobs
from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._jobs import multiple, number, pointer
from fastasr.kernels._launch import cdiv, launch, next_power_of_2, processors
from fastasr.kernels._vectors import neighbours

ELEMENTS = 4096  # A tile has this many elements: 8 in each thread.
WARPS = 16
REDUCE = {"BLOCK_C": 8, "num_warps": 8}
TABLES = {"BLOCK": 1024, "num_warps": 4}  # for programs that add up tables
MAX_PARTS = 1024  # A tile adds at most this many parts; longer inputs take several blocks.


def split_rows(
    rows: int, columns: int, like: torch.Tensor, tiles: int = 1, elements: int = ELEMENTS, resident: int = 1
) -> tuple[int, int, int]:
    """Returns (rows per tile of that many columns, rows per part, parts) for ``tiles`` programs of each part, of which
    a multiprocessor of the tensor's device holds ``resident``.
    """
    block = max(1, elements // columns)
    most = max(1, resident * processors(like) // tiles)
    rows_per_part = cdiv(cdiv(rows, most), block) * block
    return block, rows_per_part, cdiv(rows, rows_per_part)


def reduce_tile(parts: int) -> dict[str, int]:
    """Returns the tile and the warps of a kernel that adds up so many parts."""
    return {"BLOCK_P": max(128, next_power_of_2(parts)), **REDUCE}


@triton.jit
def add_parts_at(place, PARTS, OUT, parts, columns, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds up the rows of a table, of its columns from place * BLOCK_C on."""
    c = place.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P).to(tl.int64)
        keep = (p < parts)[:, None] & (c < columns)[None, :]
        table = tl.load(PARTS + p[:, None] * columns + c[None, :], mask=keep, other=0.0)  # [BLOCK_P, BLOCK_C]
        total += tl.sum(table.to(tl.float64), axis=0)
    tl.store(OUT + c, total.to(tl.float32).to(OUT.dtype.element_ty), mask=c < columns)


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(PARTS, OUT, parts, columns, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds up the rows of a table; program_id(1) is the table."""
    PARTS += tl.program_id(1).to(tl.int64) * parts * columns
    OUT += tl.program_id(1).to(tl.int64) * columns
    add_parts_at(tl.program_id(0), PARTS, OUT, parts, columns, BLOCK_P, BLOCK_C)


def add_parts(table: torch.Tensor, out: torch.Tensor, later: Callable[..., bool] | None = None) -> None:
    """Writes the sums over the rows of tables (..., parts, columns), added up in float64.
    ``later(sums, do, work)`` says whether it will ``do`` that for one table with others.
    """
    parts, columns = table.shape[-2:]
    if later is not None and columns % 16 == 0 and later(out, add_parts_of_jobs, (table, out)):
        return
    tile = reduce_tile(min(parts, MAX_PARTS))
    grid = cdiv(columns, tile["BLOCK_C"]), out.numel() // columns
    launch(add_parts_kernel, grid, table, out, parts, columns, **tile)


@triton.jit
def add_parts_of_jobs_kernel(
    JOBS, FIELDS: tl.constexpr, DTYPE: tl.constexpr, TO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Adds up the rows of the table of each job."""
    # the fields: PARTS, OUT, parts, columns
    job = JOBS + tl.program_id(1) * FIELDS
    columns = multiple(job, 3)
    if tl.program_id(0) * BLOCK_C < columns:
        PARTS, OUT = pointer(job, 0, DTYPE), pointer(job, 1, TO)
        add_parts_at(tl.program_id(0), PARTS, OUT, number(job, 2), columns, BLOCK_P, BLOCK_C)


def add_parts_of_jobs(jobs: Sequence[tuple[torch.Tensor, torch.Tensor]], bring: _jobs.Table) -> None:
    """Does what ``add_parts`` does for many (table, out) whose sizes are multiples of 16: one launch for all that have
    the same dtypes and tile.
    """
    kinds: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for table, out in jobs:
        tile = reduce_tile(min(len(table), MAX_PARTS))
        kinds.setdefault((table.dtype, out.dtype, *tile.items()), []).append((table, out))
    for (dtype, to, *tile), members in kinds.items():
        rows = [_jobs.row((table, out, *table.shape)) for table, out in members]
        constants = {"DTYPE": _jobs.TYPES[dtype], "TO": _jobs.TYPES[to], **dict(tile)}
        programs = max(cdiv(table.shape[1], constants["BLOCK_C"]) for table, _ in members)
        _jobs.run(add_parts_of_jobs_kernel, bring(rows), programs, **constants)


@triton.jit
def sum_parts(at, keep):
    """Returns the sums over the parts that lie ``at`` pointers, whose first dimension is the part's, in float64."""
    table = tl.load(at, mask=keep, other=0.0)  # [BLOCK_P, BLOCK_C]
    return tl.sum(table.to(tl.float64), axis=0).to(tl.float32)


@triton.jit
def store_pair(PARTS, c, C, first, second):
    """Writes this program's rows of two tables (programs, C), one behind the other: the sums over the rows of ``first``
    and ``second`` [BLOCK_R, BLOCK_C].
    """
    row = PARTS + tl.program_id(0).to(tl.int64) * C + c
    first = column_sums(first.to(PARTS.dtype.element_ty))
    second = column_sums(second.to(PARTS.dtype.element_ty))
    tl.store(row, first, mask=c < C)
    tl.store(row + tl.num_programs(0).to(tl.int64) * C, second, mask=c < C)


@triton.jit(do_not_specialize=["parts"])
def add_pair_kernel(PARTS, FIRST, SECOND, parts, columns, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds up the rows of two tables of ``parts`` rows, one behind the other; program_id(1) is the table."""
    second = tl.program_id(1)
    p = tl.arange(0, BLOCK_P)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    keep = (p < parts)[:, None] & (c < columns)[None, :]
    rows = second.to(tl.int64) * parts + p
    total = sum_parts(PARTS + rows[:, None] * columns + c[None, :], keep)
    if second == 0:
        tl.store(FIRST + c, total.to(FIRST.dtype.element_ty), mask=c < columns)
    else:
        tl.store(SECOND + c, total.to(SECOND.dtype.element_ty), mask=c < columns)


def add_pair(
    table: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    tile: dict[str, int] | None = None,
    later: Sequence[Callable[..., bool] | None] | None = None,
) -> None:
    """Writes the sums over the rows of two tables (2, parts, columns), added up in float64. A tile holds all parts.
    ``later`` are those of ``add_parts``, of each table.
    """
    if later is not None:
        for i, out in enumerate((first, second)):
            add_parts(table[i], out, later[i])
        return
    _, parts, columns = table.shape
    tile = tile or reduce_tile(parts)
    launch(add_pair_kernel, (cdiv(columns, tile["BLOCK_C"]), 2), table, first, second, parts, columns, **tile)


@triton.jit(do_not_specialize=["parts"])
def add_tables_kernel(PARTS, OUT, size, parts, BLOCK: tl.constexpr):
    """Adds up ``parts`` tables of ``size`` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + neighbours(BLOCK, PARTS, OUT)
    total = tl.zeros([BLOCK], tl.float64)
    for part in range(parts):
        total += tl.load(PARTS + part * size.to(tl.int64) + at, mask=at < size, other=0.0).to(tl.float64)
    tl.store(OUT + at, total.to(tl.float32).to(OUT.dtype.element_ty), mask=at < size)


def add_tables(parts: torch.Tensor, out: torch.Tensor, count: int) -> None:
    """Writes the sum of ``count`` tables of out's size, added up in float64."""
    size = out.numel()
    launch(add_tables_kernel, (cdiv(size, TABLES["BLOCK"]),), parts, out, size, count, **TABLES)
