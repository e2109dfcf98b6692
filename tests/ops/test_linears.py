# SPDX-License-Identifier: Apache-2.0
"""Linear layers of one input in a recorded pass (fastasr/ops/_linears.py)."""

from types import SimpleNamespace

import pytest
import torch
from steps import numbers

from fastasr.ops import _linears

KERNELS = SimpleNamespace(later=None)


def operands(dtype, biases=True):
    def normal(*shape):
        return torch.randn(*shape, generator=numbers(0), dtype=torch.float64).to(dtype).requires_grad_()

    layers = [(normal(n, 5), normal(n) if biases else None) for n in (4, 6, 3)]
    return normal(2, 7, 5), [t for layer in layers for t in layer]


def one_by_one(x, *parameters):
    pairs = zip(parameters[::2], parameters[1::2], strict=True)
    return tuple(torch.nn.functional.linear(x, *pair) for pair in pairs)


@pytest.mark.parametrize("biases", [True, False])
def test_gradients(biases):
    x, parameters = operands(torch.float64, biases)

    def apply(x, *parameters):
        return _linears._Linears.apply(KERNELS, x, *parameters)

    for found, expected in zip(apply(x, *parameters), one_by_one(x, *parameters), strict=True):
        assert torch.equal(found, expected)
    torch.autograd.gradcheck(apply, (x, *parameters))


@pytest.mark.parametrize("used", [(0,), (1, 2)])
def test_layers_that_nobody_uses_have_no_gradient(used):
    x, parameters = operands(torch.float64)
    found = _linears._Linears.apply(KERNELS, x, *parameters)
    grads = torch.autograd.grad(sum(found[i].sin().sum() for i in used), (x, *parameters), allow_unused=True)
    expected = torch.autograd.grad(
        sum(one_by_one(x, *parameters)[i].sin().sum() for i in used), (x, *parameters), allow_unused=True
    )
    for a, b in zip(grads, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_sums_are_as_near_to_float64_as_autograds():
    x, parameters = operands(torch.bfloat16)

    def gradient(run, x, *parameters):
        return torch.autograd.grad(sum((y.double() ** 2).sum() for y in run(x, *parameters)), x)[0].double()

    wide = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    exact = gradient(one_by_one, *wide)
    ours = gradient(lambda *all: _linears._Linears.apply(KERNELS, *all), x, *parameters)
    theirs = gradient(one_by_one, x, *parameters)
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_outside_of_a_recording_layers_run_one_by_one():
    x, parameters = operands(torch.float32)
    assert _linears.linears(x, [*zip(parameters[::2], parameters[1::2], strict=True)]) is None
