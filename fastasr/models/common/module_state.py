# SPDX-License-Identifier: Apache-2.0
"""Finds out whether a module has changed since its weights were packed for a native call."""

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastasr.models.common.plain import are_active, global_hooks, hooks_of
from fastasr.ops import _kept


class ModuleState:
    """A record of ``module``'s submodules, parameters and buffers, their values (:mod:`fastasr.ops._kept`), and methods
    bound to instances.

    The caller checks the mode and the hooks of ``module`` itself. ``drops`` selects the submodules that must not be in
    training mode. ``copies`` says whether values were copied, so that they are compared: a part of them at each call.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        drops: Callable[[torch.nn.Module], bool] = lambda submodule: True,
        methods: tuple[str, ...] = ("forward",),
        copies: bool = True,
    ) -> None:
        parts = list(module.modules())
        self._dicts: list[dict[str, Any]] = [
            d for m in parts for d in (m._modules, m._parameters, m._buffers) if d and isinstance(d, dict)
        ]
        self._members = list(self._now())
        self._tensors = [t for t in self._members if isinstance(t, Tensor)]
        self._hooks = [*itertools.chain.from_iterable(map(hooks_of, parts[1:])), *global_hooks()]
        self._dropping = [vars(m) for m in parts[1:] if drops(m)]
        self._instances, self._methods = [vars(m) for m in parts[1:]], methods
        self._bindings = list(self._bound())
        self._originals = _kept.Originals(self._tensors, None if copies else (), _kept.PARTS)

    def _now(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self._dicts))

    def _bound(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(
            map(dict.get, self._instances, itertools.repeat(name)) for name in self._methods
        )

    def compare(self) -> None:
        """Compares values from now on, because copies of them have been found."""
        self._originals = _kept.Originals(self._tensors, parts=_kept.PARTS)

    def traceable(self) -> bool:
        """Says whether torch counts the writes to the parameters."""
        return self._originals.counted

    def watched(self) -> bool:
        """Says whether a submodule has hooks now, or one selected by ``drops`` is in training mode."""
        # A module of torch.compile or TorchScript has no mode of its own in its ``__dict__``.
        modes = map(dict.get, self._dropping, itertools.repeat("training"))
        return any(modes) or (any(self._hooks) and any(map(are_active, self._hooks)))

    def unchanged(self) -> bool:
        """Says whether the module still equals the record, except in hooks and modes."""
        now = list(self._now())
        return (
            len(now) == len(self._members)
            and all(map(operator.is_, now, self._members))
            and all(map(operator.is_, self._bound(), self._bindings))
            and self._originals.unchanged(self._tensors)
        )
