# SPDX-License-Identifier: Apache-2.0
"""A GPU that computes nothing: launchers run on CPU tensors, and every launch is recorded instead of executed.

Everything on the host is what a GPU would see, from the op's checks to the driver's launch. Nothing is compiled.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction, driver

from fastasr.kernels import _launch, _row
from fastasr.ops import _dispatch


@dataclass
class Launch:
    """A launch as the driver sees it: kernel, grid, current device, stream, and arguments, tensors or their
    addresses."""

    kernel: JITFunction
    grid: tuple[int, int, int]
    device: int
    stream: int
    arguments: tuple
    options: dict
    source: ASTSource  # what Triton compiles of the kernel for these arguments

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass
class FakeGPU:
    """Stands for Triton's driver. All tensors are on device ``home``; a call's device is ``current``."""

    capability: tuple[int, int] = (9, 0)
    processors: int = 132
    home: int = 0
    current: int = 0
    launches: list[Launch] = field(default_factory=list)
    elsewhere: dict[int, int] = field(default_factory=dict)  # devices of some tensors, by address
    errors: dict[JITFunction, Exception] = field(default_factory=dict)  # kernel -> its compiler error
    compiled: set[JITFunction] = field(default_factory=set)  # kernels that send their launches here

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def device_of(self, t: torch.Tensor) -> int:
        return self.elsewhere.get(t.data_ptr(), self.home)

    @contextlib.contextmanager
    def guard(self, device: int) -> Iterator[None]:
        """Stands for ``torch.cuda.device``."""
        previous, self.current = self.current, device
        yield
        self.current = previous

    def compile(
        self,
        kernel: JITFunction,
        key: Any,
        signature: dict[str, str],
        device: int,
        constants: dict,
        options: Any,
        attributes: dict,
        _: object,
    ) -> "_Compiled":
        """Stands for Triton's compiler."""
        kernel.cache_key  # noqa: B018, which notes the globals that the kernel reads: later launches compare them
        if kernel in self.errors:
            raise self.errors[kernel]
        self.compiled.add(kernel)
        found = kernel.device_caches[device][0][key] = _Compiled(
            self, kernel, options.__dict__, ASTSource(kernel, signature, constants, attributes)
        )
        return found


class _Compiled:
    """Stands for Triton's compiled kernel."""

    function, packed_metadata = 0, (4, 1, 0)
    launch_metadata = CompiledKernel.launch_metadata

    def __init__(self, gpu: FakeGPU, kernel: JITFunction, options: dict, source: ASTSource) -> None:
        self.gpu, self.kernel, self.options, self.src = gpu, kernel, options, source
        self.name = kernel.__name__

    def _init_handles(self) -> None:
        pass

    def run(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: object,
        packed_metadata: object,
        metadata: object,
        enter: Callable[[object], None] | None,
        leave: Callable[[object], None] | None,
        *arguments: Any,
    ) -> None:
        launch = Launch(self.kernel, (x, y, z), self.gpu.current, stream, arguments, self.options, self.src)
        if enter is not None:
            enter(metadata)
        self.gpu.launches.append(launch)
        if leave is not None:
            leave(metadata)


@contextlib.contextmanager
def fake_gpu(**settings: Any) -> Iterator[FakeGPU]:
    """Sends the Triton kernels of CPU tensors to a :class:`FakeGPU` of these settings inside the ``with`` block."""
    gpu = FakeGPU(**settings)
    properties = SimpleNamespace(multi_processor_count=gpu.processors)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (driver, "_active", gpu),
            (JITFunction, "_do_compile", lambda kernel, *rest: gpu.compile(kernel, *rest)),
            (torch.Tensor, "get_device", lambda t: gpu.device_of(t)),
            (torch.cuda, "device", gpu.guard),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "get_device_capability", lambda *_: gpu.capability),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (_dispatch, "interpreting", lambda: True),
            (_launch, "_compiled", {}),
            (_launch, "_machine", cache(_launch._machine.__wrapped__)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_dispatch.backend("triton"))
        try:
            yield gpu
        finally:
            for kernel in gpu.compiled:
                kernel.device_caches.clear()


@contextlib.contextmanager
def models_on_fake_gpu(**settings: Any) -> Iterator[FakeGPU]:
    """Does what ``fake_gpu`` does, for whole models: an op without Triton kernels runs its definition, as on CUDA."""

    def choose(
        family: _dispatch.KernelFamily, device: torch.device, dtype: torch.dtype
    ) -> _dispatch.Kernels | None:
        of_triton = (i for i in family.implementations if i.backend == "triton" and dtype in i.dtypes)
        return next((implementation.load() for implementation in of_triton), None)

    def tables(*arguments: Any, make: Callable[..., Any] = _row.tables) -> Any:
        found = make(*arguments)
        for _, recording, *_ in found:  # torch looks these numbers up; numpy writes what no recording notes
            recording.numpy().fill(0)
        return found

    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(fake_gpu(**settings))
        stack.enter_context(mock.patch.object(_dispatch.KernelFamily, "_choose", choose))
        stack.enter_context(mock.patch.object(_row, "tables", tables))
        yield gpu
