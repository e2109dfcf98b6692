# SPDX-License-Identifier: Apache-2.0
"""Sample tables. A table has an op's valid calls and the calls that the op must refuse."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr._nearest import nearest
from fastasr.testing.declared import Declared, declared
from fastasr.testing.seeds import seeded

MANY = 2**20  # numbers that a CPU takes long to draw


@dataclass
class Make:
    """Makes the tensors of a sample. Within a run of the tests, the same seed gives the same numbers in every dtype and
    device; but a GPU draws more than ``MANY`` numbers itself.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int | str = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(seeded(self.seed))
        self._large = self._generator
        if torch.device(self.device).type == "cuda":
            self._large = torch.Generator(self.device).manual_seed(seeded(self.seed))

    def _drawn(
        self, draw: Callable[..., Tensor], shape: Sequence[int], scale: float, offset: float
    ) -> Tensor:
        # Numbers are drawn in float64 and rounded to the dtype, so that the float64 oracle sees the kernel's numbers.
        generator = self._large if math.prod(shape) > MANY else self._generator
        values = draw(shape, dtype=torch.float64, generator=generator, device=generator.device)
        return values.mul_(scale).add_(offset).to(self.dtype).to(self.device)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return self._drawn(torch.randn, shape, scale, mean)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self._drawn(torch.rand, shape, high - low, low)

    def values(self, *numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64).to(self.dtype).to(self.device)

    def padding(self, frames: int, lengths: Sequence[int]) -> Tensor:
        """Returns (sequences, frames), True behind the length of each sequence."""
        return (torch.arange(frames) >= torch.tensor(lengths)[:, None]).to(self.device)


def placed(call: Callable[[Make], dict]) -> Callable[[Make], dict]:
    """Returns a function that makes a call with all of its tensors on the device of ``Make``."""
    return lambda m: {k: v.to(m.device) if isinstance(v, Tensor) else v for k, v in call(m).items()}


def changed(call: Callable[[Make], dict], **arguments: Any) -> Callable[[Make], dict]:
    """Returns a function that makes a call with other arguments, which may themselves be functions of ``Make``."""
    return lambda m: call(m) | {k: v(m) if callable(v) else v for k, v in arguments.items()}


@dataclass(frozen=True)
class Sample:
    """One valid call: ``arguments(make)`` returns the op's keyword arguments.

    ``exact``: values are finite and smooth, so gradients are compared (off for infinities and the like).
    ``thorough``: the sample is small and used for the slower checks (gradcheck, opcheck, compile, autocast).
    ``large``: the sample is left out where kernels are interpreted, which would take minutes.
    ``draws``: number of draws over which errors are averaged, since a single draw of few numbers has a random error.
    """

    name: str
    arguments: Callable[[Make], dict]
    exact: bool = True
    thorough: bool = False
    large: bool = False
    draws: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", placed(self.arguments))


def sampler(call: Callable[..., dict], **settings: Any) -> Callable[..., Sample]:
    """Returns a function (name, sizes, **arguments) that makes the sample ``call(make, *sizes, **arguments)``.

    Arguments may be functions of ``Make``. Those that Sample has too are its own, and so are ``settings``.
    """

    def sample(name: str, sizes: tuple[int, ...], **arguments: Any) -> Sample:
        own = settings | {key: arguments.pop(key) for key in _OF_SAMPLE & arguments.keys()}

        def made(make: Make) -> dict:
            given = {key: value(make) if callable(value) else value for key, value in arguments.items()}
            return call(make, *sizes, **given)

        return Sample(name, made, **own)

    return sample


_OF_SAMPLE = {"exact", "thorough", "large", "draws"}


@dataclass(frozen=True)
class Invalid:
    """A call that must raise ``error`` with ``match`` in its message, before anything is launched."""

    name: str
    arguments: Callable[[Make], dict]
    error: type[Exception]
    match: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", placed(self.arguments))


def invalid(call: Callable[[Make], dict], *cases: tuple) -> tuple[Invalid, ...]:
    """Returns calls with one argument changed, which the error's message names.

    Cases: name, argument, value or a function of ``Make``, and the error unless it is ``ValueError``.
    """
    return tuple(
        Invalid(name, changed(call, **{argument: value}), error[0] if error else ValueError, argument)
        for name, argument, value, *error in cases
    )


def _returned(op: Declared, arguments: dict, found: Any) -> Any:
    """Turns the operator's results into those of the public function for its keyword arguments."""
    asked = [not o.flag or arguments.get(o.flag) for o in op.outputs]
    found = (found,) if isinstance(found, Tensor) else found
    wanted = [t for t, is_asked in zip(found, asked, strict=False) if is_asked]
    return wanted[0] if len(wanted) == 1 else tuple(wanted)


@dataclass(frozen=True)
class OpTable:
    """Everything that the checks need to know about an op.

    op: its public name. definition: the eager formula, called with the same keyword arguments as the op.
    registered: a function from keyword arguments to the positional arguments of ``torch.ops.fastasr.<op>``. result: a
    function from the keyword arguments and that operator's result to the public function's result.
    rows: names of the arguments to cut along dimension 0 when a call is split (if the call has them); () if rows
    depend on each other. thread_invariant: whether results are bitwise equal for any number of threads (a vendor's
    matrix product may not be). penalties: options that add to gradients alone, which then are no slopes. unread:
    arguments whose elements a call may leave unread (masked keys). Eager multiplies them by zero, so a NaN there
    appears only in eager's result.
    """

    op: str
    samples: tuple[Sample, ...]
    invalid: tuple[Invalid, ...] = ()
    definition: Any = None  # by default these two are those of the declaration
    registered: Any = None
    rows: tuple[str, ...] = ()
    thread_invariant: bool = True
    unread: tuple[str, ...] = ()
    penalties: tuple[str, ...] = ()
    random: Any = None  # (make, a fuzz.Shape) -> the keyword arguments of a random call
    result: Callable[[dict, Any], Any] = lambda arguments, outputs: outputs

    def __post_init__(self) -> None:
        op: Any = ops.OPS.get(self.op)
        if op is None or self.definition is not None:
            return
        for name, value in (
            ("definition", op.function.definition),
            ("registered", lambda a: op.written.Arguments(**a)),
            ("result", partial(_returned, declared(op))),
        ):
            object.__setattr__(self, name, value)

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(ops, self.op)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.fastasr, self.op).default

    def call_registered(self, arguments: dict) -> Tensor:
        """Calls the registered op with the public function's keyword arguments; see :func:`flat`."""
        return flat(self.result(arguments, self.overload(*self.registered(arguments))))

    @property
    def thorough(self) -> tuple[Sample, ...]:
        return tuple(s for s in self.samples if s.thorough)

    @property
    def richest(self) -> Sample:
        """The thorough sample that is interpreted and has the most arguments."""
        small = [s for s in self.thorough if not s.large]
        return max(small, key=lambda s: sum(v is not None for v in s.arguments(Make()).values()))


def samples_of(op: str | Callable) -> ModuleType:
    """Returns the module of samples of a public op, which is given by its name or as the function itself. Raises
    ``ValueError`` if no op is called so.
    """
    name = op if isinstance(op, str) else getattr(getattr(op, "op", None), "name", op)
    if name not in ops.NAMES:
        raise ValueError(
            f"fastasr.testing: op: expected an op or its name, got {name!r}{nearest(str(name), ops.NAMES)}"
        )
    module = f"fastasr.testing.samples.{name}"
    if find_spec(module) is None:
        raise LookupError(f"{name} has no samples: write {module.replace('.', '/')}.py with a TABLE")
    return import_module(module)


@cache
def table(op: str | Callable) -> OpTable:
    """Returns the table of a public op, which is given by its name or as the function itself."""
    return samples_of(op).TABLE


@cache
def tables() -> dict[str, OpTable]:
    """Returns {name: table} of the ops that have gradients. Ops that are gradients themselves have tables too."""
    return {name: table(name) for name in ops.NAMES if name not in ops.GRADIENTS}


def flat(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Returns one tensor for an op's outputs. Several are joined in their widest dtype, to be checked together."""
    return outputs if isinstance(outputs, Tensor) else torch.cat([t.flatten() for t in outputs])


def floating(arguments: dict) -> dict[str, Tensor]:
    """Returns the floating-point tensors of a call, for which gradients are computed."""
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}


def is_gradient(f: Callable) -> bool:
    """Says whether f is an op that is a gradient itself."""
    return hasattr(f, "op") and not f.op.written.differentiable


def forward_and_backward(table: "OpTable", sample: Sample, dtype: torch.dtype, device: str = "cpu") -> None:
    """Runs every kernel of a call: the op, and its gradients for a cotangent of ones if it has any."""
    arguments = sample.arguments(Make(dtype, device))
    wanted = not is_gradient(table.function)
    y = flat(table.function(**with_tensors(arguments, lambda _, t: t.requires_grad_(wanted))))
    if y.requires_grad:
        y.backward(torch.ones_like(y))


def with_tensors(arguments: dict, f: Callable[[str, Tensor], Tensor]) -> dict:
    """Returns the call with every floating-point tensor replaced by ``f(name, tensor)``."""
    return {
        k: f(k, v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }
