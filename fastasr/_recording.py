# SPDX-License-Identifier: Apache-2.0
"""Says whether a call is being recorded, to be replayed later (:mod:`fastasr.graphs`). Code of any layer may ask.

Recorded code reads nothing but tensors whose addresses stay: no value may reach the host, and a number that the host
draws or reads in every call comes from ``recording().numbers``. The host runs it once, so only the device's time counts
in the choice of a kernel.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor


class Numbers(Protocol):
    """Numbers that the host decides before each replay: ``values`` (count,) on the device."""

    values: Tensor

    @property
    def on(self) -> bool:
        """Says on the host whether the first number of this replay is not 0."""


class Job(Protocol):
    """Work that is done with that of others at the beginning of a pass."""

    def take(self) -> Any:
        """Returns what was found, once."""


class Recording(Protocol):
    """What code that is being recorded asks of a :class:`fastasr.graphs.recording.Recording`."""

    owned: bool
    columns: tuple[int, int] | None

    @property
    def back(self) -> "Recording | None":
        """Returns the recording of the backward pass."""

    def numbers(self, plan: Callable[[], Sequence[float]], count: int) -> Numbers: ...

    def phase(self, schedule: Any) -> bool: ...  # a number, or a module of training that is a number

    def verdict(self, hear: Callable[[Any], object], acts: Numbers) -> Tensor: ...

    def job(self, do: Callable[..., list[Any]], work: Any) -> Job: ...

    def later(self, leaf: Tensor, gradient: Tensor, do: Callable[..., object], work: Any) -> bool: ...

    def refuse(self, reason: str) -> NoReturn: ...


class _Thread(threading.local):
    def __init__(self) -> None:  # in each thread: looking for what is nowhere takes 0.3 us
        self.recording: Recording | None = None


_thread = _Thread()


def recording() -> Recording | None:
    """Returns the recording of this thread's calls, or None. Backward passes run in a
    thread of autograd's, so a node of autograd keeps the recording of its forward pass.
    """
    return _thread.recording


def storage_of(t: Tensor) -> int:
    """Returns what tells whether two tensors lie in the same memory, while both exist."""
    return t.untyped_storage()._cdata


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the tensors among the arguments or results of an operator, in less time than torch's pytrees."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for part in values for t in tensors_in(part)]


def on_host(t: Tensor) -> bool:
    """Says whether reading values of ``t`` costs no wait: it lies on the CPU, and nothing records the call."""
    return t.is_cpu and has_values(t) and recording() is None


def is_traced() -> bool:
    """Says whether this thread's calls find the shapes of their results alone, for torch.compile or in FakeTensorMode,
    also those with real tensors: then code may neither read values nor keep a result for other calls."""
    fake = torch._C._TorchDispatchModeKey.FAKE
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(fake) is not None


def has_values(t: Tensor) -> bool:
    """Says whether values of ``t`` can be read: tensors of the meta device and of FakeTensorMode have a shape alone,
    and under torch.func.vmap a tensor may stand for many."""
    return not (is_traced() or t.is_meta or isinstance(t, FakeTensor) or is_batchedtensor(t))


@contextlib.contextmanager
def recorded_by(found: Recording | None) -> Iterator[None]:
    """Has ``recording()`` return ``found`` in this thread, inside the block."""
    before, _thread.recording = recording(), found
    try:
        yield
    finally:
        _thread.recording = before
