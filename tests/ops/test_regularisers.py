# SPDX-License-Identifier: Apache-2.0
"""balancer_gradient and whitening_gradient beyond the contract of every op: their formulas beside their
losses' gradients, padding, results in the place of the gradient.

Their gradients belong to no function, so no other test differentiates them.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastasr.ops import GRADIENTS, balancer_gradient, whitening_gradient
from fastasr.ops.balancer_gradient import balance_
from fastasr.ops.whitening_gradient import whiten_, whitening_metric
from fastasr.testing import Make
from fastasr.testing.samples.balancer_gradient import LIMITS, _mixed
from fastasr.testing.samples.balancer_gradient import _padded as balancer_padded
from fastasr.testing.samples.whitening_gradient import _call as whitening_call
from fastasr.testing.samples.whitening_gradient import _padded as whitening_padded
from fastasr.testing.table import table, with_tensors


def _balancer_loss(x, limits, dims):
    """Returns the loss whose gradient the balancer adds, from the formula in its docstring."""
    min_mean, max_mean, min_rms, max_rms = limits
    mu, square = x.mean(dims), (x**2).mean(dims)
    m, r = mu / (square - mu**2).sqrt(), square.sqrt()
    return (m - m.clamp(min_mean, max_mean)).abs() + (r.clamp(min_rms, max_rms) / r).log().abs()


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("limits", LIMITS)
def test_a_balancer_is_the_gradient_of_its_loss(limits, channel_dim):
    grad, x = torch.randn(2, 7, 5, 6, 5, dtype=torch.float64)
    x = (x + 0.2).requires_grad_()
    dims = [i for i in range(x.ndim) if i != channel_dim % x.ndim]
    (slope,) = torch.autograd.grad(_balancer_loss(x, LIMITS[limits], dims).sum(), x)
    rms = slope.square().mean(dims, keepdim=True).sqrt().clamp(min=1e-20)
    expected = grad + grad.abs() * slope * 0.04 / rms
    found = balancer_gradient(grad, x, *LIMITS[limits], 0.04, channel_dim)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.data())
def test_any_shape_of_a_balancer(shape, data):
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    make = Make(torch.float64)
    tensors, limits = (make.normal(*shape), make.normal(*shape)), (-9.0, 9.0, 2.0, 3.0, 0.04)
    expected = balancer_gradient.definition(*tensors, *limits, channel_dim)
    torch.testing.assert_close(balancer_gradient(*tensors, *limits, channel_dim), expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_whitening_is_the_gradient_of_the_metric(groups):
    call = whitening_call(Make(torch.float64), (20, 3, 6), groups) | {"grad_scale": 0.1}
    grad, x = call["grad"], call["x"].requires_grad_()
    (slope,) = torch.autograd.grad(whitening_metric(x, groups), x)
    found, white = whitening_gradient(**call)
    torch.testing.assert_close(found, grad + 0.1 * grad.norm() / slope.norm() * slope, rtol=1e-10, atol=1e-12)
    assert not white


def test_the_metric_of_white_data():
    q, _ = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64))
    q, _ = torch.linalg.qr(q - q.mean(0))
    assert whitening_metric(3.0 * q, 1).item() == pytest.approx(1.0, abs=1e-3)
    assert whitening_metric(q * torch.linspace(1, 4, 8, dtype=torch.float64), 1).item() > 1.3


def test_the_metric_at_its_limit():
    """The limit decides by the metric of the kernels, which is that of float64."""
    grad, x = torch.randn(2, 300, 24)
    metric = whitening_metric(x.double(), 1).item()
    for factor, expected in ((1 - 1e-5, False), (1 + 1e-5, True)):
        assert bool(whitening_gradient(grad, x, 1, factor * metric, 0.1)[1]) is expected


def test_autocast_does_not_round_the_products_of_a_whitening():
    call = whitening_padded(Make(), (40, 20))  # the formula, whose products are torch's
    expected = whitening_gradient(**call)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(whitening_gradient(**call)[0], expected, equal_nan=True)


PADDED = {
    "balancer": (balancer_gradient, lambda make: balancer_padded(make, (40, 1, 24)), -1),
    "balancer of maps": (balancer_gradient, lambda make: balancer_padded(make, (2, 5, 6, 7), 1), 1),
    "whitening": (whitening_gradient, lambda make: whitening_padded(make, (80, 1, 20), 5), -1),
}


@pytest.mark.parametrize(("op", "call", "dim"), PADDED.values(), ids=PADDED)
def test_padding_is_left_out(op, call, dim):
    """The result is that of the frames alone, and the gradient itself at padding, where nothing is read."""
    call = call(Make(torch.float64))
    mask = call.pop("padding_mask")
    call["grad"] = call["grad"].masked_fill(mask.unsqueeze(dim), math.nan)

    def result(call, **padding):
        found = op(**call, **padding)
        return found if isinstance(found, torch.Tensor) else found[0]

    found = result(call, padding_mask=mask).movedim(dim, -1)
    assert found[mask].isnan().all()
    frames = with_tensors(call, lambda _, t: t.movedim(dim, -1)[~mask])
    expected = result(frames | ({"channel_dim": -1} if dim == 1 else {}))
    torch.testing.assert_close(found[~mask], expected, rtol=1e-11, atol=1e-11)


def _copies(grad):
    """Yields copies to write to: a dense one, and rows of a wider tensor."""
    for wide in (1, 3):
        size = grad.shape[-1]
        yield torch.zeros(*grad.shape[:-1], wide * size, dtype=grad.dtype)[..., :size].copy_(grad)


ACTS = None, torch.ones(()), torch.zeros(1), torch.zeros((), dtype=torch.bool)


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_in_place_with_numbers_in_tensors(padded, dtype, act):
    make, acts = Make(dtype), act is None or bool(act)
    for dim in (1, -1):
        given = (balancer_padded if padded else _mixed)(make, (6, 8, 10), dim)
        grad, x, *numbers, _ = (given[name] for name in given if name != "padding_mask")
        mask, numbers = given.get("padding_mask"), torch.tensor(numbers)
        expected = balancer_gradient(**given) if acts else grad
        found = balancer_gradient(grad, x, channel_dim=dim, limits=numbers, act=act, padding_mask=mask)
        torch.testing.assert_close(found, expected)
        for changed in _copies(grad):
            balance_(changed, x, dim, numbers, act, mask)
            torch.testing.assert_close(changed, found)
    for limit in (1.0, 100.0):
        given = (whitening_padded if padded else whitening_call)(make, (40, 3, 20), 2) | {"limit": limit}
        grad, x, mask = given["grad"], given["x"], given.get("padding_mask")
        numbers = torch.tensor([limit, given["grad_scale"]])
        expected, white = whitening_gradient(**given) if acts else (grad, False)
        found, verdict = whitening_gradient(grad, x, 2, limits=numbers, act=act, padding_mask=mask)
        torch.testing.assert_close(found, expected)
        assert bool(verdict) == bool(white) == (acts and limit > 1.0)
        for changed in _copies(grad):
            verdict = torch.ones((), dtype=torch.bool)
            whiten_(changed, x, 2, numbers, act, verdict, mask)
            assert bool(verdict) == bool(white)
            torch.testing.assert_close(changed, found)


@pytest.mark.parametrize("name", GRADIENTS)
def test_it_is_not_differentiable(name):
    call = table(name).samples[0].arguments(Make())
    call["grad"].requires_grad_()
    y = getattr(torch.ops.fastasr, name)(**call)
    with pytest.raises(RuntimeError, match=name):
        (y if isinstance(y, torch.Tensor) else y[0]).sum().backward()


@pytest.mark.parametrize("channel_dim", [2, 1.0])
def test_a_balancers_dimension_is_checked(channel_dim):
    error = ValueError if channel_dim == 2 else TypeError
    with pytest.raises(error, match="channel_dim: expected a"):
        balancer_gradient(torch.zeros(3, 4), torch.zeros(3, 4), -1.0, 1.0, 0.0, 1.0, 0.1, channel_dim)
