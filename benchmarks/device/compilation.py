# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels on all cores before anything runs: a check of one op would compile its sixty one after another.

Triton is imported in the functions, because ``fastasr gpu`` says without it that it is missing.
"""

import contextlib
from collections.abc import Callable

from fastasr.benchmarks.device.checks import DTYPES
from fastasr.benchmarks.device.machine import GPU
from fastasr.testing.table import forward_and_backward, tables

PARTS = 4  # units that compile the kernels of one op


def launches(machine: GPU, op: str) -> list:
    """Returns the launches of an op's small samples on a fake GPU like this one, one of each compiled kernel."""
    from fastasr.testing.fake_gpu import fake_gpu

    settings, found = machine.stand_in(), {}
    for sample in machine.samples(tables()[op]):
        for dtype in DTYPES:
            with fake_gpu(**settings) as gpu:
                forward_and_backward(tables()[op], sample, dtype)
            found |= {(launch.source.hash(), str(launch.options)): launch for launch in gpu.launches}
    return list(found.values())


def compile_kernels(tell: Callable, machine: GPU, op: str, part: int) -> None:
    """Fills Triton's cache with one of ``PARTS`` parts of what an op's checks launch at small shapes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.errors import TritonError

    major, minor = machine.stand_in()["capability"]
    wanted = launches(machine, op)[part::PARTS]
    for launch in () if machine.dry else wanted:
        with contextlib.suppress(TritonError):  # the check that launches it says so
            triton.compile(launch.source, GPUTarget("cuda", 10 * major + minor, 32), launch.options)
