# SPDX-License-Identifier: Apache-2.0
"""One launch of a kernel for many tensors of a recorded pass: its jobs.

A job is a row of a table of int64 on the device, whose addresses and sizes the kernel reads; program_id(1) is the job.
Kernels are compiled for addresses and sizes that are multiples of 16, as for arguments, so other tensors are no jobs.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import launch

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
Table = Callable[[Sequence[Sequence[int]]], torch.Tensor]  # rows of integers -> the same on the device


@triton.jit
def pointer(job, field: tl.constexpr, dtype: tl.constexpr):
    """Returns the address in a field of a job."""
    return tl.multiple_of(tl.load(job + field).to(tl.pointer_type(dtype)), 16)


@triton.jit
def number(job, field: tl.constexpr):
    return tl.load(job + field).to(tl.int32)


@triton.jit
def multiple(job, field: tl.constexpr):
    """Returns a number that is a multiple of 16. A caller's hint about ``number`` would be lost, as its call is."""
    return tl.multiple_of(tl.load(job + field).to(tl.int32), 16)


def fits(x: torch.Tensor) -> bool:
    """Says whether x (rows, channels) can be part of a job."""
    row = x.stride(0) if len(x) > 1 else x.shape[1]
    return (x.data_ptr() | row | x.shape[1]) % 16 == 0


def row(fields: Iterable[torch.Tensor | int | None]) -> list[int]:
    """Returns the addresses of tensors, and sizes, of a job."""
    return [f.data_ptr() if isinstance(f, torch.Tensor) else f or 0 for f in fields]


def run(kernel, jobs: torch.Tensor, programs: int, **constants) -> None:
    """Runs so many programs for each job of a table."""
    launch(kernel, (programs, len(jobs)), jobs, FIELDS=jobs.shape[1], **constants)
