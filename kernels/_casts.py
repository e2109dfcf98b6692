# SPDX-License-Identifier: Apache-2.0
"""Casts of many parameters by two launches, of those alone that have changed.

One kernel compares a sample of each parameter, bit by bit, with the sample that it kept at the last cast; the other
casts where they differ, or where the host has seen a write. So in inference a replay reads no weights to cast them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastasr.kernels import _jobs
from fastasr.kernels._jobs import multiple, pointer
from fastasr.kernels._vectors import neighbours

SAMPLE = 128  # elements of a sample, which are eight pieces
PROGRAMS = 32  # of each parameter
BLOCK = 4096
_BITS = {2: tl.int16, 4: tl.int32}

Cast = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # cast, parameter, kept (130,) int64: the sample, and the verdict


# the fields of a job: X, Y, size, KEPT, FORCED
@triton.jit
def compare_kernel(JOBS, FIELDS: tl.constexpr, BITS: tl.constexpr, SAMPLE: tl.constexpr):
    """Keeps a sample of each tensor, and whether it must be cast."""
    job = JOBS + tl.program_id(1) * FIELDS
    x, kept, size = pointer(job, 0, BITS), pointer(job, 3, BITS), multiple(job, 2)
    piece, offset = tl.arange(0, SAMPLE) // 16, tl.arange(0, SAMPLE) % 16
    at = piece * tl.maximum(size // 8 // 16 * 16, 16) + offset
    now = tl.load(x + at, mask=at < size, other=0)
    before = tl.load(kept + tl.arange(0, SAMPLE))
    different = tl.sum((now != before).to(tl.int32), axis=0) > 0
    forced = tl.load(pointer(job, 4, tl.int64)) != 0
    tl.store(pointer(job, 3, tl.int64) + SAMPLE, (different | forced).to(tl.int64))
    tl.store(kept + tl.arange(0, SAMPLE), now)


@triton.jit
def cast_kernel(
    JOBS, FIELDS: tl.constexpr, DTYPE: tl.constexpr, TO: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Casts the tensors that must be; program_id(0) takes every so many blocks of one."""
    job = JOBS + tl.program_id(1) * FIELDS
    if tl.load(pointer(job, 3, tl.int64) + SAMPLE) != 0:
        x, y, size = pointer(job, 0, DTYPE), pointer(job, 1, TO), multiple(job, 2)
        for begin in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = begin + neighbours(BLOCK, x, y)
            tl.store(y + at, tl.load(x + at, mask=at < size).to(TO), mask=at < size)


class Casts:
    """Some casts. ``run()`` makes those that it must; where ``forced`` (1,) int64 is not 0, all. ``rest`` has those
    that are no jobs.
    """

    def __init__(self, casts: Sequence[Cast], forced: torch.Tensor) -> None:
        self.rest: list[Cast] = []
        rows: dict[tuple[torch.dtype, torch.dtype], list[list[int]]] = {}
        for cast in casts:
            y, x, kept = cast
            if (
                x.is_contiguous()
                and (x.data_ptr() | x.numel()) % 16 == 0
                and x.numel() < 2**31 - PROGRAMS * BLOCK
            ):
                fields = _jobs.row((x, y, x.numel(), kept, forced))
                rows.setdefault((x.dtype, y.dtype), []).append(fields)
            else:
                self.rest.append(cast)
        device = forced.device
        self.tables = {k: torch.tensor(r, dtype=torch.int64, device=device) for k, r in rows.items()}

    def run(self) -> None:
        for (dtype, to), table in self.tables.items():
            _jobs.run(compare_kernel, table, 1, BITS=_BITS[dtype.itemsize], SAMPLE=SAMPLE, num_warps=4)
            constants = {"DTYPE": _jobs.TYPES[dtype], "TO": _jobs.TYPES[to], "SAMPLE": SAMPLE, "BLOCK": BLOCK}
            _jobs.run(cast_kernel, table, PROGRAMS, **constants, num_warps=8)
