# SPDX-License-Identifier: Apache-2.0
"""Finds everything that the code of a model can change, with its contents, and puts the contents back."""

import argparse
import collections
import functools
import random
import sys
import types
from collections.abc import Callable, Collection, Iterable
from operator import is_
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

try:
    import numpy as np
except ImportError:  # torch works without it
    np = None  # type: ignore[assignment]  # a module elsewhere

# Objects other than modules, tensors and containers are entered if a module holds them, and if such an object does.
# Objects further away hold a trainer's data sets and the data of other threads.
_LEVELS = 2
_CONSTANT = {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size}
_CONTAINERS = {dict, list, set, collections.OrderedDict, collections.deque}
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_KEEPERS = (argparse.Namespace, types.SimpleNamespace, collections.UserDict, collections.UserList)


class Reach:
    """The tensors and changeable objects that can be reached from ``roots``, and the contents of the objects.

    It follows the attributes of modules, wherever they are held; the elements of containers; the variables of
    functions, such as a forward or a hook that a user put on an instance; and the attributes of objects of any
    class that is not the standard library's, torch's or fastasr's, at most ``_LEVELS`` of these in a row. ``outside``
    holds the ids of modules that are not entered.
    """

    def __init__(self, roots: Iterable[object], outside: Collection[int] = frozenset()) -> None:
        self.outside = outside
        self.tensors: list[Tensor] = []
        self._namespaces: list[tuple[Any, ...]] = []
        self._dicts: list[tuple[Any, ...]] = []
        self._others: list[tuple[Any, ...]] = []
        self._seen: dict[int, Any] = {}
        self._empty: list[dict] = []  # a module has a dozen of them
        found = list(roots)
        for _ in range(_LEVELS + 1):
            found = self._follow(found)

    def _follow(self, stack: list[Any]) -> list[Any]:
        """Follows everything in ``stack``, but returns the contents of objects other than modules and containers."""
        held: list[Any] = []
        others, seen, outside = [], self._seen, self.outside
        while stack:
            value = stack.pop()
            cls: Any = type(value)
            follow = _how_to_follow(cls)
            if follow is None or id(value) in seen or id(value) in outside:
                continue
            if follow is Reach.attributes:
                others.append(value)
                continue
            seen[id(value)] = value  # This keeps it alive, so that no other object gets its id.
            follow(self, value, stack)
        for value in others:
            if id(value) not in seen:
                seen[id(value)] = value
                self.attributes(value, held)
        return held

    def attributes(self, owner: Any, stack: list[Any]) -> None:
        namespace = getattr(owner, "__dict__", None)
        if namespace is not None:
            values = tuple(namespace.values())
            self._namespaces.append((owner, type(owner), tuple(namespace), values))
            stack.extend(value for value in values if type(value) not in _CONSTANT)
        cls: Any = type(owner)
        if slots := _slots(cls):
            in_slots = {name: getattr(owner, name) for name in slots if hasattr(owner, name)}
            self.other(owner, in_slots, _put_slots)
            stack.extend(in_slots.values())

    def members(self, held: Iterable[Any], stack: list[Any]) -> None:
        stack.extend(value for value in held if type(value) not in _CONSTANT)

    def other(self, owner: Any, saved: Any, put: Callable[[Any, Any], None]) -> None:
        """Notes contents that ``put(owner, saved)`` puts back."""
        self._others.append((owner, saved, put))

    def exchange(self, other_for: Callable[[Any], Any]) -> None:
        """Puts ``other_for(value)`` in the place of each value that is held by name, by key or in a list."""
        for owner, _, names, values in self._namespaces:
            _exchange(vars(owner), zip(names, values, strict=True), other_for)
        for held, keys, values in self._dicts:
            _exchange(held, zip(keys, values, strict=True), other_for)
        for owner, saved, put in self._others:
            if put is _put_variable:
                put(owner, other_for(saved))
            elif put is _put_defaults and saved[0]:
                owner.__defaults__ = tuple(map(other_for, saved[0]))
            elif isinstance(owner, list):
                _exchange(owner, enumerate(saved), other_for)

    def restore(self) -> None:
        """Puts all contents back; writes only what has changed."""
        for owner, cls, names, values in self._namespaces:
            if type(owner) is not cls:  # A lazy layer became an ordinary one.
                object.__setattr__(owner, "__class__", cls)
            namespace = vars(owner)
            if tuple(namespace) != names or not all(map(is_, namespace.values(), values)):
                namespace.clear()
                namespace.update(zip(names, values, strict=True))
        for held in filter(None, self._empty):
            held.clear()
        for held, keys, values in self._dicts:
            if tuple(held) != keys or not all(map(is_, held.values(), values)):
                # A subclass's own methods may do more or raise an error.
                base = collections.OrderedDict if isinstance(held, collections.OrderedDict) else dict
                base.clear(held)
                for key, value in zip(keys, values, strict=True):
                    base.__setitem__(held, key, value)
        for owner, saved, put in self._others:
            put(owner, saved)


def _exchange(held: Any, items: Iterable[tuple[Any, Any]], other_for: Callable[[Any], Any]) -> None:
    for key, value in items:
        other = other_for(value)
        if other is not value:
            held[key] = other


def _module(reach: Reach, module: nn.Module, stack: list[Any]) -> None:
    reach.attributes(module, stack)
    if isinstance(module, torch.jit.ScriptModule):  # Its namespace holds neither tensors nor flags.
        stack += [*module.children(), *module.parameters(recurse=False), *module.buffers(recurse=False)]
        reach.other(module, module.training, _put_mode)


def _put_mode(module: nn.Module, training: bool) -> None:
    if module.training is not training:
        module.training = training


def _tensor(reach: Reach, tensor: Tensor, stack: list[Any]) -> None:
    reach.tensors.append(tensor)
    reach.attributes(tensor, stack)
    stack += [hooks for name in TENSOR_HOOKS if (hooks := getattr(tensor, name)) is not None]
    if tensor.is_leaf and tensor.grad is not None:
        stack.append(tensor.grad)
    if is_traceable_wrapper_subclass(tensor):
        stack += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _dict(reach: Reach, held: dict, stack: list[Any]) -> None:
    if held:
        values = tuple(held.values())
        reach._dicts.append((held, tuple(held), values))
        reach.members(values, stack)
    else:
        reach._empty.append(held)
    if type(held) not in _CONTAINERS:
        reach.attributes(held, stack)


def _elements(reach: Reach, held: Any, stack: list[Any]) -> None:
    reach.other(held, tuple(held), _put_elements)
    reach.members(held, stack)
    if type(held) not in _CONTAINERS:
        reach.attributes(held, stack)


def _put_elements(held: Any, saved: tuple[Any, ...]) -> None:
    if isinstance(held, set):
        if len(held) != len(saved) or not held.issuperset(saved):
            held.clear()
            held.update(saved)
    elif len(held) != len(saved) or not all(map(is_, held, saved)):
        held.clear()
        held.extend(saved)


def _put_slots(owner: object, saved: dict[str, Any]) -> None:
    cls: Any = type(owner)
    for name in _slots(cls):
        if name in saved:
            object.__setattr__(owner, name, saved[name])
        elif hasattr(owner, name):
            object.__delattr__(owner, name)


def _function(reach: Reach, function: FunctionType, stack: list[Any]) -> None:
    if not (function.__module__ or "").startswith(("torch.", "fastasr.")):
        reach.attributes(function, stack)
        reach.other(function, (function.__defaults__, function.__kwdefaults__), _put_defaults)
        stack += [function.__defaults__, function.__kwdefaults__, *(function.__closure__ or ())]


def _put_defaults(function: FunctionType, saved: tuple[Any, Any]) -> None:
    for name, value in zip(("__defaults__", "__kwdefaults__"), saved, strict=True):
        if getattr(function, name) is not value:
            setattr(function, name, value)


def _cell(reach: Reach, cell: CellType, stack: list[Any]) -> None:
    try:
        value = cell.cell_contents
    except ValueError:  # the variable has no value yet
        return
    reach.other(cell, value, _put_variable)
    stack.append(value)


def _put_variable(cell: CellType, value: Any) -> None:
    cell.cell_contents = value


def _method(reach: Reach, method: MethodType, stack: list[Any]) -> None:
    stack += [method.__self__, method.__func__]


def _partial(reach: Reach, partial: functools.partial, stack: list[Any]) -> None:
    stack += [partial.func, partial.args, partial.keywords]


def _array(reach: Reach, array: Any, stack: list[Any]) -> None:
    reach.other(array, array.copy(), _put_array)


def _put_array(array: Any, saved: Any) -> None:
    if array.tobytes() != saved.tobytes():
        array[...] = saved


def _generator_of(get: Callable, put: Callable) -> Callable[[Reach, Any, list[Any]], None]:
    return lambda reach, generator, stack: reach.other(generator, get(generator), put)


# How each class and its subclasses are followed: functions of a Reach, the object, and the list to follow next.
_FOLLOWED = {
    torch.nn.Module: _module,
    torch.Tensor: _tensor,
    dict: _dict,
    list: _elements,
    set: _elements,
    collections.deque: _elements,
    tuple: Reach.members,
    frozenset: Reach.members,
    types.FunctionType: _function,
    types.MethodType: _method,
    types.CellType: _cell,
    functools.partial: _partial,
    random.Random: _generator_of(random.Random.getstate, random.Random.setstate),
    torch.Generator: _generator_of(torch.Generator.get_state, torch.Generator.set_state),
    **dict.fromkeys(_KEEPERS, Reach.attributes),
}
if np is not None:
    _FOLLOWED[np.ndarray] = _array
    _FOLLOWED[np.random.RandomState] = _generator_of(
        np.random.RandomState.get_state, np.random.RandomState.set_state
    )
    _FOLLOWED[np.random.Generator] = _generator_of(
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    )


@functools.lru_cache(maxsize=4096)
def _how_to_follow(cls: type) -> Any:
    """Returns the function that follows the objects of a class, or None if they hold nothing that a run changes."""
    if cls in _CONSTANT:
        return None
    for base in cls.__mro__:
        if base in _FOLLOWED:
            return _FOLLOWED[base]
    package = cls.__module__.partition(".")[0]
    if package in sys.stdlib_module_names or package in ("torch", "fastasr") or issubclass(cls, type):
        return None
    return None if hasattr(cls, "__get__") else Reach.attributes


@functools.lru_cache(maxsize=4096)
def _slots(cls: type) -> tuple[str, ...]:
    declared = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(
        name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__")
    )
