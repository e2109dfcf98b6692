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

"Upstream's own code" is the user's module as it is, with the forwards, hooks, parametrizations and adapters that the
user gave to modules inside. The fp64 run therefore takes place in the module itself, whose tensors are exchanged for
fp64 ones meanwhile: a copy of the module would lack what a forward or a hook holds in its variables. Each of the four
forwards, and each in fp64, starts from the same state (:class:`ModelState`): that in which the model reached the
module, then ``module.train(...)`` where the pass needs the other mode. Setting the ``training`` flags alone would give
a module in which no user's model ever is, such as an adapter that is merged into its weight in training; what
``train`` writes is undone like everything else.

If no fp64 run is possible, the two are compared with each other, with a tolerance for their dtype, and the report says
so; there a result is zero except for rounding if it is a few units in the last place of the largest of the others.
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
from fastasr.swap.reach import Reach
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

    Afterwards the model, the inputs, random states and torch's modes are the same to the bit, whatever the model's code
    does and whether it raises an exception. If the model cannot run the inputs on upstream's code, its exception is
    passed on.
    """
    return verified(model, inputs, gradients, rollback)


def verified(model, inputs, gradients=True, rollback=True, whole=None):
    """Does what ``verify`` does. ``whole``: an earlier state of the model, whose copies of parameters serve again."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"verify: model must be a torch.nn.Module, got {type(model).__name__}")
    report = SwapReport(type(model).__name__, verified=True)
    swapped = list(swapped_modules(model))
    exact = _reduced_weights.suspended()  # the swap is right in float32; weights= bounds its own error
    unnoted = _left.ignored()
    given = () if callable(inputs) else (inputs,)
    state = ModelState(model, *given, whole=whole)
    with _released(swapped), state, _no_compilation(), exact, padded(), unnoted, torch.no_grad():
        checks = _Checks(_PASSES if gradients else _PASSES[:1], state)
        probes = [
            [_Probe(module, rule, name, checks) for name in ("forward", *rule.compared)]
            for _, module, rule in swapped
        ]
        for _, module, rule in swapped:
            for name, _ in rule.methods:
                if name not in rule.compared and binding.bound_function(module, name) is not None:
                    del vars(module)[name]
        for probe in itertools.chain(*probes):
            probe.attach()
        run(model, inputs)
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
def _released(swapped):
    """Frees at the end what our forwards keep for the modules: they made some of it from weights that were restored."""
    try:
        yield
    finally:
        for _, module, rule in swapped:
            rule.release(module)


@contextlib.contextmanager
def _no_compilation():
    """Runs upstream's inner torch.compile functions as plain Python, which saves 20 s of compilation."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Checks:
    """What the probes of one verification share: the passes, the state of the model before it, and ``side``, which says
    whose forward a probe runs when called."""

    def __init__(self, passes, state):
        self.passes, self.state = passes, state
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

    def upstream(self, *args, **kwargs):
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        if self.checks.side == "ours":
            return self.ours(*args, **kwargs)
        if self.checks.side == "capture" and self.errors is None and self.failure is None:
            state = ModelState(self.module, args, kwargs, whole=self.checks.state)
            self.failure = self._compare(args, kwargs, state)
        return self.upstream(*args, **kwargs)

    def _compare(self, args, kwargs, state):
        """Returns why fastasr and upstream disagree on this call, or None. It fills ``errors``."""
        self.errors = {}
        impossible, notes = [], []
        for name in self.checks.passes:
            training = name == "training"
            if training and _holds_shards(self.module):
                impossible.append(
                    "training: it holds modules of FSDP2, whose backward reshards the whole model"
                )
                continue
            calls = [_Call(self, state, args, kwargs, training, draw) for draw in range(3 if training else 1)]
            try:
                reason = self._run_both(calls[0])
                # of one gradient of the output a sum may lose more by its order than in hundreds of others
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

    def _run_both(self, call):
        """Returns why fastasr and upstream disagree on this call, or None. Raises _UpstreamRaises if upstream cannot
        run.
        """
        try:
            upstream = call.run("upstream", self.upstream)
        except Exception as error:
            raise _UpstreamRaises(f"{type(error).__name__}: {error}") from error
        try:
            ours = call.run("upstream" if self.rule.shallow else "ours", self.ours)
        except Exception as error:
            return f"fastasr raises {type(error).__name__}: {error}"
        return self._judge(ours, upstream, _Reference(call, upstream))

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


class _Call:
    """A call of a probe's method in one pass, which runs any number of times from the state in which the model made it.
    ``draw`` numbers the random gradient of the output. ``without_fp64`` says why it has no run in fp64."""

    def __init__(self, probe, state, args, kwargs, training, draw):
        self.probe, self.state, self.inputs = probe, state, (args, kwargs)
        self.training, self.draw = training, draw
        self.without_fp64 = None

    def run(self, side, forward, prepare=None, roundings=None):
        """Runs ``forward``. ``side`` says whose forward runs in the swapped submodules. When module and inputs are in
        the state to run in, ``prepare`` takes the inputs, and a stack for contexts of the run, and returns the inputs
        to run on."""
        module, shared = self.probe.module, self.probe.rule.shared
        with self.state, self.probe.checks.run_as(side), upstream_draws(), contextlib.ExitStack() as stack:
            if module.training is not self.training:
                module.train(self.training)
            args, kwargs = self.inputs if prepare is None else prepare(self.inputs, stack)
            outcome = _replay(module, forward, args, kwargs, self.training, shared, self.draw, roundings)
            outcome.random = RandomState()
        return outcome


def _holds_shards(module):
    return any(upstream_class(part) is not type(part) for part in module.modules() if part is not module)


class _Outcome:
    """The result of one run. ``values``: the output tensors; ``gradients``: those of the inputs, then of the
    parameters, with names."""

    def __init__(self, values, gradients):
        self.values, self.gradients = values, gradients
        self.random = None

    def has_shapes_of(self, other):
        def shapes(outcome):
            return [None if t is None else t.shape for _, t in (*outcome.values, *outcome.gradients)]

        return shapes(self) == shapes(other)


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
    # Copies, as an output may be memory that is restored: of an input that was changed in place, or of a buffer.
    return _Outcome([(name, t.detach().clone()) for name, t in values], gradients)


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
        seed = torch.randn(t.shape, generator=generator, dtype=torch.float32, device="cpu").to(
            t.device, t.dtype
        )
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
    """Upstream's code in fp64, for a call that gave ``upstream`` in its own precision."""

    def __init__(self, call, upstream):
        probe, self.call = call.probe, call
        self.count, self.nearby, self.outcome, self.rounded = probe.count, None, None, None
        tensors = [t for t in tree_flatten(call.inputs)[0] if isinstance(t, torch.Tensor)]
        floating = [t.dtype for t in [*tensors, *probe.module.parameters()] if t.is_floating_point()]
        self.dtype = min(floating, key=lambda d: -torch.finfo(d).eps, default=torch.float32)
        if _holds_shards(probe.module):
            call.without_fp64 = "FSDP2 keeps its parameters"
            return
        try:
            self.outcome = self._replay(None)
        except Exception as error:  # an extension without fp64, fp32 tensors that are not exchanged
            call.without_fp64 = f"{type(error).__name__}: {error}".partition("\n")[0]
            return
        if not self.outcome.has_shapes_of(upstream):
            self.outcome, call.without_fp64 = None, "it gives results of other shapes"

    def _to_fp64(self, roundings):
        """Exchanges every floating tensor of the module's state for one in fp64, and empties caches."""
        rules = rules_by_forward()
        for part in self.call.probe.module.modules():
            rule = rules.get(binding.bound_forward(part))
            if rule is not None:
                rule.empty_caches(part)
        twins = {}

        def twin(value):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            if id(value) not in twins:
                twins[id(value)] = _in_fp64(value, roundings)
            return twins[id(value)]

        Reach((self.call.probe.module,), self.call.state.reach.outside).exchange(twin)

    def _replay(self, roundings):
        def prepare(inputs, stack):
            self._to_fp64(roundings)
            inputs = _mapped(_double, inputs)
            if roundings is not None:
                inputs = tree_map(roundings, inputs)
            devices = [t.device.type for t in tree_flatten(inputs)[0] if isinstance(t, torch.Tensor)]
            autocast = torch.autocast(next(iter(devices), "cpu"), enabled=False)
            for mode in (_DrawInLowPrecision(self.dtype), autocast, StayInFp64()):
                stack.enter_context(mode)
            return inputs

        return self.call.run("upstream", self.call.probe.upstream, prepare, roundings)

    def of(self, kind):
        """Returns the list of named fp64 tensors, or None without a reference."""
        return None if self.outcome is None else getattr(self.outcome, kind)

    def rounding_effect(self, kind):
        """Returns the largest change of each tensor when inputs, parameters and output gradient are rounded once."""
        if self.rounded is None:
            generator = torch.Generator().manual_seed(1)
            self.rounded = self._replay(functools.partial(_moved, generator, torch.finfo(self.dtype).eps / 2))
        pairs = zip(getattr(self.rounded, kind), getattr(self.outcome, kind), strict=True)
        return [0.0 if b is None else _largest(a - b) for (_, a), (_, b) in pairs]

    def nearby_error(self, kind, index):
        """Returns the largest error of one tensor of upstream's code, in its own precision, over inputs that differ in
        the last bit."""
        if self.nearby is None:
            generator, call = torch.Generator().manual_seed(2), self.call
            moved = functools.partial(_moved, generator, None)
            self.nearby = []
            for _ in range(_NEARBY):
                run = call.run("upstream", call.probe.upstream, lambda inputs, _: tree_map(moved, inputs))
                self.nearby.append(run)
        exact = getattr(self.outcome, kind)[index][1]
        found = (getattr(run, kind)[index][1] for run in self.nearby)
        return max(_largest(tensor.double() - exact) for tensor in found)


def _double(value):
    return value.detach().double() if value.is_floating_point() else value


def _in_fp64(tensor, roundings):
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


def _moved(generator, step, value):
    """Returns a floating tensor whose elements are up or down by the relative ``step``, else that of its dtype."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    step = torch.finfo(value.dtype).eps if step is None else step
    signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int64, device="cpu")
    signs = signs.to(value.device, value.dtype)
    return value.detach() * (1 + step * (2 * signs - 1))


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
