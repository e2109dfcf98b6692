# SPDX-License-Identifier: Apache-2.0
"""Binds a forward and other methods to one instance, and undoes it.

The swap adds only these entries to the ``__dict__`` of a module: ``forward`` and the rule's other methods, which are
our functions as bound methods, ``__prepare_scriptable__``, which torch.jit.script calls on every module before it
compiles anything, and ``_replicate_for_data_parallel``. A deepcopy has the methods bound to the copy, and so have the
replicas of ``nn.DataParallel``. Pickle stores bound methods by name, so a pickled model loads unswapped. A shallow copy
(``copy.copy``) keeps methods bound to the original module: restore the model before making one.
"""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, cast

import torch
from torch import nn

from fastasr import _left
from fastasr.models.common.plain import any_global_hook, is_own_method, own_method

try:  # torch.compile treats torch.onnx.is_in_onnx_export() as constant False, but reads this flag
    from torch.onnx._internal.exporter import _flags

    _onnx: Any = _flags
except ImportError:
    _onnx = types.SimpleNamespace(_is_onnx_exporting=False)

_GUARD = "__prepare_scriptable__"
_REPLICATE = "_replicate_for_data_parallel"

_EXPORT_MESSAGE = (
    "{what} cannot take a model swapped by fastasr.accelerate: a {name} module runs fastasr's kernels. "
    "Export upstream's own code instead:\n"
    "    with fastasr.eager_mode(model):\n"
    "        ...  # {what}"
)


class ExportError(RuntimeError):
    """Raised if a swapped model is given to TorchScript or to the ONNX exporter."""


def _refuse(module: nn.Module, what: str) -> NoReturn:
    raise ExportError(_EXPORT_MESSAGE.format(what=what, name=type(module).__name__))


@functools.cache
def guarded(function: Callable[..., Any], name: str = "forward") -> Callable[..., Any]:
    """Returns ``function`` with a check that it is not being traced. There is one wrapper per function, by which a swap
    is recognised. With hooks of all modules, which must see every call of upstream's code, that code runs."""

    @functools.wraps(function)
    def guard(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any_global_hook():
            _left.note(self, "hooks of all modules are registered", name)
            return own_method(self, name)(*args, **kwargs)
        if torch.jit.is_tracing():
            _refuse(self, "torch.jit.trace and the tracing ONNX exporter")
        if torch.compiler.is_exporting() and _onnx._is_onnx_exporting:
            _refuse(self, "torch.onnx.export")
        if vars(self).get("gradient_checkpointing") and _checkpoints_in(self, name):
            call = functools.partial(function, self, **kwargs)
            return cast(Any, self)._gradient_checkpointing_func(call, *args)
        return function(self, *args, **kwargs)

    # Libraries that wrap forwards, such as accelerate, remove wrappers along __wrapped__ and would remove ours.
    del guard.__wrapped__
    vars(guard).update(__signature__=inspect.signature(function), fastasr_forward=function)
    guard.__name__ = name  # a bound method pickles by name: upstream's own is found on loading
    return guard


def _checkpoints_in(module: nn.Module, name: str) -> bool:
    """Says whether upstream would checkpoint this call in the method: transformers from 5.24 does so in the forward of
    its layers, from which a swap takes the place; earlier releases in ``__call__``."""
    code = getattr(getattr(type(module), name), "__code__", None)
    wrapped = code is not None and code.co_name == "forward_with_checkpointing"
    return wrapped and module.training and torch.is_grad_enabled()


class _ScriptGuard:
    """Raises an error when torch.jit.script calls it. It is copied with its module and left out of a pickle."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> NoReturn:
        _refuse(self.module, "torch.jit.script")

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ScriptGuard":
        return _ScriptGuard(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # A loaded module is unswapped and may be scripted without fastasr; max((module,)) returns the module.
        return functools.partial, (max, (self.module,))


def bind(
    module: nn.Module, forward: Callable[..., Any], methods: Iterable[tuple[str, Callable[..., Any]]] = ()
) -> None:
    """Makes ``module`` run ``forward``, a function with ``self`` first, and ``methods``, pairs (name, function)."""
    for name, function in (("forward", forward), *methods, (_REPLICATE, _replica)):
        vars(module)[name] = types.MethodType(guarded(function, name), module)
    vars(module)[_GUARD] = _ScriptGuard(module)


def _replica(module: nn.Module) -> nn.Module:
    """Returns what nn.DataParallel takes for ``module`` on another device."""
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    for name, method in vars(module).items():
        if bound_function(module, name) is not None:
            vars(replica)[name] = types.MethodType(method.__func__, replica)
    return replica


def unbind(module: nn.Module) -> tuple[Callable[..., Any], tuple[tuple[str, Callable[..., Any]], ...]] | None:
    """Undoes ``bind``. Returns the (forward, methods) that were bound, or None if the module was not swapped."""
    found = {name: bound_function(module, name) for name in vars(module)}
    bound = {name: function for name, function in found.items() if function is not None}
    for name in bound:
        del vars(module)[name]
    if bound:
        vars(module).pop(_GUARD, None)
    forward = bound.pop("forward", None)
    bound.pop(_REPLICATE, None)
    return None if forward is None else (forward, tuple(bound.items()))


def bound_function(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """Returns the function that ``bind`` gave to this module under ``name``, or None."""
    method = vars(module).get(name)
    if not isinstance(method, types.MethodType):  # whoever wraps a method copies its attributes
        return None
    return getattr(method.__func__, "fastasr_forward", None)


def bound_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the forward that ``bind`` gave to this module, or None."""
    return bound_function(module, "forward")


def is_guarded(module: nn.Module) -> bool:
    """Says whether ``bind`` was called for this module and not undone, even if other code has bound a forward since."""
    return isinstance(vars(module).get(_GUARD), _ScriptGuard)


def foreign_method(module: nn.Module, name: str) -> Any:
    """Returns a method that other code than ``bind`` put on this instance, or None.

    Unpickled swapped modules have their class's own methods in their ``__dict__``, which do not count.
    """
    method = vars(module).get(name)
    if method is None or bound_function(module, name) is not None:
        return None
    return None if is_own_method(module, method, name) else method


def foreign_forward(module: nn.Module) -> Any:
    """Returns a forward that other code than ``bind`` put on this instance, or None."""
    return foreign_method(module, "forward")
