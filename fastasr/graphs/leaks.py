# SPDX-License-Identifier: Apache-2.0
"""Finds tensors that a call makes and keeps, such as those of a cache. A replay would not make them again, and they
would lie in memory that later replays overwrite.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from types import CellType, FrameType, FunctionType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastasr._recording import storage_of, tensors_in
from fastasr.graphs.recording import Unrecordable

_CONTAINERS = (list, tuple, set, dict, CellType)


class Made(TorchDispatchMode):
    """Notes all tensors that are made inside the block, in which saved tensors have no hooks, and the memory of those
    from outside that are read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, torch.Size]] = []
        self.outside: dict[int, torch.Tensor] = {}
        self._inside: set[int] = set()

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise Unrecordable(
                "saved tensors have hooks, as in checkpointing, which run in the backward pass"
            )
        found = function(*args, **(kwargs or {}))
        taken = {storage_of(t): t for t in tensors_in((args, kwargs))}
        new = [t for t in tensors_in(found) if storage_of(t) not in taken]
        self._inside.update(map(storage_of, new))
        for key, t in taken.items():
            if key not in self._inside and key not in self.outside:
                self.outside[key] = torch.ops.aten.detach.default(t)  # without t's base and graph of autograd
        self.made += [(StorageWeakRef(t.untyped_storage()), t.shape) for t in new]
        return found

    def check(self) -> None:
        """Refuses the call if such a tensor is still there after the block."""
        for storage, shape in self.left():
            raise Unrecordable(f"a call keeps a tensor {_described(storage, shape)}")

    def left(self) -> list[tuple[StorageWeakRef, torch.Size]]:
        """Returns the tensors that are still there."""
        if not all(storage.expired() for storage, _ in self.made):
            gc.collect()  # they may be parts of cycles
        self.made = [(storage, shape) for storage, shape in self.made if not storage.expired()]
        return self.made


def _described(storage: StorageWeakRef, shape: torch.Size) -> str:
    """Returns the shape of the tensor in Python that has the storage, and what holds it, as far as Python knows."""
    everything = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    for t in [t for t in everything if storage_of(t) == storage.cdata]:
        if holder := _holder(t):
            return f"{tuple(t.shape)}, in {holder}"
    return f"{tuple(shape)}"


def _holder(held: Any) -> str:
    below = [held]
    for _ in range(5):  # containers that lie in each other
        above: list[Any] = []
        for held in below:
            if name := _global(held):
                return name
            for holder in gc.get_referrers(held):
                if isinstance(holder, _CONTAINERS):
                    if holder is not below:
                        above.append(holder)
                elif isinstance(holder, FunctionType):
                    return holder.__qualname__
                elif not isinstance(holder, (torch.Tensor, FrameType, Iterator)):
                    return f"a {type(holder).__qualname__}"
        below = above
    return ""


def _global(held: Any) -> str:
    for module in [*sys.modules.values()]:
        for name, value in [*getattr(module, "__dict__", {}).items()]:
            if value is held:
                return f"{module.__name__}.{name}"
    return ""
