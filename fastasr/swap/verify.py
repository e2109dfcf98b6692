# SPDX-License-Identifier: Apache-2.0
"""Runs every swapped module both ways on the activations of a real input, and undoes the swaps that disagree.

The model runs once on upstream's code. When that run reaches a swapped module, the module's inputs go through four
forwards: fastasr's and upstream's, each for inference (eval mode, no gradients) and for training (training mode,
gradients of all inputs and parameters for a random gradient of the output), from the same random state. Both are
compared with upstream's own code in fp64 with the same random draws. A module passes if

* fastasr's error is at most twice upstream's, or a few units in the last place of the largest result (for each
  swapped module in it), or a few times the effect of rounding the inputs once (which sums with cancellation need).
  Upstream's error is the largest over inputs that differ in the last bit, where one input is not enough: Whiten's
  gradient loses any number of digits where the covariance is nearly white, and each order of its sums loses others.
  The error of a result that is zero except for rounding, such as the gradient of a key's bias, is taken relative to
  the largest of the other results. Where gradients disagree for one gradient of the output, two more decide;
* both produce the same shapes, dtypes and non-finite values, and leave the same random state behind.

With dropout of attention weights, the training passes compare fastasr's formula with upstream's draws
(:func:`fastasr.upstream_draws`), not the kernel, which drops other weights.

If no fp64 run is possible, the two are compared with each other, with a tolerance for their dtype; there a result is
zero except for rounding if it is a few units in the last place of the largest of the others.
"""

import contextlib
import copy
import enum
import functools
import itertools
import sys
import types

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastasr import _left
from fastasr.models.common.attention_dropout import upstream_draws
from fastasr.models.common.ragged import padded
from fastasr.ops import _reduced_weights
from fastasr.swap import binding
from fastasr.swap.report import REPLACED, ROLLED_BACK, Row, SwapReport
from fastasr.swap.rule import upstream_class
from fastasr.swap.rules import rules_by_forward, swapped_modules
from fastasr.swap.state import ModelState, RandomState

_NOISE = 2.0  # allowed multiple of upstream's own error, since the largest error of one call is noisy
_ULPS = 8  # allowed units in the last place of the largest result, for each swapped module on the way to it
_FP64_ULPS = 64  # the same in fp64, where the reference has rounding errors of its own
_CANCELLED = (
    1e-12  # relative to the largest result: below it, a sum of the reference is zero except for rounding
)
_ROUNDINGS = 4  # allowed multiple of the effect of rounding the inputs once
# Inputs that differ in the last bit, whose errors of upstream's code stand for its own error. An error that a sum
# multiplies has the spread of one random number: the largest of four is too small a measure once in some 60 modules.
_NEARBY = 16
_PLAIN_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_PASSES = ("inference", "training")


def verify(model, inputs, gradients=True, rollback=True):
    """Checks every swapped module of ``model`` on ``inputs``. Returns a SwapReport with a row for each.

    inputs: a tuple of arguments, a dict of keyword arguments, a tensor, or a callable that takes the model
        and runs it.
    gradients: whether to compare the gradients of inputs and parameters too, in training mode.
    rollback: whether to restore the modules that disagree; if False, they are reported as "rolled back" but stay
        swapped.

    Gradients, buffers, training flags and random states are the same afterwards. If the model cannot run the inputs on
    upstream's code, its exception is passed on.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"verify: model must be a torch.nn.Module, got {type(model).__name__}")
    report = SwapReport(type(model).__name__, verified=True)
    swapped = list(swapped_modules(model))
    checks = _Checks(_PASSES if gradients else _PASSES[:1])
    exact = _reduced_weights.suspended()  # the swap is right in float32; weights= bounds its own error
    unnoted = _left.ignored()
    with ModelState(model), RandomState(), _no_compilation(), exact, padded(), unnoted, torch.no_grad():
        probes = [
            [_Probe(module, rule, name, checks) for name in ("forward", *rule.compared)]
            for _, module, rule in swapped
        ]
        aside = [
            (vars(module), name, vars(module)[name])
            for _, module, rule in swapped
            for name, _ in rule.methods
            if name not in rule.compared and binding.bound_function(module, name) is not None
        ]
        try:
            for namespace, name, _ in aside:
                del namespace[name]
            for probe in itertools.chain(*probes):
                probe.attach()
            run(model, inputs)
        finally:
            for probe in itertools.chain(*probes):
                probe.detach()
            for namespace, name, method in aside:
                namespace[name] = method
    for (path, module, rule), own in zip(swapped, probes, strict=True):
        row = Row(path, type(module).__name__, rule.name, rule.kernels, REPLACED, "")
        reached = [probe for probe in own if probe.errors is not None]
        row.reason = "; ".join(dict.fromkeys(probe.note for probe in reached if probe.note))
        failures = [probe.failure for probe in own if probe.failure is not None]
        if reached:
            names = {name for probe in reached for name in probe.errors}
            row.errors = {name: max(probe.errors.get(name, 0.0) for probe in reached) for name in names}
        if failures:
            row.status, row.reason = ROLLED_BACK, f"verification: {failures[0]}"
            if rollback:
                binding.unbind(module)
        elif not reached:
            row.reason = "not reached by the inputs of verify"
        report.rows.append(row)
    return report


def run(model, inputs):
    """Returns the model's result for ``inputs`` as ``verify`` takes them."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    if callable(inputs):
        return inputs(model)
    raise TypeError(
        f"verify: inputs must be a tensor, a tuple, a dict or a callable, got {type(inputs).__name__}"
    )


@contextlib.contextmanager
def _no_compilation():
    """Runs upstream's inner torch.compile functions as plain Python, which saves 20 s of compilation."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Checks:
    """The state that the probes of one verification share. ``side`` says whose forward a probe runs when called."""

    def __init__(self, passes):
        self.passes = passes
        self.side = "capture"

    @contextlib.contextmanager
    def run_as(self, side):
        before, self.side = self.side, side
        try:
            yield
        finally:
            self.side = before


class _UpstreamRaises(Exception):
    """Upstream's code cannot run a module's inputs in one of the passes."""


class _Probe:
    """Replaces a swapped module's forward, or another of its methods, while the model runs."""

    def __init__(self, module, rule, name, checks):
        self.module, self.rule, self.name, self.checks = module, rule, name, checks
        self.ours = vars(module)[name]
        parts = (module,) if rule.shallow else module.modules()
        self.count = sum(binding.bound_forward(part) is not None for part in parts)
        self.errors = None
        self.failure = None
        self.note = ""

    def attach(self):
        # keeps our attributes, by which other code recognises our method, and the names of its arguments
        @functools.wraps(getattr(self.ours, "__func__", self.ours))
        def method(module, *args, **kwargs):
            return self(*args, **kwargs)

        vars(self.module)[self.name] = types.MethodType(method, self.module)

    def detach(self):
        vars(self.module)[self.name] = self.ours

    def upstream(self, *args, **kwargs):
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        if self.checks.side == "ours":
            return self.ours(*args, **kwargs)
        if self.checks.side == "capture" and self.errors is None and self.failure is None:
            with ModelState(self.module), RandomState():
                self.failure = self._compare(args, kwargs)
        return self.upstream(*args, **kwargs)

    def _compare(self, args, kwargs):
        """Returns why fastasr and upstream disagree on this call, or None. It fills ``errors``."""
        self.errors = {}
        impossible = []
        for name in self.checks.passes:
            training = name == "training"
            if training and _holds_shards(self.module):
                impossible.append(
                    "training: it holds modules of FSDP2, whose backward reshards the whole model"
                )
                continue
            self.module.train(training)
            start = RandomState.now()
            try:
                reason = self._run_both(name, args, kwargs, training, start)
                # of one gradient of the output a sum may lose more by its order than in hundreds of others
                if (
                    reason is not None
                    and training
                    and all(
                        self._run_both(name, args, kwargs, training, start, draw) is None for draw in (1, 2)
                    )
                ):
                    reason = None
            except _UpstreamRaises as error:
                impossible.append(f"{name}: upstream raises {error}")
                continue
            if reason is not None:
                return f"{name}: {reason}"
        if len(impossible) == len(self.checks.passes):
            return "; ".join(impossible)
        self.note = "; ".join(f"not compared in {text}" for text in impossible)
        return None

    def _run_both(self, name, args, kwargs, training, start, draw=0):
        """Returns why fastasr and upstream disagree with gradient number ``draw`` of the output, or None. Raises
        _UpstreamRaises if upstream cannot run.
        """
        start.restore()
        try:
            upstream = self._replay_as("upstream", self.upstream, args, kwargs, training, draw)
        except Exception as error:
            raise _UpstreamRaises(f"{type(error).__name__}: {error}") from error
        start.restore()
        try:
            parts = "upstream" if self.rule.shallow else "ours"
            ours = self._replay_as(parts, self.ours, args, kwargs, training, draw)
        except Exception as error:
            return f"fastasr raises {type(error).__name__}: {error}"
        return self._judge(ours, upstream, _Reference(self, args, kwargs, training, start, draw))

    def _replay_as(self, side, forward, args, kwargs, training, draw):
        """Runs ``forward``. ``side`` says whose forward runs in the swapped submodules."""
        with self.checks.run_as(side), ModelState(self.module), upstream_draws():
            outcome = _replay(self.module, forward, args, kwargs, training, self.rule.shared, draw)
        outcome.random = RandomState.now()
        return outcome

    def _judge(self, ours, upstream, reference):
        if ours.random != upstream.random and not self._draws_by_k2():
            return "fastasr and upstream draw different random numbers"
        for kind, mine, theirs in (
            ("values", ours.values, upstream.values),
            ("gradients", ours.gradients, upstream.gradients),
        ):
            verdict = _Verdict(kind, mine, theirs, reference)
            self._record(kind, verdict)
            if verdict.failure is not None:
                return verdict.failure
        return None

    def _draws_by_k2(self):
        """Says whether upstream uses k2's Swoosh, which draws random numbers to round derivatives; fastasr's does
        not.
        """
        return "k2" in type(self.module).forward.__globals__

    def _record(self, kind, verdict):
        if verdict.error is None:
            return
        for key, value in ((kind, verdict.error), (f"upstream_{kind}", verdict.upstream_error)):
            self.errors[key] = max(self.errors.get(key, 0.0), value)


def _holds_shards(module):
    return any(upstream_class(part) is not type(part) for part in module.modules() if part is not module)


class _Outcome:
    """The result of one run. ``values``: the output tensors; ``gradients``: those of the inputs, then of the
    parameters, with names."""

    def __init__(self, values, gradients):
        self.values, self.gradients = values, gradients
        self.random = None


def _replay(module, forward, args, kwargs, training, shared, draw, roundings=None):
    """Runs ``forward`` once on detached inputs. ``shared`` selects what of its result is compared; the output gradient
    is random number ``draw``, and ``roundings`` perturbs it.
    """

    def fresh(value):
        value = value.detach()
        return value.clone().requires_grad_() if training and value.is_floating_point() else value

    args, kwargs = _mapped(fresh, (args, kwargs))
    with torch.set_grad_enabled(training):
        outputs = tree_flatten(_sorted(shared(forward(*args, **kwargs))))[0]
        outputs = [t for t in outputs if isinstance(t, torch.Tensor)]
        values = [(f"output {i}" if len(outputs) > 1 else "the output", t) for i, t in enumerate(outputs)]
        gradients = _gradients(module, outputs, (args, kwargs), draw, roundings) if training else []
    return _Outcome([(name, t.detach()) for name, t in values], gradients)


def _mapped(function, value):
    """Returns ``value`` with ``function`` of its tensors, and copies of the objects that hold some: a forward updates a
    cache that it is given, and the next one must find it as it was."""
    copies = {}

    def of_leaf(leaf):
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        if not hasattr(leaf, "__dict__") or callable(leaf) or isinstance(leaf, enum.Enum):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = twin = copy.copy(leaf)
            vars(twin).update({name: tree_map(of_leaf, held) for name, held in vars(leaf).items()})
        return copies[id(leaf)]

    return tree_map(of_leaf, value)


def _sorted(value):
    """Returns a result with its dicts sorted by key."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value, key=str)}
    return type(value)(map(_sorted, value)) if type(value) in (list, tuple) else value


def _gradients(module, outputs, inputs, draw, roundings):
    leaves = [t for t in tree_flatten(inputs)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
    named = [(f"input {i}", t) for i, t in enumerate(leaves)]
    named += [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    outputs = [t for t in outputs if t.requires_grad]
    if not named or not outputs:
        return []
    generator = torch.Generator().manual_seed(draw)
    seeds = []
    for t in outputs:
        seed = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
        seeds.append(seed if roundings is None else roundings(seed))
    found = torch.autograd.grad(outputs, [t for _, t in named], seeds, allow_unused=True)
    return [(f"the gradient of {name}", g) for (name, _), g in zip(named, found, strict=True)]


class _DrawInLowPrecision(TorchFunctionMode):
    """Makes fp64 code draw the numbers that the same code draws in ``dtype``, so that masks are the same."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn) and kwargs.get("dtype") is torch.float64:
            kwargs["dtype"] = self.dtype
            return func(*args, **kwargs).double()
        if func is F.dropout and args and args[0].dtype is torch.float64:
            return self._dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return F.dropout(x, p, training, inplace)
        kept = F.dropout(torch.ones_like(x, dtype=self.dtype), p) != 0
        return x * kept / (1 - p) if p < 1 else x * 0


class StayInFp64(TorchDispatchMode):
    """Replaces casts of fp64 tensors to fp32 by copies. Upstream's softmax and regularisers cast in their backward
    passes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float32
        if cast and args[0].dtype is torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class _Reference:
    """Upstream's code on a copy of a probe's module in fp64."""

    def __init__(self, probe, args, kwargs, training, start, draw):
        module, self.name, self.count, self.shared = probe.module, probe.name, probe.count, probe.rule.shared
        self.probe, self.given, self.nearby = probe, (args, kwargs), None
        self.training, self.start, self.draw = training, start, draw
        self.module, self.outcome, self.rounded = None, None, None
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        floating = [t.dtype for t in [*tensors, *module.parameters()] if t.is_floating_point()]
        self.dtype = min(floating, key=lambda d: -torch.finfo(d).eps, default=torch.float32)
        try:
            self.module = self._in_fp64(module)
            self.args, self.kwargs = _mapped(self._double, (args, kwargs))
            self.outcome = self._replay(None)
        except Exception:  # an extension without fp64 or a sharded parameter: there is no reference
            self.outcome = None

    @staticmethod
    def _in_fp64(module):
        rules = rules_by_forward()
        result = copy.deepcopy(module)
        for part in result.modules():
            rule = rules.get(binding.bound_forward(part))
            vars(part).pop("forward", None)
            if rule is not None:
                rule.empty_caches(part)
                for name, _ in rule.methods:
                    vars(part).pop(name, None)
        return result.double()

    @staticmethod
    def _double(value):
        return value.detach().double() if value.is_floating_point() else value

    def _replay(self, roundings):
        self.start.restore()
        args, kwargs = self.args, self.kwargs
        if roundings is not None:
            args, kwargs = tree_map(roundings, (args, kwargs))
        forward = getattr(type(self.module), self.name).__get__(self.module)
        device = next((t.device.type for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor)), "cpu")
        draws, precision = _DrawInLowPrecision(self.dtype), torch.autocast(device, enabled=False)
        with ModelState(self.module), draws, precision, StayInFp64():
            return _replay(
                self.module, forward, args, kwargs, self.training, self.shared, self.draw, roundings
            )

    def of(self, kind):
        """Returns the list of named fp64 tensors, or None without a reference."""
        return None if self.outcome is None else getattr(self.outcome, kind)

    def rounding_effect(self, kind):
        """Returns the largest change of each tensor when inputs, parameters and output gradient are rounded once."""
        if self.rounded is None:
            generator = torch.Generator().manual_seed(1)
            step = torch.finfo(self.dtype).eps / 2

            def roundings(value):
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    return value
                signs = torch.randint(0, 2, value.shape, generator=generator).to(value.device, value.dtype)
                return value * (1 + step * (2 * signs - 1))

            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.copy_(roundings(parameter))
            self.rounded = self._replay(roundings)
        pairs = zip(getattr(self.rounded, kind), getattr(self.outcome, kind), strict=True)
        return [0.0 if b is None else _largest(a - b) for (_, a), (_, b) in pairs]

    def nearby_error(self, kind, index):
        """Returns the largest error of one tensor of upstream's code, in its own precision, over inputs that differ in
        the last bit."""
        if self.nearby is None:
            generator, probe = torch.Generator().manual_seed(2), self.probe

            def moved(value):
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    return value
                signs = torch.randint(0, 2, value.shape, generator=generator).to(value.device, value.dtype)
                return value.detach() * (1 + torch.finfo(value.dtype).eps * (2 * signs - 1))

            self.nearby = []
            for _ in range(_NEARBY):
                self.start.restore()
                args, kwargs = tree_map(moved, self.given)
                run = probe._replay_as("upstream", probe.upstream, args, kwargs, self.training, self.draw)
                self.nearby.append(run)
        exact = getattr(self.outcome, kind)[index][1]
        found = (getattr(run, kind)[index][1] for run in self.nearby)
        return max(_largest(tensor.double() - exact) for tensor in found)


class _Verdict:
    """Compares lists of named tensors. ``failure`` is a reason or None; errors are relative."""

    def __init__(self, kind, ours, upstream, reference):
        self.kind, self.failure, self.error, self.upstream_error = kind, None, None, None
        exact = reference.of(kind)
        known = upstream if exact is None else exact
        self._largest = max((_finite_largest(t) for _, t in known if t is not None), default=0.0)
        for index, ((name, mine), (_, theirs)) in enumerate(zip(ours, upstream, strict=False)):
            truth = None if exact is None else exact[index][1]
            self.failure = self._compare(name, mine, theirs, truth, reference, index)
            if self.failure is not None:
                return
        if len(ours) != len(upstream):
            self.failure = f"fastasr gives {len(ours)} {kind}, upstream {len(upstream)}"

    def _compare(self, name, mine, theirs, truth, reference, index):
        if mine is None or theirs is None:
            if mine is theirs:
                return None
            return f"{name} is {'missing' if mine is None else 'unexpected'}"
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return (
                f"{name} is {mine.dtype} {tuple(mine.shape)}, "
                f"upstream's is {theirs.dtype} {tuple(theirs.shape)}"
            )
        if mine.numel() == 0:
            return None
        if not mine.is_floating_point():
            return None if torch.equal(mine, theirs) else f"{name} differs from upstream's"
        finite = torch.isfinite(theirs)
        if truth is not None and truth.shape == theirs.shape:
            finite = finite & torch.isfinite(truth)
        if not torch.equal(torch.isfinite(mine) & finite, finite):
            return f"{name} is not finite where upstream's is"
        return self._errors(name, mine, theirs, truth, finite, reference, index)

    def _errors(self, name, mine, theirs, truth, finite, reference, index):
        eps = torch.finfo(theirs.dtype).eps
        mine, theirs = (torch.where(finite, t, 0).double() for t in (mine, theirs))
        if truth is None or truth.shape != theirs.shape:
            scale = _largest(theirs)
            if scale <= _ULPS * eps * self._largest:
                scale = self._largest
            error, upstream_error = _largest(mine - theirs), 0.0
            limit = _PLAIN_TOLERANCE[reference.dtype] * scale
        else:
            truth = torch.where(finite, truth, 0)
            scale = _largest(truth)
            if scale <= _CANCELLED * self._largest:
                scale = self._largest
            error, upstream_error = _largest(mine - truth), _largest(theirs - truth)
            ulps = _FP64_ULPS if reference.dtype is torch.float64 else _ULPS
            limit = max(_NOISE * upstream_error, reference.count * ulps * eps * scale)
            if error > limit:
                limit = max(limit, _ROUNDINGS * reference.rounding_effect(self.kind)[index])
            if error > limit and finite.all():
                limit = max(limit, _NOISE * reference.nearby_error(self.kind, index))
        scale = scale or 1.0
        self.error = max(self.error or 0.0, error / scale)
        self.upstream_error = max(self.upstream_error or 0.0, upstream_error / scale)
        if error > limit:
            return (
                f"error of {name} is {error / scale:.1e}, upstream's is {upstream_error / scale:.1e} "
                f"and at most {limit / scale:.1e} passes"
            )
        return None


def _finite_largest(tensor):
    return _largest(torch.nan_to_num(tensor.double(), 0.0, 0.0, 0.0)) if tensor.is_floating_point() else 0.0


def _largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0
