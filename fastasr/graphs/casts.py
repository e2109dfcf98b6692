# SPDX-License-Identifier: Apache-2.0
"""Casts all parameters to autocast's dtype together at the beginning of a recorded pass.

Under autocast every product casts its weights, and autograd casts their gradients back: 1,200 small kernels in a
training step of a Zipformer. While a call is recorded, the modules hold the casts in the place of these parameters.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fastasr._recording import storage_of, tensors_in
from fastasr.ops._dispatch import KernelFamily, triton_launchers
from fastasr.ops._kept import are_counted, counter

FAMILY = KernelFamily("casts", (), (triton_launchers("_casts"),))
KEPT = 130  # integers that fastasr.kernels._casts keeps of a parameter


class Uses(TorchDispatchMode):
    """Finds the parameters of which a pass uses only one whole cast to ``dtype``."""

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.sizes = {storage_of(p): p.numel() for p in parameters}
        self.casts: Counter[int] = Counter()
        self.others: set[int] = set()

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # here operators come whole, elsewhere as their parts
            with self:
                found = function.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        used = [t for t in tensors_in((args, kwargs)) if storage_of(t) in self.sizes]
        if used and not _is_view(function):
            (whole,) = {t.numel() == self.sizes[storage_of(t)] for t in used} or {False}
            if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is self.dtype and whole:
                self.casts[storage_of(used[0])] += 1
            else:
                self.others.update(map(storage_of, used))
        return function(*args, **kwargs)

    def castable(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Returns the parameters that the pass does not need in their own dtype."""
        alone = Counter(map(storage_of, parameters))  # two parameters may be views of one tensor
        return [
            p
            for p in parameters
            if alone[key := storage_of(p)] == self.casts[key] == 1 and key not in self.others and p.numel()
        ]


def _leaves(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if not parameters:
        return []
    starts, end = [], 0
    for p in parameters:
        starts.append(end)
        end += -(-p.numel() // 64) * 64  # each begins at a multiple of 16 bytes
    buffer = torch.zeros(end, dtype=dtype, device=parameters[0].device)
    return [
        buffer[start : start + p.numel()].view(p.shape) for start, p in zip(starts, parameters, strict=True)
    ]


def _is_view(function: OpOverload) -> bool:
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class Casts:
    """The casts of some parameters of a module: leaves of autograd. Those that ``others`` hold, the casts of the
    module's other graphs, are theirs. The values of the rest lie in one buffer.

    On a GPU a pass casts what has changed since any pass cast it: all where the host has counted a write
    (``noticing``), and each parameter whose sample differs. A pass that trains casts all.
    """

    def __init__(
        self, module: nn.Module, parameters: list[Tensor], dtype: torch.dtype, others: Iterable["Casts"] = ()
    ) -> None:
        self.parameters = parameters
        known = {
            id(p): (leaf, kept)
            for casts in others
            for p, leaf, kept in zip(casts.parameters, casts.leaves, casts.kept, strict=True)
            if (leaf.shape, leaf.dtype, leaf.device) == (p.shape, dtype, p.device)
        }
        device = parameters[0].device
        with torch.inference_mode(False):  # for graphs that train too
            self.forced = torch.ones(1, dtype=torch.int64, device=device)
            rest = [p for p in parameters if id(p) not in known]
            kept = torch.zeros(len(rest), KEPT, dtype=torch.int64, device=device)
            known |= zip(map(id, rest), zip(_leaves(rest, dtype), kept, strict=True), strict=True)
            self.leaves: list[Tensor] = [known[id(p)][0].requires_grad_(p.requires_grad) for p in parameters]
        self.kept: list[Tensor] = [known[id(p)][1] for p in parameters]
        storages = map(torch.Tensor.untyped_storage, self.leaves)
        self.bytes = {s.data_ptr(): s.nbytes() for s in storages}  # of each buffer, by its address
        self.of = dict(zip(map(id, parameters), self.leaves, strict=True))
        self.places: list[tuple[dict[str, Any], str, Tensor]] = [
            (m._parameters, name, p)
            for m in module.modules()
            for name, p in m._parameters.items()
            if p is not None and id(p) in self.of
        ]
        kernels = FAMILY.kernels(self.leaves[0])
        launchers: Any = None if kernels is None else kernels.forward
        casts = [*zip(self.leaves, parameters, self.kept, strict=True)]
        self.rest = casts  # those that no kernel casts
        self.on_device = None if launchers is None else launchers.Casts(casts, self.forced)
        if self.on_device is not None:
            self.rest = self.on_device.rest
        self.counted = are_counted(parameters)
        self.writes: list[int] | None = None  # that torch had counted when a pass last cast all

    def make(self) -> None:
        """Casts the parameters anew that have changed."""
        if self.on_device is not None:
            self.on_device.run()
        if self.rest:
            with torch.no_grad():
                torch._foreach_copy_([leaf for leaf, *_ in self.rest], [p for _, p, _ in self.rest])

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """Has the pass inside the block cast all, if torch has counted a write to a parameter since the last one."""
        writes = [*map(counter, self.parameters)] if self.counted else None
        stale = writes is None or writes != self.writes
        if stale:
            self.forced.fill_(1)
        yield
        if stale:
            self.forced.zero_()
            self.writes = writes

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Has the modules hold the casts inside the block."""
        try:
            for table, name, p in self.places:
                table[name] = self.of[id(p)]
            yield
        finally:
            for table, name, p in self.places:
                table[name] = p
