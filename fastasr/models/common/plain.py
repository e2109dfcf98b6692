# SPDX-License-Identifier: Apache-2.0
"""Says whether a child module is what its class says, so that a forward may read its parameters in place of calling it.

Users change children of a model, before a swap and after it: adapters (peft, loralib), hooks, weight and spectral
norm, quantised layers, other forwards and classes. Whoever reads a child's parameters asks :func:`is_plain` at every
call, and calls the child where the answer is no. Classes are compared, not their names: peft's ``Linear`` is another.
"""

import types

import torch
from torch.nn.modules import module as _nn

# hooks of all modules, which users register for the whole process
_GLOBAL_HOOKS = (
    _nn._global_forward_hooks,
    _nn._global_forward_pre_hooks,
    _nn._global_backward_hooks,
    _nn._global_backward_pre_hooks,
)
# torch's forwards as they were on import: somebody may replace that of a class
_OF_TORCH = {
    cls: cls.forward
    for cls in vars(torch.nn).values()
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module)
}


def hooks_of(module):
    """Returns the four dicts of a module's hooks."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def global_hooks():
    """Returns the four dicts of the hooks that run at every module's call."""
    return _GLOBAL_HOOKS


def any_global_hook():
    forward, before, backward, before_backward = _GLOBAL_HOOKS
    return bool(forward or before or backward or before_backward)


def is_watched(module):
    """Says whether a call of this module runs hooks of any kind: then it must be called as upstream calls it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any_global_hook()
    )


def any_watched(modules):
    return any(map(is_watched, modules))


def has_known_forward(module):
    """Says whether the module's forward is its class's or the one that fastasr's swap bound to it."""
    bound = vars(module).get("forward")
    if bound is None:
        cls = type(module)
        return _OF_TORCH.get(cls, cls.forward) is cls.forward
    # whoever wraps a forward copies its attributes, so the method itself must be ours
    return (
        type(bound) is types.MethodType
        and bound.__self__ is module
        and hasattr(bound.__func__, "fastasr_forward")
    )


def is_plain(module, *classes):
    """Says whether the module's class is one of ``classes`` itself, no hooks watch it, and it runs its class's forward,
    or the one that fastasr's swap bound to it."""
    return type(module) in classes and not is_watched(module) and has_known_forward(module)


def is_plain_named(module, names, packages=None):
    """Says the same of a class that is known by its name and its top package: fastasr's, or a framework's whose source
    a rule has read. Without ``packages`` any will do, as icefall is no package."""
    cls = type(module)
    named = cls.__name__ in names and (packages is None or cls.__module__.partition(".")[0] in packages)
    return named and not is_watched(module) and has_known_forward(module)


def runs(module, method, name="forward"):
    """Says whether ``module.name`` is the function ``method``: from the class or bound to the instance by a swap."""
    bound = getattr(module, name)
    function = getattr(bound, "__func__", None)
    if getattr(function, "fastasr_forward", function) is not method:
        return False
    return type(bound) is types.MethodType and bound.__self__ is module
