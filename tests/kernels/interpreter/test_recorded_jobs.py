# SPDX-License-Identifier: Apache-2.0
"""A recorded pass whose Balancers, Whitens, limits, and gradients of biases and norms take few launches gives what it
gives when each call is served by itself, bit for bit. Launches lie on the tape, which runs none of them while it
records.
"""

import random

import pytest
import torch
from torch import nn

from fastasr import backend, ops
from fastasr._recording import recording
from fastasr.kernels import _jobs, _parts
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.parameter_limits import limit_param_value
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops import _linear
from tests.graphs.recorded import graphed, reasons

WIDTH = 32


class Branch(nn.Module):
    def __init__(self, shares=False):
        super().__init__()
        self.shares = shares
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=not shares)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.balancer = Balancer(WIDTH, -1, min_abs=2.0, prob=0.5)
        self.whiten = Whiten(1, 1.01, prob=0.5, grad_scale=0.1)
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.2))

    def forward(self, x):
        bias, last = self.first.bias, self.last.bias
        if self.shares:
            bias = last = bias.to(torch.bfloat16)  # one cast, which two products read
        linear = ops.linear if recording() else nn.functional.linear  # as unrecorded calls on a GPU
        x = self.whiten(self.balancer(linear(x, self.first.weight, bias)))
        x = x * limit_param_value(self.scale, 0.8, 1.0)
        one, *two = ((norm.weight, norm.bias) for norm in self.norms)
        stream, update = ops.add_norm(x.float(), x, *one)
        x = sum(ops.add_two_norms(stream, update, *two[0], *two[1]))
        x = ops.linear_activation(x, self.middle.weight, self.middle.bias)
        return ops.swoosh_linear(x, self.last.weight, last)


@pytest.fixture(autouse=True)
def _on_the_tape(launches_on_the_tape, monkeypatch):
    monkeypatch.setattr(_linear, "MANY_ROWS", 0)


def steps(module, count=4):
    """Yields the output and the gradients of some steps, in which regularisers act or not."""
    random.seed(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(70, 2, WIDTH, generator=generator).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        grad = torch.randn(y.shape, generator=generator).to(y.dtype)
        # the next step writes over these gradients
        yield y, *(t.clone() for t in torch.autograd.grad(y, [x, *module.parameters()], grad))


def found(monkeypatch, together, shares=False):
    """Returns the tensors of recorded steps, the reasons against recording them, and the launches for many calls."""
    launches = []
    with monkeypatch.context() as patch, backend("triton"):
        fits, run = _jobs.fits, _jobs.run
        patch.setattr(_jobs, "fits", lambda x: together and fits(x))
        patch.setattr(_jobs, "run", lambda kernel, *a, **o: launches.append(kernel) or run(kernel, *a, **o))
        if not shares:
            # no sum of a parameter has a launch of its own
            for name in ("add_parts_kernel", "add_pair_kernel"):
                patch.setattr(_parts, name, None)
        torch.manual_seed(0)
        module = Branch(shares)
        graphs = graphed(module, after=0)
        return [t for step in steps(module) for t in step], reasons(graphs), launches


def test_they_are_those_of_each_call(monkeypatch):
    (ours, none, launches), (alone, *_, of_bias) = found(monkeypatch, True), found(monkeypatch, False)
    assert none == []
    assert len(launches) == 16  # six kernels in a rehearsal and in the recording, and two of the casts
    assert len(of_bias) == 10
    for a, b in zip(ours, alone, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_they_are_near_those_of_unrecorded_steps(monkeypatch):
    torch.manual_seed(0)
    with backend("triton"):
        expected = [t for step in steps(Branch()) for t in step]
    for a, b in zip(found(monkeypatch, True)[0], expected, strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


@pytest.mark.parametrize("together", [False, True])
def test_a_bias_of_two_products(together, monkeypatch):
    """Autograd adds up both gradients in the middle of the pass, so neither may come later."""
    assert found(monkeypatch, together, shares=True)[1] == ["a parameter has two gradients"]
