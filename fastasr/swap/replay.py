# SPDX-License-Identifier: Apache-2.0
"""Runs one call of a module any number of times, each from the same state, on fastasr's code, on upstream's, and on
upstream's in fp64.

"Upstream's own code" is the user's module as it is, with the forwards, hooks, parametrizations and adapters that the
user gave to modules inside. The fp64 run therefore takes place in the module itself, whose tensors are exchanged for
fp64 ones meanwhile: a copy of the module would lack the variables of a forward or a hook. Each run starts from the same
state (:class:`ModelState`), in which the model reached the module, then calls ``module.train(...)`` if the pass needs
the other mode. Setting the ``training`` flags alone could give a state in which no user's module ever is, such as an
adapter merged into its weight in training. The writes of ``train`` are undone like all others.
"""

import contextlib
import copy
import enum
import functools
import time
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastasr.models.common.attention_dropout import upstream_draws
from fastasr.swap import binding
from fastasr.swap.reach import Reach
from fastasr.swap.rule import Rule, upstream_class
from fastasr.swap.rules import rules_by_forward
from fastasr.swap.state import ModelState, RandomState
from fastasr.swap.verdict import Named, largest

# Upstream's own error is taken as its largest over this many inputs that differ in the last bit. An error that a sum
# multiplies spreads like one random number: the largest of four is too small a measure once in some 60 modules.
_NEARBY = 16


Likeness = tuple[Rule, str, str]
Probe = Any  # a _Probe of verify.py, which imports this module
Roundings = Callable[[Any], Any]
Prepare = Callable[[Any, contextlib.ExitStack], Any]


class Call:
    """A call of a probe's method in one pass, which runs any number of times from the state in which the model made it.
    ``draw`` numbers the random gradient of the output. ``without_fp64`` says why it has no run in fp64."""

    def __init__(
        self,
        probe: Probe,
        state: ModelState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: bool,
        draw: int,
    ) -> None:
        self.probe, self.state, self.inputs = probe, state, (args, kwargs)
        self.training, self.draw = training, draw
        self.without_fp64: str | None = None

    def ours(self) -> "Outcome":
        """Runs fastasr's forward."""
        probe = self.probe
        untried = (probe.likeness, self.training) not in probe.checks.verdicts
        return self._run("upstream" if probe.rule.shallow else "ours", probe.ours, untried=untried)

    def upstream(self, prepare: Prepare | None = None, roundings: Roundings | None = None) -> "Outcome":
        """Runs upstream's forward. When module and inputs are in the state to run in, ``prepare`` takes the inputs, and
        a stack for contexts of the run, and returns the inputs to run on. ``roundings`` perturbs the gradient of the
        output."""
        probe, seconds = self.probe, self.probe.checks.seconds
        if probe.likeness in seconds:
            return self._run("upstream", probe.upstream, prepare, roundings)
        began = time.thread_time()
        outcome = self._run("upstream", probe.upstream, prepare, roundings)
        seconds[probe.likeness] = time.thread_time() - began
        return outcome

    def _run(
        self,
        side: str,
        forward: Callable[..., Any],
        prepare: Prepare | None = None,
        roundings: Roundings | None = None,
        untried: bool = False,
    ) -> "Outcome":
        """Runs ``forward``. ``side`` says whose forward runs in the swapped submodules."""
        checks, module, shared = self.probe.checks, self.probe.module, self.probe.rule.shared
        checks.interruption()
        with self.state, checks.run_as(side), upstream_draws(), contextlib.ExitStack() as stack:
            checks.use_threads(self.probe.likeness, untried)
            if module.training is not self.training:
                module.train(self.training)
            args, kwargs = self.inputs if prepare is None else prepare(self.inputs, stack)
            outcome = _replay(module, forward, args, kwargs, self.training, shared, self.draw, roundings)
            outcome.random = RandomState()
        return outcome


def likeness(probe: Probe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Likeness:
    """Returns the classes, modes and shapes of a module's call, which calls of like modules share."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.dtype, tuple(leaf.shape), leaf.device, leaf.requires_grad
        return leaf if isinstance(leaf, (bool, int, float, str, NoneType)) else type(leaf)

    module = probe.module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    parts = [(type(part), part.training) for part in module.modules()]
    return probe.rule, probe.name, str((parts, tree_map(of, (tensors, args, kwargs))))


def least_precise(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    """Returns the floating type of least precision of inputs and parameters."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    floating = [t.dtype for t in (*tensors, *module.parameters()) if t.is_floating_point()]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def holds_shards(module: nn.Module) -> bool:
    return any(upstream_class(part) is not type(part) for part in module.modules() if part is not module)


class Outcome:
    """The result of one run. ``values``: the output tensors; ``gradients``: those of the inputs, then of the
    parameters, with names."""

    def __init__(self, values: Named, gradients: Named) -> None:
        self.values, self.gradients = values, gradients
        self.random: RandomState | None = None

    def has_shapes_of(self, other: "Outcome") -> bool:
        def shapes(outcome: Outcome) -> list[torch.Size | None]:
            return [None if t is None else t.shape for _, t in (*outcome.values, *outcome.gradients)]

        return shapes(self) == shapes(other)


def _replay(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool,
    shared: Callable[[Any], Any],
    draw: int,
    roundings: Roundings | None = None,
) -> Outcome:
    """Runs ``forward`` once on detached inputs. ``shared`` selects the part of its result to compare; the output
    gradient is random number ``draw``, and ``roundings`` perturbs it.
    """

    def fresh(value: Any) -> Any:
        value = value.detach()
        wanted = training and value.is_floating_point() and not _hides_keys(value)
        return value.clone().requires_grad_() if wanted else value

    args, kwargs = mapped(fresh, (args, kwargs))
    with torch.set_grad_enabled(training):
        outputs = tree_flatten(_sorted(shared(forward(*args, **kwargs))))[0]
        outputs = [t for t in outputs if isinstance(t, torch.Tensor)]
        values = [(f"output {i}" if len(outputs) > 1 else "the output", t) for i, t in enumerate(outputs)]
        gradients = _gradients(module, outputs, (args, kwargs), draw, roundings) if training else []
    # The values are copies, because an output may share restored memory: an input changed in place, or a buffer.
    return Outcome([(name, t.detach().clone()) for name, t in values], gradients)


def _hides_keys(value: Tensor) -> bool:
    """Says whether this is a mask that upstream adds to scores (B, H, T, K). It stands for a bool, which has no
    gradient; in bfloat16 torchaudio's -10000 is -9984."""
    return value.dim() == 4 and bool(((value == 0) | (value <= -9984)).all())


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Returns ``value`` with ``function`` of its tensors, and copies of the objects that hold some: a forward updates a
    cache that it is given, and the next one must find it as it was."""
    copies = {}

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        if not hasattr(leaf, "__dict__") or callable(leaf) or isinstance(leaf, enum.Enum):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = twin = copy.copy(leaf)
            vars(twin).update({name: tree_map(of_leaf, held) for name, held in vars(leaf).items()})
        return copies[id(leaf)]

    return tree_map(of_leaf, value)


def _sorted(value: Any) -> Any:
    """Returns a result with its dicts sorted by key."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value, key=str)}
    return type(value)(map(_sorted, value)) if type(value) in (list, tuple) else value


def _gradients(
    module: nn.Module, outputs: Sequence[Tensor], inputs: Any, draw: int, roundings: Roundings | None
) -> Named:
    leaves = [t for t in tree_flatten(inputs)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
    named = [(f"input {i}", t) for i, t in enumerate(leaves)]
    named += [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    outputs = [t for t in outputs if t.requires_grad]
    if not named or not outputs:
        return []
    generator = torch.Generator().manual_seed(draw)
    seeds = []
    for t in outputs:
        seed = torch.randn(t.shape, generator=generator, dtype=torch.float32, device="cpu").to(
            t.device, t.dtype
        )
        seeds.append(seed if roundings is None else roundings(seed))
    found = torch.autograd.grad(outputs, [t for _, t in named], seeds, allow_unused=True)
    return [(f"the gradient of {name}", g) for (name, _), g in zip(named, found, strict=True)]


class _DrawInLowPrecision(TorchFunctionMode):
    """Makes fp64 code draw the numbers that the same code draws in ``dtype`` or, where it names no dtype, in the
    default one, so that masks are the same."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.default = dtype, torch.get_default_dtype()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn) and kwargs.get("dtype") in (None, torch.float64):
            kwargs["dtype"] = self.dtype if kwargs.get("dtype") else self.default
            return func(*args, **kwargs).double()
        if func is F.dropout and args and args[0].dtype is torch.float64:
            return self._dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return F.dropout(x, p, training, inplace)
        kept = F.dropout(torch.ones_like(x, dtype=self.dtype), p) != 0
        return x * kept / (1 - p) if p < 1 else x * 0


class StayInFp64(TorchDispatchMode):
    """Makes in fp64 what code casts to fp32, or makes in it, except random numbers. Upstream's softmax and regularisers
    cast in their backward passes, and tables of positions are made in fp32 in a model of any dtype."""

    def __enter__(self) -> Self:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # for a number times a mask, too
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self.default)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32 and torch.Tag.nondeterministic_seeded not in func.tags:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Reference:
    """Upstream's code in fp64, for a call that gave ``upstream`` in its own precision."""

    def __init__(self, call: Call, upstream: Outcome) -> None:
        self.call, self.count, self.dtype = call, call.probe.count, call.probe.dtype
        self.nearby: list[Outcome] | None = None
        self.outcome: Outcome | None = None
        self.rounded: Outcome | None = None
        if holds_shards(call.probe.module):
            call.without_fp64 = "FSDP2 keeps its parameters"
            return
        try:
            self.outcome = self._replay(None)
        except Exception as error:  # e.g. an extension lacks fp64, or fp32 tensors were not exchanged
            call.without_fp64 = f"{type(error).__name__}: {error}".partition("\n")[0]
            return
        if not self.outcome.has_shapes_of(upstream):
            self.outcome, call.without_fp64 = None, "it gives results of other shapes"
        elif self.outcome.random != upstream.random:
            self.outcome, call.without_fp64 = None, "it draws other random numbers"

    def _to_fp64(self, roundings: Roundings | None) -> None:
        """Exchanges every floating tensor of the module's state for one in fp64, and empties caches."""
        rules = rules_by_forward()
        for part in self.call.probe.module.modules():
            rule = rules.get(binding.bound_forward(part))
            if rule is not None:
                rule.empty_caches(part)
        twins: dict[int, Tensor] = {}

        def twin(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            if id(value) not in twins:
                twins[id(value)] = _in_fp64(value, roundings)
            return twins[id(value)]

        Reach((self.call.probe.module,), self.call.state.reach.outside).exchange(twin)

    def _replay(self, roundings: Roundings | None) -> Outcome:
        def prepare(inputs: Any, stack: contextlib.ExitStack) -> Any:
            self._to_fp64(roundings)
            inputs = mapped(_double, inputs)
            if roundings is not None:
                inputs = tree_map(roundings, inputs)
            devices = [t.device.type for t in tree_flatten(inputs)[0] if isinstance(t, torch.Tensor)]
            autocast = torch.autocast(next(iter(devices), "cpu"), enabled=False)
            for mode in (_DrawInLowPrecision(self.dtype), autocast, StayInFp64()):
                stack.enter_context(mode)
            return inputs

        return self.call.upstream(prepare, roundings)

    def of(self, kind: str) -> Named | None:
        """Returns the list of named fp64 tensors, or None without a reference."""
        return None if self.outcome is None else getattr(self.outcome, kind)

    def rounding_effect(self, kind: str) -> list[float]:
        """Returns the largest change of each tensor when inputs, parameters and output gradient are rounded once."""
        if self.rounded is None:
            generator = torch.Generator().manual_seed(1)
            self.rounded = self._replay(functools.partial(_moved, generator, torch.finfo(self.dtype).eps / 2))
        pairs = zip(getattr(self.rounded, kind), getattr(self.outcome, kind), strict=True)
        return [0.0 if b is None else largest(a - b) for (_, a), (_, b) in pairs]

    def nearby_error(self, kind: str, index: int) -> float:
        """Returns the largest error of one tensor of upstream's code, in its own precision, over inputs that differ in
        the last bit."""
        if self.nearby is None:
            generator = torch.Generator().manual_seed(2)
            moved = functools.partial(_moved, generator, None)
            runs = (self.call.upstream(lambda inputs, _: tree_map(moved, inputs)) for _ in range(_NEARBY))
            self.nearby = list(runs)
        exact = getattr(self.outcome, kind)[index][1]
        found = (getattr(run, kind)[index][1] for run in self.nearby)
        return max(largest(tensor.double() - exact) for tensor in found)


def _double(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value


def _in_fp64(tensor: Tensor, roundings: Roundings | None) -> Tensor:
    """Returns a tensor of a module in fp64, with its attributes and hooks."""
    data = _double(tensor)
    if roundings is not None and isinstance(tensor, torch.nn.Parameter):
        data = roundings(data)
    if isinstance(tensor, torch.nn.Parameter):
        data = torch.nn.Parameter(data, tensor.requires_grad)
    elif tensor.is_leaf and tensor.requires_grad:
        data.requires_grad_()
    vars(data).update(vars(tensor))
    if tensor.is_leaf and tensor._backward_hooks:
        data._backward_hooks = tensor._backward_hooks
    return data


def _moved(generator: torch.Generator, step: float | None, value: Any) -> Any:
    """Returns a floating tensor whose elements are up or down by the relative ``step``, by default its dtype's."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    step = torch.finfo(value.dtype).eps if step is None else step
    signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int64, device="cpu")
    signs = signs.to(value.device, value.dtype)
    return value.detach() * (1 + step * (2 * signs - 1))
