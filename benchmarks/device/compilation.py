# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels on all cores before anything runs: a check of an op would compile its sixty kernels one by one.

Triton is imported in the functions, so that ``fastasr gpu`` can report a missing Triton.
"""

import contextlib
import os
from collections.abc import Callable
from unittest import mock

from fastasr.benchmarks.device.checks import DTYPES
from fastasr.benchmarks.device.machine import GPU
from fastasr.testing.table import forward_and_backward, table

PARTS = 4  # units that compile the kernels of one op


def launches(machine: GPU, op: str) -> list:
    """Returns the launches of an op's small samples on a fake GPU like this one, one of each compiled kernel."""
    from fastasr.testing.fake_gpu import fake_gpu

    settings, found = machine.stand_in(), {}
    for sample in machine.samples(table(op)):
        for dtype in DTYPES:
            with fake_gpu(**settings) as gpu:
                forward_and_backward(table(op), sample, dtype)
            found |= {(launch.source.hash(), str(launch.options)): launch for launch in gpu.launches}
    return list(found.values())


def compile_kernels(tell: Callable, machine: GPU, op: str, part: int) -> None:
    """Fills Triton's cache with one of ``PARTS`` parts of the kernels that an op's checks launch at small shapes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.errors import TritonError

    major, minor = machine.stand_in()["capability"]
    wanted = launches(machine, op)[part::PARTS]
    for launch in () if machine.dry else wanted:
        with contextlib.suppress(TritonError):  # The check that launches the kernel reports it.
            triton.compile(launch.source, GPUTarget("cuda", 10 * major + minor, 32), launch.options)


def compiled_together(machine: GPU, step: Callable) -> None:
    """Fills Triton's cache with all that ``step()`` launches, on all cores: without this, a step of a whole model would
    compile a hundred kernels one after another. The step runs once with its launches left out.
    """
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction

    from fastasr.kernels import _launch
    from fastasr.testing.fake_gpu import FakeGPU

    if machine.dry:
        step()
        return
    major, minor = machine.stand_in()["capability"]
    gpu = FakeGPU((major, minor))
    with (
        mock.patch.object(JITFunction, "_do_compile", lambda kernel, *rest: gpu.compile(kernel, *rest)),
        mock.patch.object(_launch, "_compiled", {}),
    ):
        step()
    found = {(launch.source.hash(), str(launch.options)): launch for launch in gpu.launches}
    for kernel in {launch.kernel for launch in gpu.launches}:
        kernel.device_caches.clear()
    machine.synchronize()
    jobs = min(len(found), os.cpu_count() or 1)
    children = []
    for i in range(jobs):
        child = os.fork()
        if not child:  # The child compiles and does not touch the GPU.
            for launch in list(found.values())[i::jobs]:
                with contextlib.suppress(Exception):
                    compile_kernel(launch.source, GPUTarget("cuda", 10 * major + minor, 32), launch.options)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
