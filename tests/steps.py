# SPDX-License-Identifier: Apache-2.0
"""A training step of a module with its random draws, its kernels, and the comparison of two modules' steps."""

import contextlib
import copy
import functools
import random
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastasr
from fastasr.testing import seeds


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seeded(seed):
    """Seeds all random numbers with the run's seed and this one."""
    random.seed(seeds.seeded(seed))
    seeds.seed_torch(seeds.seeded(seed))


def fixed(seed):
    """Seeds all random numbers, alike in every run."""
    random.seed(seed)
    seeds.seed_torch(seed)


def numbers(seed):
    """Returns a generator of random numbers, seeded with the run's seed and this one."""
    return torch.Generator().manual_seed(seeds.seeded(seed))


def cotangent(y, seed="cotangent"):
    """Returns random numbers of y's shape and dtype, alike in every call of a run. Behind a norm or a softmax the sum
    of the squares, or of the elements, has no gradient.
    """
    return torch.randn(y.shape, generator=numbers(seed), dtype=torch.float64).to(y.dtype)


def draws():
    return random.getstate(), torch.get_rng_state().tolist()


def moved(model, scale, seed=None):
    """Returns the model with noise on every parameter, so that none is at an initial 0, 0.5 or identity."""
    generator = None if seed is None else numbers(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def set_batch_count(model, count):
    """Sets the batch count, and the modules' names, as icefall's train.py does. Returns the model."""
    for name, module in model.named_modules():
        if hasattr(module, "batch_count"):
            module.batch_count = count
        if hasattr(module, "name"):
            module.name = name
    return model


def maker(make):
    """Makes a function of options that returns ``make`` with them, to be called without arguments."""

    @functools.wraps(make)
    def of_options(*args, **options):
        return functools.partial(make, *args, **options)

    return of_options


def swapped(model, **options):
    """Returns a copy of the model, swapped."""
    copied = copy.deepcopy(model)
    fastasr.accelerate(copied, **options)
    return copied


def close(actual, expected, tolerance=2e-5, what="", least=1e-12):
    """Asserts that the largest difference is at most ``tolerance`` times the largest magnitude, or times ``least``: of
    tensors, or of each of several."""
    if not isinstance(expected, torch.Tensor):
        for one, other in zip(actual, expected, strict=True):
            close(one, other, tolerance, what, least)
        return
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    if expected.numel():
        error = ((actual - expected).abs().max() / expected.abs().max().clamp_min(least)).item()
        assert error <= tolerance, f"{what}: relative error {error:.2e}"


def as_near(actual, expected, exact, factor=1.25):
    """Asserts that the error of ``actual`` against ``exact`` is at most ``factor`` times that of ``expected``."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error, allowed = ((t.double() - exact).norm().item() for t in (actual, expected))
    assert error <= factor * allowed, f"an error of {error:.2e}, upstream's is {allowed:.2e}"


def step(module, *inputs, seed=0, **options):
    """Returns output and gradients of inputs and parameters by name, and the random states afterwards."""
    seeded(seed)
    leaves = [x.detach().clone().requires_grad_() if _has_gradient(x) else x for x in inputs]
    module.zero_grad()
    y = module(*leaves, **options)
    y = y if isinstance(y, torch.Tensor) else y[0]
    y.backward(cotangent(y))
    named = {f"input {i}": x.grad for i, x in enumerate(leaves) if _has_gradient(x)}
    return {"y": y.detach()} | named | {name: p.grad for name, p in module.named_parameters()}, draws()


def gradients_by_name(model, loss, x=None):
    """Returns the gradients of the parameters and of the input x if given, 0 where the loss does not depend on one."""
    leaves = dict(model.named_parameters()) | ({} if x is None else {"x": x})
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def outcome(model, call, training):
    """Returns what ``step`` does, of ``call(model)[0]`` and without inputs; in eval mode without gradients."""
    model.train(training).zero_grad()
    seeded("call")
    with torch.set_grad_enabled(training):
        y = call(model)[0]
        if training:
            y.backward(cotangent(y))
    gradients = {name: p.grad for name, p in model.named_parameters()} if training else {}
    return {"y": y.detach()} | gradients, draws()


def same_step(ours, theirs, *inputs, tolerance, seed=0, share=0.0, **options):
    """Asserts that two modules' steps have the same values, gradients and draws, as ``same``."""
    results = (step(module, *inputs, seed=seed, **options) for module in (ours, theirs))
    same(*results, tolerance, share)


def same(found, expected, tolerance, share=0.0):
    """Asserts that two results of ``step`` or ``outcome`` agree. The least size by which errors of gradients are
    measured is a ``share`` of the largest gradient: some are sums that cancel to errors of rounding."""
    (found, states), (expected, expected_states) = found, expected
    assert states == expected_states
    assert found.keys() == expected.keys()
    gradients = (g for name, g in expected.items() if name != "y" and g is not None)
    largest = max((g.abs().max().item() for g in gradients), default=0.0)
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            close(found[name], value, tolerance, name, 1e-12 if name == "y" else max(1e-12, share * largest))


def relative(found, exact):
    """Returns the error's norm, relative to that of the exact values."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).item()


def same_gradients(found, expected, tolerance=1e-10):
    """Asserts that gradients by name agree in float64, relative to the largest."""
    assert found.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < tolerance * largest, name


def as_on_cpu(results, *names):
    """Asserts that a GPU computes as the CPU does: in float32 the errors of ``names`` are near the CPU's, and all
    tensors near float64's, relative to the largest; with autocast "y" is near it too. ``results(device, dtype)``
    returns "y" and the gradients by name.
    """
    kinds = ("cuda", torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)
    found, expected, exact = (results(*kind) for kind in kinds)
    for name in names:
        as_near(found[name], expected[name], exact[name], 2.0)
    largest = max(g.abs().max() for g in exact.values())
    for name, value in exact.items():
        assert (found[name] - value).abs().max() < 1e-5 * largest, name
    with torch.autocast("cuda", torch.bfloat16):
        half = results("cuda", torch.float32)
    assert (half["y"] - exact["y"]).norm() < 0.02 * exact["y"].norm()


def same_tree(ours, theirs):
    """Asserts that modules, parameters and states have the same names, order, classes' names and values."""

    def tree(model):
        return [(name, type(module).__name__) for name, module in model.named_modules()]

    assert tree(ours) == tree(theirs)
    # ScaledAdam groups parameters, and checkpoints of optimizers number them, in this order.
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    same_state(ours, theirs)


def same_state(ours, theirs, but=()):
    """Asserts that states are equal, except for names that end in one of ``but``, and load into each other."""
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert name.endswith(tuple(but)) or torch.equal(state[name], value), name
    for one, other in ((ours, theirs), (theirs, ours)):
        other.load_state_dict(moved(one, 0.05).state_dict(), strict=True)


def _has_gradient(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


class Calls(TorchDispatchMode):
    """Counts the operator calls that reach a backend, by name, and among them those in which a GPU computes."""

    def __init__(self):
        super().__init__()
        self.found, self.kernels = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function._schema.name] += 1
        self.kernels += is_kernel(function._schema)
        return function(*args, **(kwargs or {}))


@functools.cache
def is_kernel(schema):
    """Says whether a GPU computes something in calls of this operator."""
    aliases = [result.alias_info for result in schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    name = schema.name.partition("::")[2]
    return not is_view and "empty" not in name and name not in ("detach", "promote_types", "_unsafe_view")
