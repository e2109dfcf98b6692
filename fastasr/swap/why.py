# SPDX-License-Identifier: Apache-2.0
"""Says which calls of a model, a search or an engine leave fastasr's fast path, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

from fastasr import _left
from fastasr.models.common.ragged import why_not_hooked
from fastasr.ops._dispatch import why_eager
from fastasr.swap import binding, weights
from fastasr.swap.rule import Rule
from fastasr.swap.rules import rules_by_forward

UNKNOWN = "not called yet"


@dataclass
class Method:
    """A method whose calls may leave: ``now``, why any call would leave now ("": nothing is known, None: its first call
    will tell), ``left``, why the last call that left did ("": none has), and ``calls``, how many have left."""

    path: str
    class_name: str
    method: str
    now: str | None = ""
    left: str = ""
    calls: int = 0

    @property
    def key(self) -> str:
        return f"{self.path}.{self.method}".lstrip(".")

    @property
    def reason(self) -> str:
        return self.now or self.left or (UNKNOWN if self.now is None else "")


@dataclass
class Why:
    """One row per method of ``why(obj)``. ``why(obj)["encoder.generate"]`` is its reason, "" if its calls run fastasr's
    fast path. ``print`` shows rows with a reason, equal ones as one line."""

    name: str
    rows: list[Method]

    def __getitem__(self, key: str) -> str:
        """Returns the reason of a method. Raises KeyError if calls of it cannot leave, or none has."""
        return self.to_dict()[key]

    def to_dict(self) -> dict[str, str]:
        """Returns path and method -> reason, of the methods whose calls may leave or have left."""
        return {row.key: row.reason for row in self.rows}

    def __str__(self) -> str:
        groups: dict[tuple, list[Method]] = {}
        for row in self.rows:
            if row.now or row.left:
                groups.setdefault((row.class_name, row.method, row.now, row.left), []).append(row)
        lines = [line for rows in groups.values() for line in _lines(rows)]
        state = "these leave" if lines else "nothing is known to leave"
        return "\n".join([f"{self.name}: {state} fastasr's fast path", *lines])


def _lines(rows: list[Method]) -> Iterator[str]:
    first, calls = rows[0], sum(row.calls for row in rows)
    where = (
        first.key if len(rows) == 1 else f"{len(rows)} x {first.class_name}.{first.method}, first {first.key}"
    )
    if first.now:
        yield f"  {where}: {first.now}"
    if first.left and first.left != first.now:
        yield f"  {where}: {calls} calls have left, the last one: {first.left}"


def why(obj: object) -> Why:
    """Returns why calls of ``obj`` and of the objects that it holds leave fastasr's fast path.

    obj: a swapped model or one of fastasr's, a module of one, or a search, an engine or a recogniser of fastasr's.

    For each method it has the reason that holds now, found without running the model, and the reason of the last call
    that left, which was also logged (logger "fastasr"). Training, compiled and traced calls run other fast paths and do
    not count. ``explain`` says which modules are swapped at all.

    Raises TypeError if ``obj`` is neither a module nor an object of fastasr's.
    """
    if not isinstance(obj, torch.nn.Module) and not _is_ours(obj):
        raise TypeError(
            f"why: expected a torch.nn.Module or an object of fastasr's, got {type(obj).__name__}"
        )
    rules = rules_by_forward()
    rows = [row for path, part in _parts(obj) for row in _rows(path, part, rules)]
    return Why(type(obj).__name__, rows)


def _known(module: nn.Module, rule: Rule | None) -> dict[str, str | None]:
    """Returns the reasons known now for a module that runs ``rule``'s functions, swapped or as one of our classes."""
    if rule is None:
        return {}
    found = rule.leaving(module)
    if rule.ragged is not None and binding.bound_forward(module) is rule.ragged.forward:
        found |= {"forward": why_not_hooked(module) or rule.asked(rule.ragged.why_not, module) or ""}
    parameter = next(module.parameters(), None)
    if parameter is not None and (eager := why_eager(rule.kernels, parameter.device, parameter.dtype)):
        found |= {"ops": eager}
    return found


def _is_ours(obj: object) -> bool:
    return type(obj).__module__.startswith("fastasr.")


def _parts(obj: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (path, object) for the object and all that it holds: submodules, parameters, and objects of fastasr's."""
    seen = set() if seen is None else seen
    if id(obj) in seen:
        return
    seen.add(id(obj))
    yield path, obj
    if isinstance(obj, torch.nn.Module):
        held = {**obj._modules, **obj._parameters}
    elif isinstance(obj, torch.Tensor):
        return
    else:
        held = {
            name: value
            for name, value in getattr(obj, "__dict__", {}).items()
            if isinstance(value, torch.nn.Module) or _is_ours(value)
        }
    for name, value in held.items():
        if value is not None:
            yield from _parts(value, f"{path}.{name}".lstrip("."), seen)


def _rows(path: str, obj: Any, rules: dict[Any, Rule]) -> Iterator[Method]:
    if isinstance(obj, torch.nn.Module):
        # A scripted module's class has no function there.
        known = _known(obj, rules.get(binding.bound_forward(obj) or getattr_static(type(obj), "forward")))
        if exact := weights.why_exact(obj):
            known |= {"weights": exact}
    else:
        known = obj.leaves() if hasattr(obj, "leaves") else {}
    noted = _left.of(obj)
    for method in known | noted:
        left = noted.get(method, _left.Left())
        yield Method(path, type(obj).__name__, method, known.get(method, ""), left.reason, left.calls)
