# SPDX-License-Identifier: Apache-2.0
"""Says whether a child module is what its class says, so that a forward may read its parameters in place of calling it.

Users change children of a model, before a swap and after it: adapters (peft, loralib), hooks, weight and spectral
norm, quantised layers, other forwards and classes. Whoever reads a child's parameters asks :func:`is_plain` at every
call, and calls the child where the answer is no. Classes are compared, not their names: peft's ``Linear`` is another.
"""

import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard, TypeVar

import torch
from torch.nn.modules import module as _nn

M = TypeVar("M", bound=torch.nn.Module)
Hooks = tuple[dict[int, Any], dict[int, Any], dict[int, Any], dict[int, Any]]

# hooks of all modules, which users register for the whole process
_GLOBAL_HOOKS = (
    _nn._global_forward_hooks,
    _nn._global_forward_pre_hooks,
    _nn._global_backward_hooks,
    _nn._global_backward_pre_hooks,
)
# The hook with which transformers collects a module's outputs. It stays once a call has asked for outputs.
_OUTPUTS = "transformers.utils.output_capturing"
COLLECTING = f"{_OUTPUTS}.install_output_capuring_hook.<locals>.output_capturing_hook"
# torch's forwards as they were on import: somebody may replace a class's forward
_OF_TORCH = {
    cls: cls.forward
    for cls in vars(torch.nn).values()
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module)
}


def hooks_of(module: torch.nn.Module) -> Hooks:
    """Returns the four dicts of a module's hooks: before and after the forward pass, before and after the backward."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def global_hooks() -> Hooks:
    """Returns the four dicts of the hooks that run at every module's call."""
    return _GLOBAL_HOOKS


def any_global_hook() -> bool:
    forward, before, backward, before_backward = _GLOBAL_HOOKS
    return bool(forward or before or backward or before_backward)


def is_watched(module: torch.nn.Module) -> bool:
    """Says whether a call of this module runs hooks of any kind: then it must be called as upstream calls it."""
    return bool(
        (module._forward_hooks and are_active(module._forward_hooks))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any_global_hook()
    )


def are_active(hooks: dict[int, Any]) -> bool:
    """Says whether one of these hooks may do something now. Those of transformers do nothing while no call in this
    thread collects outputs."""
    return bool(hooks) and not (
        _collects_nothing() and all(full_name(h) == COLLECTING for h in hooks.values())
    )


def _collects_nothing() -> bool:
    # torch.compile cannot trace this variable, which each thread has for itself.
    known = not torch.compiler.is_compiling()
    collector = getattr(sys.modules.get(_OUTPUTS), "_active_collector", None) if known else None
    return collector is not None and not collector.get()


def full_name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


def any_watched(modules: Iterable[torch.nn.Module]) -> bool:
    return any(map(is_watched, modules))


def original(module: M) -> M:
    """Returns the module itself. ``torch.export``, unless strict, hands out a stand-in of another class for each module
    inside a model in which two places share a module."""
    stand_in: Any = module
    return stand_in.get_base() if torch.compiler.is_exporting() and hasattr(module, "get_base") else module


def has_known_forward(module: torch.nn.Module) -> bool:
    """Says whether the module's forward is its class's or the one that fastasr's swap bound to it."""
    bound = vars(module).get("forward")
    # Wrappers of a forward copy its attributes, so the method itself must be ours.
    if type(bound) is types.MethodType and hasattr(bound.__func__, "fastasr_forward"):
        return bound.__self__ is module
    own = _OF_TORCH.get(type(module))
    return (bound is None or is_own_method(module, bound)) and (own is None or own is type(module).forward)


def runs_torchs(cls: type[torch.nn.Module], known: type[torch.nn.Module]) -> bool:
    """Says whether the class has the forward that ``known``, a class of torch's, had on import."""
    return cls.forward is _OF_TORCH[known]


def own_method(module: torch.nn.Module, name: str = "forward") -> Any:
    """Returns the method of the module's class, bound to the module, whatever the instance has.

    If NeMo's type check wraps a forward, ``type(module).forward`` is a new object each time, and torch.compile asks for
    the same one. After a graph break it takes ``function.__get__(module)`` for ``module.forward``, which is ours.
    """
    function = inspect.getattr_static(type(module), name)
    return type(function).__get__(function, module)


def is_own_method(module: torch.nn.Module, method: Any, name: str = "forward") -> bool:
    """Says whether ``method`` is what ``own_method`` returns, which an unpickled module has in its ``__dict__``."""
    own: Any = own_method(module, name) if hasattr(type(module), name) else None
    return type(method) is type(own) and method.__self__ is module and method.__func__ is own.__func__


def weight_and_bias(module: torch.nn.Module) -> tuple[Any, Any]:
    """Returns ``module.weight`` and ``module.bias``, which a module's own lookup takes 0.4 us each to find."""
    state = vars(module)
    own = state["_parameters"]
    if "weight" in own and "bias" in own and "weight" not in state and "bias" not in state:
        return own["weight"], own["bias"]
    return module.weight, module.bias


def is_plain(module: torch.nn.Module, *classes: type[M]) -> TypeGuard[M]:
    """Says whether the module's class is one of ``classes`` itself, no hooks watch it, and it runs its class's forward,
    or the one that fastasr's swap bound to it."""
    if type(module) not in classes:
        made = original(module)
        return made is not module and is_plain(made, *classes)
    return not is_watched(module) and has_known_forward(module)


def is_plain_named(module: torch.nn.Module, names: tuple[str, ...], owner: object) -> bool:
    """Says the same of a class that is known by its name: fastasr's, or one of the framework of ``owner``, the module
    around it, whose source a rule has read. A class of different origin may have the name too."""
    return type(module).__name__ in names and is_upstreams(module, owner)


def is_upstreams(module: torch.nn.Module, owner: object) -> bool:
    """Says the same of a module whose class a rule has not named."""
    module = original(module)
    known = is_of_framework(type(module), type(owner))
    return known and not is_watched(module) and has_known_forward(module)


def _is_of_framework(cls: type, owner: type) -> bool:
    """Says whether a class is torch's, fastasr's, or from the package or the folder of the class ``owner``: icefall's
    files are no package."""
    here, there = (c.__module__.partition(".")[0].rstrip("0123456789") for c in (cls, owner))
    return here in ("torch", "fastasr", there) or _folder(cls) == _folder(owner)


is_of_framework: Callable[[type, type], bool] = functools.cache(_is_of_framework)


def _folder(cls: type) -> str:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return cls.__module__ if file is None else os.path.dirname(file)


def runs(module: torch.nn.Module, method: Callable[..., Any], name: str = "forward") -> bool:
    """Says whether ``module.name`` is the function ``method``: from the class or bound to the instance by a swap."""
    bound = getattr(module, name)
    function = getattr(bound, "__func__", None)
    if getattr(function, "fastasr_forward", function) is not method:
        return False
    return type(bound) is types.MethodType and bound.__self__ is original(module)


def first_watched(
    module: torch.nn.Module, drops: Callable[[torch.nn.Module], bool] = lambda part: True
) -> str:
    """Returns which part of the module has hooks, or is in training mode if ``drops`` selects it, in words; "" if none.

    It walks all parts, so only a call that leaves the fast path asks.
    """
    if any_global_hook():
        return "hooks of all modules are registered"
    for name, part in module.named_modules():
        if is_watched(part):
            return f"{name or type(part).__name__} has hooks"
        if part.training and drops(part):
            return f"{name or type(part).__name__} is in training mode"
    return ""
