# SPDX-License-Identifier: Apache-2.0
"""Whatever selects the code of a call makes a kind of its own, whose recording no other call replays."""

import contextlib
import copy
from functools import partial

import pytest
import torch
from recorded import graphed, reasons
from steps import numbers, seeded

import fastasr


class Scaled(torch.nn.Module):
    """A product, times the factor that the call asks for, and this factor."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.linear.bias.requires_grad_(False)

    def forward(self, x, factor=2):
        return self.linear(x) * factor, factor


def features(seed=1):
    return torch.randn(5, 4, generator=numbers(seed), dtype=torch.float32)


def call(model, setting=contextlib.nullcontext, grad=False, x=features, factor=2):
    with torch.set_grad_enabled(grad), setting():
        y, given = model(x(), factor)
    return y.detach(), y.requires_grad, y.is_inference(), given, type(given)


@contextlib.contextmanager
def called(change, value, before):
    change(value)
    try:
        yield
    finally:
        change(before)


def having(owner, name, value):
    return called(partial(setattr, owner, name), value, getattr(owner, name))


def trained(model, bias):
    """Calls the module with a bias that needs a gradient, or needs none."""
    model.linear.bias.requires_grad_(bias)
    return call(model, grad=True)


def under(setting, *values):
    return partial(call, setting=partial(setting, *values))


def under_each(setting, *values):
    return [under(setting, value) for value in values]


cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
PAIRS = {
    "autocast": (call, under(torch.autocast, "cpu", torch.bfloat16)),
    "dtype of autocast": under_each(partial(torch.autocast, "cpu"), torch.bfloat16, torch.float16),
    "backend": (call, under(fastasr.backend, "auto")),
    "upstream's draws": (call, under(fastasr.upstream_draws)),
    "deterministic algorithms": (call, under(called, torch.use_deterministic_algorithms, True, False)),
    "default dtype": (call, under(called, torch.set_default_dtype, torch.float64, torch.float32)),
    "precision of products": under_each(partial(having, matmul, "fp32_precision"), "ieee", "tf32"),
    "precision of convolutions": under_each(partial(having, cudnn.conv, "fp32_precision"), "ieee", "tf32"),
    "TF32 in cuDNN": under_each(partial(having, cudnn, "allow_tf32"), False, True),
    "deterministic cuDNN": under_each(partial(having, cudnn, "deterministic"), False, True),
    "cuDNN": under_each(partial(having, cudnn, "enabled"), False, True),
    "cuDNN that tries its kernels": under_each(partial(having, cudnn, "benchmark"), False, True),
    "inference mode": (call, under(torch.inference_mode)),
    "gradients": (call, partial(call, grad=True)),
    "a parameter that is unfrozen": [partial(trained, bias=bias) for bias in (False, True)],
    "gradients of the input": (
        partial(call, grad=True),
        partial(call, grad=True, x=lambda: features().requires_grad_()),
    ),
    "strides of the input": (call, partial(call, x=lambda: features().t().contiguous().t())),
    "an int and a float": [partial(call, factor=factor) for factor in (1, 1.0)],
    "an int and a bool": [partial(call, factor=factor) for factor in (1, True)],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_kind_of_its_own(pair):
    seeded(0)
    ours = Scaled()
    theirs = copy.deepcopy(ours)
    graphs = graphed(ours, after=0)
    for run in 2 * (*PAIRS[pair],):
        (y, *found), (expected, *rest) = run(ours), run(theirs)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        assert found == rest
    assert not reasons(graphs)
    assert [(kind.seen, kind.recorded, kind.replayed) for kind in graphs.kinds.values()] == [(2, 1, 2)] * 2


def test_gradients_of_inputs_are_kept():
    """The next step overwrites the buffer in which a replay leaves them."""
    seeded(0)
    ours = Scaled()
    theirs = copy.deepcopy(ours)
    graphs = graphed(ours, after=0)

    def gradient(model, seed):
        x = features(seed).requires_grad_()
        return torch.autograd.grad((model(x)[0] ** 2).sum(), x)[0]

    found = [gradient(ours, seed) for seed in (1, 2)]
    for seed, g in zip((1, 2), found, strict=True):
        torch.testing.assert_close(g, gradient(theirs, seed))
    (kind,) = graphs.kinds.values()
    assert kind.replayed == 2
