# SPDX-License-Identifier: Apache-2.0
"""A GPU that compiles kernels as for a real one and runs their PTX on the CPU."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import numpy as np
import torch
import triton

from fastasr.kernels import _jobs, _launch, layer_norm_lstm
from fastasr.testing import fake_gpu as fake
from tests.kernels import job_tables

from . import registers, transfers, warps  # noqa: F401, the instructions
from .machine import Machine
from .memory import Global
from .program import read
from .trace import Trace

OPTIONS = ("num_warps", "num_stages", "maxnreg", "allowed_dot_input_precisions")
_compiled = {}  # (program, Triton's code) by source, options and architecture


@dataclass
class EmulatedGPU(fake.FakeGPU):
    """With ``sample``, a launch runs this many of its programs, spread over the grid, and leaves a trace and its
    machine code; what it writes is not the result."""

    sample: int = 0
    traces: list[tuple[fake.Launch, Trace, bytes]] = field(default_factory=list)

    def compile(self, kernel, key, signature, device, constants, options, attributes, rest):
        found = super().compile(kernel, key, signature, device, constants, options, attributes, rest)
        target, chosen = self.get_current_target(), {n: options.__dict__[n] for n in OPTIONS}
        place = found.src.hash(), str(chosen), target.arch
        if place not in _compiled:
            code = triton.compile(found.src, target=target, options=chosen)
            _compiled[place] = read(code.asm["ptx"]), code
        found.program, found.code = _compiled[place]
        found.run = lambda *arguments: self._run(found, *arguments)
        return found

    def _run(self, code, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        type(code).run(code, x, y, z, stream, function, packed, metadata, enter, leave, *arguments)
        given = dict(zip(code.kernel.arg_names, arguments, strict=True))
        kept = [value for name, value in given.items() if code.src.signature[name] != "constexpr"]
        tensors = [value for value in kept if isinstance(value, torch.Tensor)]
        if "JOBS" in given:
            tensors += job_tables.tensors(given["JOBS"]).values()
        storages = [t.untyped_storage() for t in tensors]
        memory = Global([(s.data_ptr(), s.nbytes()) for s in storages])
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in kept]
        values += [0, 0]  # Triton's own two pointers
        threads, shared = 32 * code.code.metadata.num_warps, code.code.metadata.shared
        machine = Machine(code.program, threads, shared, memory, values)
        programs = None
        if self.sample:
            machine.trace = Trace(machine)
            self.traces.append((self.launches[-1], machine.trace, code.code.asm["cubin"]))
            programs = np.unique(np.linspace(0, x * y * z - 1, self.sample).astype(np.int64))
        machine.run((x, y, z), programs)


class _Never(dict):
    """Keeps nothing, so that each launch passes through Triton, which hands on tensors and not their addresses."""

    def __setitem__(self, key, value):
        pass


@contextlib.contextmanager
def emulated_gpu(**settings) -> Iterator[EmulatedGPU]:
    """Runs the Triton kernels of CPU tensors on an :class:`EmulatedGPU` inside the ``with`` block."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (fake, "FakeGPU", EmulatedGPU),
            (_jobs, "row", partial(job_tables.row, make=_jobs.row)),
            # Programs of one launch would wait for each other, and here they take every instruction together.
            (layer_norm_lstm, "_together", lambda device: False),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        gpu = stack.enter_context(fake.fake_gpu(**settings))
        stack.enter_context(mock.patch.object(_launch, "_compiled", _Never()))
        stack.enter_context(np.errstate(all="ignore"))  # NaN and infinity are inputs here, not accidents
        yield gpu
