# SPDX-License-Identifier: Apache-2.0
"""Finds out whether a module has changed since its weights were packed for a native call."""

import itertools
import operator

import torch

from fastasr.models.common.plain import global_hooks, hooks_of

_VERSION = torch.Tensor._version.__get__


class ModuleState:
    """A record of ``module``'s submodules, parameters, their versions and addresses, and methods bound to instances.

    The caller checks the mode and the hooks of ``module`` itself. ``drops`` selects the submodules that must not be in
    training mode. The record does not notice writes through ``parameter.data``.
    """

    def __init__(self, module, drops=lambda submodule: True, methods=("forward",)):
        parts = list(module.modules())
        self._dicts = [d for m in parts for d in (m._modules, m._parameters) if d]
        self._members = list(self._now())
        self._parameters = [t for t in self._members if isinstance(t, torch.Tensor)]
        self._hooks = [*itertools.chain.from_iterable(map(hooks_of, parts[1:])), *global_hooks()]
        self._dropping = [vars(m) for m in parts[1:] if drops(m)]
        self._instances, self._methods = [vars(m) for m in parts[1:]], methods
        self._bindings = list(self._bound())
        self._values = self._now_values()

    def _now(self):
        return itertools.chain.from_iterable(map(dict.values, self._dicts))

    def _bound(self):
        return itertools.chain.from_iterable(
            map(dict.get, self._instances, itertools.repeat(name)) for name in self._methods
        )

    def _now_values(self):
        try:
            return [*map(_VERSION, self._parameters)], [*map(torch.Tensor.data_ptr, self._parameters)]
        except RuntimeError:  # these tensors have no version or no address
            return None

    def traceable(self):
        """Says whether the parameters have versions and addresses."""
        return self._values is not None

    def watched(self):
        """Says whether a submodule has hooks now, or one selected by ``drops`` is in training mode."""
        return any(self._hooks) or any(map(operator.itemgetter("training"), self._dropping))

    def unchanged(self):
        """Says whether nothing but hooks and modes has changed since the record was made."""
        now = list(self._now())
        return (
            len(now) == len(self._members)
            and all(map(operator.is_, now, self._members))
            and all(map(operator.is_, self._bound(), self._bindings))
            and self._now_values() == self._values
        )
