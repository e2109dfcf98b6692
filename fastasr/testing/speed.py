# SPDX-License-Identifier: Apache-2.0
"""Declares what ``fastasr bench`` measures of an op: calls at model sizes, their least cost, the peers beside them.

A module of ``fastasr.testing.samples`` lists them as ``CASES``, and the calls for a GPU as ``ON_DEVICE``. Nothing is
allocated or imported before a case is measured.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from fastasr import ops
from fastasr._nearest import nearest
from fastasr.testing import peers
from fastasr.testing.table import Make, floating, placed, samples_of

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)
FRAMES, BATCH = 1500, 20  # a training step on a GPU: 30 s of speech, 20 utterances


class Unavailable(Exception):
    """Raised when an implementation cannot be measured here; the message says why."""


def upstream_member(name: str) -> Any:
    """Returns a class or function of an upstream package by its full name, or raises ``Unavailable``."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(peers.module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Unavailable(str(error)) from None


@dataclass(frozen=True)
class Cost:
    """The least cost of a pass: bytes read and written once, multiply and add operations of products."""

    bytes: int
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def costs_of(forward: Cost, backward: Cost) -> dict[str, Cost]:
    """Returns the costs of each pass; both passes together cost the sum."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def costs(forward: tuple[int, int], backward: tuple[int, int]) -> Callable[[int], dict[str, Cost]]:
    """Returns the costs by item size of passes given as (values read and written, operations)."""
    return lambda size: costs_of(*(Cost(values * size, flops) for values, flops in (forward, backward)))


@dataclass
class Implementation:
    """``call`` computes the output; gradients are taken with respect to ``differentiable``.

    ``inference`` is the forward pass without gradients if that is a different call, for example of a module in
    evaluation mode.
    """

    call: Callable[[], torch.Tensor]
    differentiable: Callable[[], tuple[torch.Tensor, ...]]
    inference: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """``make(device, dtype)`` returns, per implementation, a function without arguments that builds it (and may raise
    ``Unavailable``), so that a missing package costs one implementation only.

    ``copy`` adds the implementation "copy", a plain copy of the pass's bytes, as the limit of the machine.
    """

    op: str
    name: str
    shape: str
    make: Callable[[str, torch.dtype], Mapping[str, Callable[[], Implementation]]]
    costs: Callable[[int], Mapping[str, Cost]]  # item size in bytes -> cost by pass
    copy: bool = False
    passes: tuple[str, ...] = PASSES
    arguments: Callable[[Make], dict] | None = None  # the op's keyword arguments


def parameters(*tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Returns the tensors, made to require gradients."""
    for tensor in tensors:
        tensor.requires_grad_(True)
    return lambda: tensors


def simple(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Implementation:
    """Wraps ``function(*tensors)``, with gradients of every tensor."""
    return Implementation(partial(function, *tensors), parameters(*tensors))


def computed(
    function: Callable,
    arguments: dict,
    differentiable: Sequence[str] | None = None,
    result: Callable | None = None,
) -> Implementation:
    """Wraps ``function(**arguments)``; ``result(arguments, returned)`` takes the tensor from what it returns.

    Gradients are those of the arguments ``differentiable``, by default of all floating tensors.
    """
    call = partial(function, **arguments)
    names = floating(arguments) if differentiable is None else differentiable
    return Implementation(
        call if result is None else lambda: result(arguments, call()),
        parameters(*(arguments[name] for name in names)),
    )


def module(
    instance: torch.nn.Module, *inputs: torch.Tensor, result: Callable | None = None, **state: torch.Tensor
) -> Implementation:
    """Wraps ``instance(*inputs)``, with gradients of the inputs and parameters, which take the values in ``state``;
    ``result`` takes the tensor from what the module returns.
    """
    for name, value in state.items():
        parameter = instance.get_parameter(name)
        parameter.data = value.detach().reshape(parameter.shape).clone()
    call = partial(instance, *inputs)
    wanted = parameters(*inputs, *instance.parameters())
    return Implementation(call if result is None else lambda: result(call()), wanted)


def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compiles ``function`` with torch.compile for exactly these shapes, as a whole graph."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _later(build: Callable[..., Implementation], given: Callable[[], dict]) -> Callable[[], Implementation]:
    return lambda: build(**given())


def versions(
    op: str,
    arguments: Callable[[Make], dict],
    others: Mapping[str, Callable[..., Implementation]],
    compiles: bool = True,
    **options: Any,
) -> Callable[[str, torch.dtype], dict[str, Callable[[], Implementation]]]:
    """Returns ``Case.make`` of an op's definition ("eager"), of the compiled definition, of ``others``, and of the op.

    All get the keyword arguments that ``arguments(make)`` returns, once for a case. ``options``: of ``computed``.
    """

    def make(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Implementation]]:
        given = cache(lambda: arguments(Make(dtype, device)))
        function = getattr(ops, op)
        made = {"eager": lambda: computed(function.definition, given(), **options)}
        if compiles:
            made["compile"] = lambda: computed(compiled(function.definition), given(), **options)
        made |= {name: _later(build, given) for name, build in others.items()}
        return made | {"fastasr": lambda: computed(function, given(), **options)}

    return make


def case(
    op: str,
    name: str | Sequence[int],
    arguments: Callable[[Make], dict],
    costs: Callable[[int], Mapping[str, Cost]],
    note: str = "",
    *,
    shape: str | None = None,
    others: Mapping[str, Callable[..., Implementation]] | None = None,
    copy: bool = False,
    passes: tuple[str, ...] = PASSES,
    **options: Any,
) -> Case:
    """Returns the case of a call, with ``others`` beside it. Its name is the given one, or one made from sizes, with
    ``note`` behind it; its shape, by default, is the name. ``options``: of ``versions``.
    """
    name = (name if isinstance(name, str) else "x".join(map(str, name))) + note
    arguments = placed(arguments)
    make = versions(op, arguments, others or {}, **options)
    return Case(op, name, shape or name, make, costs, copy, passes, arguments)


def sizes_of(op: str | Callable) -> dict[str, int]:
    """Returns the sizes of an op's call by name, as ``sized`` takes them, with the default of each. Raises
    ``ValueError`` if no op is called so.
    """
    return {p.name: p.default for p in inspect.signature(samples_of(op).sized).parameters.values()}


def sized(op: str | Callable, **sizes: int) -> Case:
    """Returns a call of an op at the given sizes, ready to be checked and timed.

    Args:
        op: a function of ``fastasr.ops``, or its name.
        sizes: by the names in the op's declaration (T, B and C stand for frames, sequences and channels where it names
            no dimensions); a size that is not given is that of a model.
    Raises:
        ValueError: an unknown op or size, or a size that is not a positive int.
    """
    defaults, module = sizes_of(op), samples_of(op)
    for name, size in sizes.items():
        if name not in defaults:
            expected = f"some of {', '.join(defaults)}, got {name!r}{nearest(name, defaults)}"
            raise ValueError(f"fastasr.testing.sized: sizes: expected {expected}")
        if type(size) is not int or size < 1:
            raise ValueError(f"fastasr.testing.sized: {name}: expected a positive int, got {size!r}")
    sizes = defaults | sizes
    return replace(module.sized(**sizes), name=",".join(f"{name}={size}" for name, size in sizes.items()))
