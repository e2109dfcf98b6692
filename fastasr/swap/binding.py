# SPDX-License-Identifier: Apache-2.0
"""Binding a forward, and what other methods go with it, to one instance, and undoing it.

A swapped module has these more entries in its ``__dict__`` and nothing else: ``forward`` and the rule's other
methods, our functions as bound methods, and ``__prepare_scriptable__``, which torch.jit.script calls on every
module before it compiles anything. Bound methods survive deepcopy (bound to the copy) and pickle by name, so a
pickled model loads unswapped. A shallow copy (``copy.copy``, the replicas of ``nn.DataParallel``) keeps methods
bound to the module that it was copied from: restore before making one.
"""

import copy
import functools
import types

import torch

try:  # torch.compile takes torch.onnx.is_in_onnx_export() for False always; it reads this flag as it is
    from torch.onnx._internal.exporter import _flags as _onnx
except ImportError:
    _onnx = types.SimpleNamespace(_is_onnx_exporting=False)

_GUARD = "__prepare_scriptable__"

_EXPORT_MESSAGE = (
    "{what} cannot take a model swapped by fastasr.accelerate: a {name} module runs fastasr's kernels. "
    "Export upstream's own code instead:\n"
    "    with fastasr.eager_mode(model):\n"
    "        ...  # {what}"
)


class ExportError(RuntimeError):
    """A swapped model was handed to TorchScript or to the ONNX exporter."""


def _refuse(module, what):
    raise ExportError(_EXPORT_MESSAGE.format(what=what, name=type(module).__name__))


@functools.cache
def guarded(function, name="forward"):
    """``function`` with a check that it is not being traced. One per function: it is the mark of a swap."""

    @functools.wraps(function)
    def guard(self, *args, **kwargs):
        if torch.jit.is_tracing():
            _refuse(self, "torch.jit.trace and the tracing ONNX exporter")
        if torch.compiler.is_exporting() and _onnx._is_onnx_exporting:
            _refuse(self, "torch.onnx.export")
        return function(self, *args, **kwargs)

    guard.__name__ = name  # a bound method pickles by name: upstream's own is found on loading
    guard.fastasr_forward = function
    return guard


class _ScriptGuard:
    """Raises when called by torch.jit.script; copies with its module and disappears in a pickle."""

    def __init__(self, module):
        self.module = module

    def __call__(self):
        _refuse(self.module, "torch.jit.script")

    def __deepcopy__(self, memo):
        return _ScriptGuard(copy.deepcopy(self.module, memo))

    def __reduce__(self):
        # A loaded module is unswapped and may be scripted, without fastasr: max((module,)) is the module.
        return functools.partial, (max, (self.module,))


def bind(module, forward, methods=()):
    """Make ``module`` run ``forward``, a function with ``self`` first, and ``methods``, pairs (name, function)."""
    for name, function in (("forward", forward), *methods):
        vars(module)[name] = types.MethodType(guarded(function, name), module)
    vars(module)[_GUARD] = _ScriptGuard(module)


def unbind(module):
    """Undo ``bind``; returns the (forward, methods) that were bound, or None when the module was not swapped."""
    bound = {name: bound_function(module, name) for name in vars(module)}
    bound = {name: function for name, function in bound.items() if function is not None}
    for name in bound:
        del vars(module)[name]
    if bound:
        vars(module).pop(_GUARD, None)
    forward = bound.pop("forward", None)
    return None if forward is None else (forward, tuple(bound.items()))


def bound_function(module, name):
    """The function that ``bind`` gave to this module under ``name``, or None."""
    method = vars(module).get(name)
    return getattr(getattr(method, "__func__", None), "fastasr_forward", None)


def bound_forward(module):
    """The forward that ``bind`` gave to this module, or None."""
    return bound_function(module, "forward")


def foreign_method(module, name):
    """A method that somebody else put on this instance, or None.

    Unpickled swapped modules carry their class's own methods, which is no change.
    """
    method = vars(module).get(name)
    if method is None or bound_function(module, name) is not None:
        return None
    own = getattr(method, "__func__", None) is getattr(type(module), name, None)
    return None if own and method.__self__ is module else method


def foreign_forward(module):
    """A forward that somebody else put on this instance, or None."""
    return foreign_method(module, "forward")
