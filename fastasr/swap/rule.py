# SPDX-License-Identifier: Apache-2.0
"""The class of rules, and checks of an instance that several rules share."""

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastasr.graphs.module import OnRow, replaying
from fastasr.swap import binding
from fastasr.swap.source_hash import SourceUnavailable, fingerprint

# A module, or another object, of a package that fastasr does not import: only its class knows its attributes.
Upstream = Any


def upstream_class(module: nn.Module) -> type[Any]:
    """Returns the class of ``module``, without the subclass that FSDP2 makes of it."""
    cls = type(module)
    if cls.__name__.startswith("FSDP") and len(cls.__bases__) == 2:
        wrapper, inner = cls.__bases__
        if wrapper.__module__.startswith("torch.distributed."):
            return inner
    return cls


def own_forward(module: nn.Module) -> list[Callable]:
    return [upstream_class(module).forward]


@dataclass(frozen=True)
class Known:
    """One accepted version of upstream's code: its origin, and an optional condition on the instance.

    ``condition(module)`` returns a reason against the instance, or None. ``forward`` replaces the rule's forward if
    this version computes something else.
    """

    origin: str
    condition: Callable | None = None
    forward: Callable | None = None


@dataclass(frozen=True)
class Ragged:
    """The way in which an encoder leaves padding out: ``forward`` is bound in place of the rule's, ``why_not(module)``
    returns the reason why an instance, whose modules are swapped already, cannot do so, or None."""

    forward: Callable
    why_not: Callable


def upstream_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the forward of the module's own class."""
    return upstream_class(module).forward(module, *args, **kwargs)


@dataclass(frozen=True)
class Graphed:
    """The way in which calls of a module are recorded: ``forward`` is recorded, or the rule's forward if it is None;
    ``why_not(module)`` returns the reason why calls of an instance never are, or None. ``choice`` names the method
    that draws how a call runs, if there is one. ``parts(module)`` returns its submodules that are recorded one by one
    if the whole is not: because layers are dropped at random, or gradients must be ready part by part.
    ``caller`` is the rule's forward if it calls the module's graphs itself, with other arguments than its own.
    ``on_row`` says how calls become calls on a row of frames, with ``Graphs(frames=...)``."""

    forward: Callable | None = None
    why_not: Callable = field(default=lambda module: None)
    choice: str | None = None
    parts: Callable = field(default=lambda module: ())
    caller: Callable | None = None
    on_row: OnRow | None = None

    def on_row_of(self, module: nn.Module) -> OnRow | None:
        """Returns ``on_row`` if it knows the module."""
        return self.on_row if self.on_row is not None and self.on_row.of(module) else None


@dataclass(frozen=True, eq=False)
class Rule:
    """Says how to recognise one upstream class and which ``forward`` to bind to its instances.

    ``functions(module)`` returns the functions to fingerprint, beginning with the class's forward.
    ``structure(module)`` returns why the instance does not fit our forward, or None.
    ``kernels`` are the ops (``fastasr.ops``) that our forward itself calls; () if it calls none.
    ``known`` maps fingerprints to Known; None means that the class is torch's own and ``functions`` is not used.
    ``methods`` are further methods to bind, pairs (name, function). Verification compares those in ``compared``
    separately, so they must depend only on arguments, parameters and buffers. While verification runs, the others are
    upstream's.
    ``caches`` are attributes, name -> empty value, in which upstream keeps results that depend on parameters. Binding
    empties them, and so does verification before it runs upstream's code in another precision.
    ``release(module)`` frees the data that our functions keep for an instance; ``restore`` calls it.
    ``shared(result)`` is the part of upstream's result that our forward returns too; verification compares it.
    ``hooks`` names (module.name) forward hooks of upstream's framework with which our forward works.
    ``note`` is text that the report adds to the origin of an instance's source.
    ``shallow`` marks rules for modules that only call others. Verification then runs upstream's code in the submodules,
    which it verifies separately.
    ``companion`` rules apply only to models in which another rule of the family matched a module.
    ``ragged`` says how encoders of this class leave padding out, or is None if they do not. If its forward is the
    rule's, nothing but ``accelerate(ragged=True)`` binds it.
    ``padded`` is the reason why encoders of this class run on padding even with ``ragged=True``, for the report.
    ``graphs`` says how ``accelerate(graphs=True)`` records calls of this class, or is None if it does not.
    ``leaves(module)`` returns method -> reason for the methods whose calls may leave fastasr's fast path: the reason
    why any call of a swapped module would leave it now, "" if none is known, None if the first call will show it.
    """

    name: str
    class_name: str
    forward: Any  # a function, or None: then only ``graphs`` binds one
    structure: Callable
    kernels: tuple = ()
    functions: Callable = own_forward
    known: dict | None = None
    companion: bool = False
    shallow: bool = False
    methods: tuple = ()
    compared: tuple = ()
    caches: dict = field(default_factory=dict)
    release: Callable = field(default=lambda module: None)
    shared: Callable = field(default=lambda result: result)
    hooks: tuple = ()
    note: str = ""
    ragged: Ragged | None = None
    padded: str = ""
    graphs: Graphed | None = None
    leaves: Callable = field(default=lambda module: {})

    def like(self, name: str, class_name: str, known: dict[str, Known]) -> "Rule":
        """Returns this rule for another class that has the same code."""
        return replace(self, name=name, class_name=class_name, known=known)

    def asked(self, question: Callable[[Any], Any], module: nn.Module) -> Any:
        """Returns ``question(module)``, or the reason if the instance lacks what it reads: a user may have taken a part
        away, before the swap or after it."""
        try:
            return question(module)
        except AttributeError as error:
            return f"lacks an attribute of upstream's {self.class_name}: {error}"
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"does not fit upstream's {self.class_name}: {error}"

    def leaving(self, module: nn.Module) -> dict[str, str | None]:
        """Returns what ``leaves`` does, or the reason if the instance lacks what it reads."""
        found = self.asked(self.leaves, module)
        return {"forward": found} if isinstance(found, str) else found

    @property
    def is_optional(self) -> bool:
        """Says whether nothing but ``accelerate(ragged=True)`` or ``graphs=True`` binds it."""
        return self.forward is None or (self.ragged is not None and self.ragged.forward is self.forward)

    @property
    def recorded(self) -> Callable:
        """Returns the forward that ``accelerate(graphs=True)`` records."""
        return (self.graphs and self.graphs.forward) or self.forward or upstream_forward

    @functools.cached_property
    def replay(self) -> Callable:
        """Returns the forward that replays recorded calls."""
        if self.graphs is not None and self.graphs.caller is not None:
            return self.graphs.caller
        return replaying(self.recorded, f"{self.name} {self.class_name}")

    @functools.cached_property
    def replay_row(self) -> Callable | None:
        """Returns the forward that replays the recorded calls on a row of frames, of an encoder without padding."""
        if self.ragged is None or self.graphs is None or self.graphs.on_row is None:
            return None
        return replaying(self.ragged.forward, f"{self.name} {self.class_name}, row")

    @functools.cached_property
    def replay_part(self) -> Callable:
        """Returns the forward that replays recorded calls of a part, or of an encoder of fastasr's own."""
        return replaying(upstream_forward, f"{self.name} {self.class_name}, part")

    @functools.cached_property
    def forwards(self) -> set[Callable]:
        """Returns every forward that this rule may bind."""
        versions = (self.known or {}).values()
        ragged = () if self.ragged is None else (self.ragged.forward,)
        own = self.forward, self.replay, self.replay_row, self.replay_part
        return {*own, *ragged, *(known.forward for known in versions)} - {None}

    def bind(self, module: nn.Module, known: Known | None = None) -> None:
        """Binds our functions to ``module``. ``known``: the version of upstream's code that it runs, if known."""
        self.empty_caches(module)
        forward = known.forward if known is not None and known.forward is not None else self.forward
        cls = upstream_class(module)
        binding.bind(module, forward, [pair for pair in self.methods if hasattr(cls, pair[0])])

    def empty_caches(self, module: nn.Module) -> None:
        for name, empty in self.caches.items():
            if name in vars(module):
                vars(module)[name] = copy.copy(empty)


def recorded(
    name: str, class_name: str, padded: str = "", ragged: Ragged | None = None, **graphs: Any
) -> Rule:
    """Returns the rule for a class whose code stays upstream's, in any version: its calls are recorded with the
    swapped modules inside."""
    graphed = Graphed(**graphs)
    return Rule(name, class_name, None, _not_of_torch, known={}, padded=padded, ragged=ragged, graphs=graphed)


def _not_of_torch(module: nn.Module) -> str | None:
    return "is torch's own class" if type(module).__module__.startswith("torch.") else None


def check_parameters(
    module: nn.Module,
    shapes: Mapping[str, Iterable[int]],
    optional: Collection[str] = (),
    allowed_buffers: Collection[str] = (),
) -> str | None:
    """Returns a reason unless the module's own parameters are exactly ``shapes`` (name -> shape), else None.

    Parameters in ``optional`` may be None. Only the buffers in ``allowed_buffers`` may exist. All parameters must have
    a floating-point dtype and be on one device.
    """
    own = module._parameters
    extra = sorted(set(own) - set(shapes))
    if extra:
        return f"has parameters this class does not have upstream: {', '.join(extra)}"
    buffers = sorted(
        name for name, b in module._buffers.items() if b is not None and name not in allowed_buffers
    )
    if buffers:
        return f"has buffers this class does not have upstream: {', '.join(buffers)}"
    for name, shape in shapes.items():
        parameter = own.get(name)
        if parameter is None:
            if name in optional and name in own:
                continue
            return f"lacks the parameter {name}"
        if tuple(parameter.shape) != tuple(shape):
            return f"{name} has shape {tuple(parameter.shape)}, expected {tuple(shape)}"
        if not parameter.is_floating_point():
            return f"{name} is {parameter.dtype}, expected a floating-point type"
    return None


def check_children(module: nn.Module, allowed: Mapping[str, Any]) -> str | None:
    """Returns a reason if a submodule is not in ``allowed``, else None. It maps names to torch's classes, or to the
    names of upstream's.
    """
    for name, child in module._modules.items():
        if child is None:
            continue
        if name not in allowed:
            return f"has a submodule this class does not have upstream: {name} ({type(child).__name__})"
        cls, expected = upstream_class(child), allowed[name]
        if cls is not expected and cls.__name__ != expected:
            expected = getattr(expected, "__name__", expected)
            if cls.__name__ == expected:
                return f"submodule {name} is not a plain torch.nn.{expected}, but {cls.__module__}'s"
            return f"submodule {name} is a {cls.__name__}, expected {expected}"
    return None


def check_child_names(
    module: nn.Module, names: Collection[str], optional: Collection[str] = ()
) -> str | None:
    """Returns a reason unless the module's children are exactly ``names`` and any of ``optional``, else None. Children
    may have any class, because our forward calls them as upstream's does.
    """
    children = {name for name, child in module._modules.items() if child is not None}
    extra, missing = sorted(children - {*names, *optional}), sorted(set(names) - children)
    if extra:
        return f"has submodules this class does not have upstream: {', '.join(extra)}"
    return f"lacks the submodules {', '.join(missing)}" if missing else None


def check_parts(
    module: nn.Module,
    children: Collection[str],
    shapes: Mapping[str, Iterable[int]] = MappingProxyType({}),
    optional: Collection[str] = (),
    buffers: Collection[str] = (),
) -> str | None:
    """Returns a reason unless the module has exactly these children, any of ``optional``, parameters of ``shapes``
    and no buffers but ``buffers``, else None."""
    reason = check_parameters(module, shapes, allowed_buffers=buffers)
    return reason or check_child_names(module, children, optional)


def holds(
    *children: str, optional: tuple[str, ...] = (), **code: tuple[str | tuple[str, ...], Collection[str]]
) -> Callable[[Upstream], str | None]:
    """Returns the structure of a module with exactly these children, of which it may lack the optional ones, and no
    parameters. ``code``: child -> the names of its class and the known fingerprints, see ``unread_child``."""

    def structure(module: Upstream) -> str | None:
        reason = check_parts(module, children, optional=optional)
        for name, known in code.items():
            reason = reason or unread_child(module, name, *known)
        return reason

    return structure


def check_rates(module: nn.Module, names: Iterable[str]) -> str | None:
    """Returns a reason unless these attributes are numbers or schedules, else None."""
    for name in names:
        if not is_rate(value := getattr(module, name)):
            return f"{name} is a {type(value).__name__}, expected a number or a schedule"
    return None


def check_ints(module: nn.Module, names: Iterable[str]) -> str | None:
    """Returns a reason unless these attributes are ints, else None."""
    for name in names:
        if not isinstance(value := getattr(module, name), int):
            return f"{name} is {value!r}, expected an int"
    return None


def check_sequence(module: nn.Module, name: str, classes: Sequence[Any]) -> str | None:
    """Returns a reason unless the submodule is a torch.nn.Sequential of modules of these classes, else None. In place
    of a class a tuple allows several, and torch.nn.Module any."""
    sequence = getattr(module, name)
    if type(sequence) is not torch.nn.Sequential or len(sequence) != len(classes):
        count = sum(1 for _ in sequence.children())
        return f"submodule {name} is a {type(sequence).__name__} of {count}, expected a Sequential of {len(classes)}"
    for index, (child, expected) in enumerate(zip(sequence, classes, strict=True)):
        allowed = expected if isinstance(expected, tuple) else (expected,)
        if upstream_class(child) not in allowed and torch.nn.Module not in allowed:
            names = " or ".join(cls.__name__ for cls in allowed)
            return f"submodule {name}.{index} is a {type(child).__name__}, expected {names}"
    return None


def is_rate(value: object) -> bool:
    """Says whether the value is a number or a schedule module that converts to float."""
    return isinstance(value, (int, float)) or (
        isinstance(value, torch.nn.Module) and hasattr(type(value), "__float__")
    )


def unread_child(
    module: nn.Module, name: str, class_name: str | tuple[str, ...], known: Collection[str] | None
) -> str | None:
    """Returns a reason if the submodule is of upstream's class ``class_name``, or one of several, and the fingerprint
    of its code is not in ``known``, else None: torch's own classes, and others that our forward calls, may run any
    code."""
    child = getattr(module, name)
    cls, names = upstream_class(child), (class_name,) if isinstance(class_name, str) else class_name
    if cls.__name__ not in names or cls.__module__.startswith("torch.nn."):
        return None
    return unread_code(name, child, own_forward, known)


def unread_code(
    name: str, module: nn.Module, functions: Callable, known: Collection[str] | None
) -> str | None:
    """Returns a reason if the fingerprint of the submodule's code is not in ``known``, else None."""
    try:
        value = fingerprint(functions(module), upstream_class(module))
    except SourceUnavailable as error:
        return f"submodule {name}: {error}"
    if value not in (known or ()) or binding.foreign_forward(module) is not None:
        return f"submodule {name} runs code that is not upstream's (fingerprint {value})"
    return None
