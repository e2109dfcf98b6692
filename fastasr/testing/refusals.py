# SPDX-License-Identifier: Apache-2.0
"""Makes calls that an op must refuse from its declaration and a valid call.

This module matches the declared shapes itself, instead of using the op's checks, to find the argument that an error
must name.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastasr.ops import OPS
from fastasr.testing.declared import Declared, declared
from fastasr.testing.declared.shapes import Dim, Pattern, Shape, condition
from fastasr.testing.declared.signature import Argument

NUMBERS = (-2, -1, 0, 1, 99, 1.5, -0.5, float("nan"))


@dataclass(frozen=True)
class Refusal:
    """A call that must be refused. ``arguments()`` makes its arguments; it must raise ``error`` with a message that
    begins with the op and ``blamed``."""

    name: str
    arguments: Callable[[], dict]
    error: type[Exception]
    blamed: str


def given_sizes(op: Declared, a: Any) -> dict[str, int]:
    given = ((names.split(), size(a)) for names, size in op.sizes.items())
    return {name: value for names, values in given for name, value in zip(names, values, strict=True)}


def match(pattern: Pattern, shape: tuple[int, ...], names: dict) -> dict | None:
    """Returns the sizes in ``names`` with those that the shape binds, or None where it does not fit."""
    for alternative in pattern.alternatives:
        found = _match(alternative, shape, names)
        if found is not None and all(eval(condition(c), {}, found) for c in pattern.conditions):
            return found
    return None


def _match(alternative: Shape, shape: tuple[int, ...], names: dict) -> dict | None:
    names, cut = dict(names), len(shape) - len(alternative.dims)
    if cut < 0 or (cut and not alternative.rest):
        return None
    if alternative.rest not in ("", "...") and names.setdefault(alternative.rest, shape[:cut]) != shape[:cut]:
        return None
    for dim, size in zip(alternative.dims, shape[cut:], strict=True):
        solved = dim.unknown(set(names))
        if solved is not None:
            name, factor, rest = solved
            value, times = size - Dim(rest).value(names), Dim(factor).value(names)
            if value < 0 or value % times:
                return None
            names[name] = value // times
        elif dim.value(names) != size:
            return None
    return names


@cache
def _tensors(op: Declared) -> tuple:
    return tuple(op.in_binding_order())


def mismatch(op: Declared, arguments: dict) -> str | None:
    """Returns the name of the first tensor whose shape does not fit the tensors before it."""
    names = {a.name: arguments.get(a.name, a.default) for a in op.options if a.kind == "int"}
    for a in _tensors(op):
        value = arguments.get(a.name)
        if value is None:
            names |= {name: 0 for name in a.pattern.names if name not in names}
            continue
        found = match(a.pattern, tuple(value.shape), names)
        if found is None:
            return a.name
        names = found | (
            given_sizes(op, op.op.written.Arguments(**arguments)) if a is op.leader and op.sizes else {}
        )
    return None


def refusals(name: str, arguments: dict) -> Iterator[Refusal]:
    op = declared(OPS[name])

    def refusal(label: str, name: str, value: object, error: type[Exception], blamed: str = "") -> Refusal:
        make = value if callable(value) else lambda: value
        return Refusal(f"{name} {label}", lambda: arguments | {name: make()}, error, blamed or name)

    for a in op.tensors:
        value = arguments.get(a.name)
        if value is None:
            continue
        for label, wrong in _wrong_tensors(a, value):
            yield refusal(label, a.name, wrong, TypeError)
        if a.kind == "constant":
            yield refusal("wants a gradient", a.name, lambda t=value: t.float().requires_grad_(), ValueError)
        if a is not op.leader:
            yield refusal("on meta", a.name, partial(value.to, "meta"), ValueError)
        for label, other in _other_shapes(value):
            blamed = mismatch(op, arguments | {a.name: other})
            if blamed is not None:
                yield refusal(label, a.name, other, ValueError, blamed)
        if a.name in op.one_dtype[1:]:
            yield refusal("of another dtype", a.name, partial(value.to, _other(value.dtype)), TypeError)
    public = inspect.signature(op.op.function).parameters
    for a in op.options:
        for value in _wrong_options(a, arguments) if a.name in public else ():
            error = ValueError if isinstance(value, _types(a)) and not isinstance(value, bool) else TypeError
            yield refusal(f"is {value!r}", a.name, value, error)


def _wrong_tensors(a: Argument, value: Tensor) -> Iterator[tuple[str, object]]:
    yield "is a list", [1.0]
    yield "is a string", "x"
    yield "is complex", partial(value.to, torch.complex64)
    if a.kind in (bool, int, torch.int64):
        yield "is floating", value.float
    if a.kind is not int:
        yield "is an int tensor", value.int
    if value.dim():
        yield "is sparse", value.to_sparse
    if not a.optional:
        yield "is None", None


def _other_shapes(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "has a dimension more", value.unsqueeze(0)
    if value.dim():
        yield "has no dimensions", value.new_zeros(())
    for d in range(value.dim()):
        more = list(value.shape)
        more[d] += 1
        yield f"has dimension {d} longer", value.new_zeros(more)
        if value.shape[d]:
            yield f"has no dimension {d}", value.select(d, 0)
            yield f"is empty in dimension {d}", value.narrow(d, 0, 0)


def _other(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype is not torch.float16 else torch.float32


def _types(a: Argument) -> tuple[type, ...]:
    return {"int": (int,), "pair": (tuple,), "float": (int, float), "flag": (bool,), "choice": (str,)}[a.kind]


def _wrong_options(a: Argument, arguments: dict) -> Iterator[object]:
    if not a.optional:
        yield None
    yield []
    if a.kind == "choice":
        yield from ("nonsense", 1)
    elif a.kind == "flag":
        yield from (1, "x")
    elif a.kind == "pair":
        yield from (1, [1], [1.0, 1], "x")
    else:
        yield from ("x", True)
        for number in NUMBERS:
            right = not a.constraint or eval(a.condition, {}, arguments | {a.name: number})
            if isinstance(number, _types(a)) and not right:
                yield number
        if a.kind == "int":
            yield 1.5
