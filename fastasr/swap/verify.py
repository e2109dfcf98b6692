# SPDX-License-Identifier: Apache-2.0
"""Runs every swapped module both ways on the activations of a real input, and undoes the swaps that disagree.

The model runs once on upstream's code. When that run reaches a swapped module, the module's inputs go through four
forwards: fastasr's and upstream's, each for inference (eval mode, no gradients) and for training (training mode,
gradients of all inputs and parameters for a random gradient of the output), from the same random state (see
:mod:`fastasr.swap.replay`). A module passes if

* fastasr's error against upstream's own code in fp64, with the same random draws, is allowed
  (:mod:`fastasr.swap.verdict`). Where gradients disagree for one gradient of the output, two more decide;
* both produce the same shapes, dtypes and non-finite values, and leave the same random state behind.

The first of several like modules, and every module whose results differ by more than half the allowed error, has runs
in fp64. The other modules need none, since it could not change the verdict; the errors in their rows are the sum of the
measured difference and the first one's error of upstream's code.

Where upstream's own code gives NaN, at padding for example, the modules that get it are compared with 0 in its place:
other orders of a sum spread NaN to other results.

With dropout of attention weights, the training passes compare fastasr's formula with upstream's draws
(:func:`fastasr.upstream_draws`), not the kernel, which drops other weights.

If no fp64 run is possible, the two are compared with each other, with a tolerance for their dtype, and the report says
so; there a result is zero except for rounding if it is a few units in the last place of the largest of the others.

Short runs, and all runs while other processes want the cores, use one thread: each of many tiny operations would wait
for all threads, and on a busy machine such waits take longer than the work. But in the first of like modules, fastasr's
code runs on as many threads as torch is set to, as it will later.
"""

import contextlib
import functools
import inspect
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from fastasr import _left, processor
from fastasr.models.common.ragged import padded
from fastasr.ops import _reduced_weights
from fastasr.swap import binding
from fastasr.swap.interruption import deferred
from fastasr.swap.progress import Progress
from fastasr.swap.replay import (
    Call,
    Likeness,
    Outcome,
    Reference,
    holds_shards,
    least_precise,
    likeness,
    mapped,
)
from fastasr.swap.report import REPLACED, ROLLED_BACK, Row, SwapReport, worst
from fastasr.swap.rule import Rule
from fastasr.swap.rules import swapped_modules
from fastasr.swap.state import ModelState
from fastasr.swap.verdict import Part, Verdict, near

_PASSES = ("inference", "training")
_KINDS = ("values", "gradients")
_WORTH_THREADS = 0.05  # A run that takes fewer seconds on one thread gains little from more.


def verify(model: nn.Module, inputs: Any, gradients: bool = True, rollback: bool = True) -> SwapReport:
    """Checks every swapped module of ``model`` on ``inputs``. Returns a SwapReport with a row for each.

    inputs: a tuple of arguments, a dict of keyword arguments, a tensor, or a callable that takes the model
        and runs it.
    gradients: whether to compare the gradients of inputs and parameters too, in training mode.
    rollback: whether to restore the modules that disagree; if False, they are reported as "rolled back" but stay
        swapped.

    Afterwards the model, the inputs, random states and torch's modes are the same to the bit, whatever the model's code
    does and whether it raises an exception. If the model cannot run the inputs on upstream's code, its exception is
    passed on, with a note that shows the shapes of the inputs and the arguments of the model's forward. Ctrl-C ends the
    verification after the run of a module that is under way; a second one ends it at once.
    On a terminal, standard error shows how many modules are verified.
    """
    return verified(model, inputs, gradients, rollback)


def verified(
    model: nn.Module,
    inputs: Any,
    gradients: bool = True,
    rollback: bool = True,
    whole: ModelState | None = None,
) -> SwapReport:
    """Does what ``verify`` does. ``whole``: an earlier state of the model, whose copies of parameters serve again."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"verify: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, (torch.Tensor, dict, tuple, list)) and not callable(inputs):
        raise TypeError(
            f"verify: inputs must be a tensor, a tuple, a dict or a callable, got {type(inputs).__name__}"
        )
    report = SwapReport(type(model).__name__, verified=True)
    swapped = list(swapped_modules(model))
    with deferred() as interruption:
        probes = _probed(model, swapped, inputs, gradients, whole, interruption)
    for (path, module, rule), own in zip(swapped, probes, strict=True):
        row = Row(path, type(module).__name__, rule.name, rule.kernels, REPLACED, "")
        reached = [probe for probe in own if probe.errors is not None]
        row.reason = "; ".join(dict.fromkeys(probe.note for probe in reached if probe.note))
        failures = [probe.failure for probe in own if probe.failure is not None]
        if reached:
            row.errors, row.allowed = worst(reached)
            row.like = next((probe.like for probe in reached if probe.like), None)
        if failures:
            row.status, row.reason = ROLLED_BACK, f"verification: {failures[0]}"
            if rollback:
                binding.unbind(module)
        elif not reached:
            row.reason = "not reached by the inputs of verify"
        report.rows.append(row)
    return report


def _probed(
    model: nn.Module,
    swapped: list[tuple[str, nn.Module, Rule]],
    inputs: Any,
    gradients: bool,
    whole: ModelState | None,
    interruption: Callable[[], None],
) -> "list[list[_Probe]]":
    """Runs the model once, and compares every swapped module that the run reaches. Returns a list of probes for each
    swapped module.
    """
    exact = _reduced_weights.suspended()  # The swap is compared in float32; weights= bounds its own error.
    unnoted = _left.ignored()
    given = () if callable(inputs) else (inputs,)
    _refuse_nan(given)
    state = ModelState(model, *given, whole=whole)
    with _released(swapped), state, _no_compilation(), exact, padded(), unnoted, torch.no_grad():
        checks = _Checks(_PASSES if gradients else _PASSES[:1], state, interruption)
        probes = [
            [
                _Probe(path, module, rule, name, checks)
                for name in ("forward", *rule.compared)
                if name in vars(module)  # Some versions of upstream's class have fewer methods.
            ]
            for path, module, rule in swapped
        ]
        for _, module, rule in swapped:
            for name, _ in rule.methods:
                if name not in rule.compared and binding.bound_function(module, name) is not None:
                    del vars(module)[name]
        for probe in itertools.chain(*probes):
            probe.attach()
        torch.set_num_threads(1)
        with Progress(sum(map(len, probes))) as checks.progress:
            try:
                run(model, inputs)
            except Exception as error:
                error.add_note(_about(model, inputs))
                raise
    return probes


def _refuse_nan(inputs: Any) -> None:
    """Raises ValueError if an input holds NaN, with which every comparison would hold. Masks may hold infinities."""
    for t in tree_flatten(inputs)[0]:
        if _holds_nan(t):
            raise ValueError(
                f"verify: inputs: expected numbers, got NaN in a tensor of shape {tuple(t.shape)}"
            )


def _holds_nan(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any())


def _about(model: nn.Module, inputs: Any) -> str:
    """Returns a note for errors of the model's own code: the inputs' shapes and the forward's arguments."""

    def shape(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return type(value).__name__

    name = type(model).__name__
    try:
        parameters = inspect.signature(model.forward).parameters.values()
        takes = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
        takes = f"\n    {name}.forward takes ({takes})"
    except (TypeError, ValueError):  # The forward is not written in Python.
        takes = ""
    if isinstance(inputs, dict):
        given = ", ".join(f"{key}={shape(value)}" for key, value in inputs.items())
    elif isinstance(inputs, (tuple, list)):
        given = ", ".join(map(shape, inputs))
    else:
        given = shape(inputs)
    return (
        f"fastasr's verify ran {name} on upstream's code with the given inputs, which raised this error."
        f"\n    the inputs: {given}{takes}\n    The model is as it was before the call."
    )


def run(model: nn.Module, inputs: Any) -> Any:
    """Returns the model's result for ``inputs`` as ``verify`` takes them."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return inputs(model)


@contextlib.contextmanager
def _released(swapped: list[tuple[str, nn.Module, Rule]]) -> Iterator[None]:
    """Frees at the end the data that our forwards keep: they made some of it from weights that were restored."""
    try:
        yield
    finally:
        for _, module, rule in swapped:
            rule.release(module)


@contextlib.contextmanager
def _no_compilation() -> Iterator[None]:
    """Runs upstream's inner torch.compile functions as plain Python, which saves 20 s of compilation."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Checks:
    """The data that the probes of one verification share: passes, the model's earlier state, ``interruption``, which
    raises KeyboardInterrupt after Ctrl-C, and ``side``, which says whose forward a probe runs when called."""

    def __init__(self, passes: Sequence[str], state: ModelState, interruption: Callable[[], None]) -> None:
        self.passes, self.state, self.interruption = passes, state, interruption
        self.side = "capture"
        self.threads = torch.get_num_threads()
        self.progress: Progress  # while the model runs
        self.seconds: dict[Any, float] = {}  # likeness -> time of upstream's forward on one thread
        # (likeness, training) -> path, and the verdict per kind, of the first like module
        self.verdicts: dict[Any, tuple[str, dict[str, Verdict]]] = {}

    @contextlib.contextmanager
    def run_as(self, side: str) -> Iterator[None]:
        before, self.side = self.side, side
        try:
            yield
        finally:
            self.side = before

    def use_threads(self, likeness: Likeness | None, untried: bool = False) -> None:
        """Sets the number of threads for a run of calls of this likeness. ``untried``: by fastasr's code, which has not
        run in a like module yet."""
        short = self.seconds.get(likeness, 0.0) < _WORTH_THREADS
        alone = (short and not untried) or processor.free_cores() < self.threads
        torch.set_num_threads(1 if alone else self.threads)


class _UpstreamRaises(Exception):
    """Upstream's code cannot run a module's inputs in one of the passes."""


class _Probe:
    """Replaces a swapped module's forward, or another of its methods, while the model runs."""

    def __init__(self, path: str, module: nn.Module, rule: Rule, name: str, checks: _Checks) -> None:
        self.path, self.module, self.rule, self.name, self.checks = path, module, rule, name, checks
        self.ours = vars(module)[name]
        parts = (module,) if rule.shallow else module.modules()
        self.count = sum(binding.bound_forward(part) is not None for part in parts)
        self.errors: Any = None  # kind -> the largest error, once the module was called
        self.allowed: dict[str, float] = {}
        self.failure: str | None = None
        self.like: str | None = None
        self.likeness: Likeness | None = None
        self.note = ""

    def attach(self) -> None:
        # keeps our attributes, by which other code recognises our method, and the names of its arguments
        @functools.wraps(getattr(self.ours, "__func__", self.ours))
        def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        vars(self.module)[self.name] = types.MethodType(method, self.module)

    def upstream(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.checks.side == "ours":
            return self.ours(*args, **kwargs)
        if self.checks.side == "capture" and self.errors is None and self.failure is None:
            self.checks.progress.step(self.path)
            inputs, named = args, kwargs
            has_nan = any(map(_holds_nan, tree_flatten((args, kwargs))[0]))
            if has_nan:
                inputs, named = mapped(lambda t: t.nan_to_num(0.0, math.inf, -math.inf), (args, kwargs))
            state = ModelState(self.module, inputs, named, whole=self.checks.state)
            self.failure = self._compare(inputs, named, state)
            if has_nan:
                self.note = "; ".join(
                    filter(None, (self.note, "compared with 0 in the place of its inputs' NaN"))
                )
        before = torch.get_num_threads()
        self.checks.use_threads(self.likeness)
        result = self.upstream(*args, **kwargs)
        torch.set_num_threads(before)
        return result

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: ModelState) -> str | None:
        """Returns why fastasr and upstream disagree on this call, or None. It fills ``errors`` and ``allowed``."""
        self.errors = {}
        self.likeness = likeness(self, args, kwargs)
        self.dtype = least_precise(self.module, args, kwargs)
        impossible: list[str] = []
        notes: list[str] = []
        for name in self.checks.passes:
            training = name == "training"
            if training and holds_shards(self.module):
                impossible.append(
                    "training: it holds modules of FSDP2, whose backward reshards the whole model"
                )
                continue
            calls = [Call(self, state, args, kwargs, training, draw) for draw in range(3 if training else 1)]
            try:
                reason = self._run_both(calls[0])
                # For one gradient of the output, the order of a sum may cost more digits than for hundreds of others.
                if reason is not None and training and all(self._run_both(c) is None for c in calls[1:]):
                    reason = None
            except _UpstreamRaises as error:
                impossible.append(f"{name}: upstream raises {error}")
                continue
            if reason is not None:
                return f"{name}: {reason}"
            if calls[0].without_fp64:
                notes.append(f"{name} compared without a run in float64: {calls[0].without_fp64}")
        if len(impossible) == len(self.checks.passes):
            return "; ".join(impossible)
        self.note = "; ".join([*(f"not compared in {text}" for text in impossible), *notes])
        return None

    def _run_both(self, call: Call) -> str | None:
        """Returns why fastasr and upstream disagree on this call, or None. Raises _UpstreamRaises if upstream cannot
        run.
        """
        try:
            upstream = call.upstream()
        except Exception as error:
            raise _UpstreamRaises(f"{type(error).__name__}: {error}") from error
        try:
            ours = call.ours()
        except Exception as error:
            return f"fastasr raises {type(error).__name__}: {error}"
        if ours.random != upstream.random and not self._draws_by_k2():
            return "fastasr and upstream draw different random numbers"
        return None if self._is_near_like_a_first(call, ours, upstream) else self._judge(call, ours, upstream)

    def _is_near_like_a_first(self, call: Call, ours: Outcome, upstream: Outcome) -> bool:
        """Says whether no run in fp64 can change that this call passes, and a like module has had one."""
        path, verdicts = self.checks.verdicts.get((self.likeness, call.training), ("", {}))
        found: dict[str, Any] = {}
        for kind, verdict in verdicts.items():
            pair = getattr(ours, kind), getattr(upstream, kind)
            found[kind] = near(*pair, self.count, self.dtype, verdict)
        if not found or None in found.values():
            return False
        for kind, parts in found.items():
            self._record(kind, parts)
        self.like = path
        return True

    def _judge(self, call: Call, ours: Outcome, upstream: Outcome) -> str | None:
        reference = Reference(call, upstream)
        verdicts = {}
        for kind in _KINDS:
            verdicts[kind] = Verdict(kind, getattr(ours, kind), getattr(upstream, kind), reference)
            self._record(kind, verdicts[kind].parts)
            if verdicts[kind].failure is not None:
                return verdicts[kind].failure
        if reference.outcome is not None:
            self.checks.verdicts.setdefault((self.likeness, call.training), (self.path, verdicts))
        return None

    def _draws_by_k2(self) -> bool:
        """Says whether upstream uses k2's Swoosh, which draws random numbers to round derivatives; fastasr's does
        not.
        """
        return "k2" in type(self.module).forward.__globals__

    def _record(self, kind: str, parts: Sequence[Part | None]) -> None:
        part = max(filter(None, parts), default=None)
        if part is not None and part.error >= self.errors.get(kind, 0.0):
            self.errors[kind], self.allowed[kind] = part.error, part.allowed
        if part is not None:
            upstream = max(part.upstream for part in filter(None, parts))
            self.errors[f"upstream_{kind}"] = max(self.errors.get(f"upstream_{kind}", 0.0), upstream)
