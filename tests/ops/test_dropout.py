# SPDX-License-Identifier: Apache-2.0
"""Dropout with torch's draws: values, gradients and generator state equal those of torch's own function. Dropout by a
hash in linear_activation: a seed decides which elements are dropped, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from steps import cotangent
from torch.autograd import forward_ad

from fastasr.ops import _dropout, _weights_dropout, linear_activation
from fastasr.testing import seeded


def _from_seed(function, *tensors, drawn_before=0):
    """Returns (outputs and gradients, the generator's next numbers)."""
    torch.manual_seed(seeded(5))
    torch.rand(drawn_before)
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    y.backward(cotangent(y))
    return [y.detach(), *(t.grad for t in leaves)], torch.rand(3)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("drawn_before", [0, 1, 623, 700])
def test_as_torch_draws(p, drawn_before):
    x, residual = torch.randn(2, 1, 13, 53, generator=torch.Generator().manual_seed(seeded(1))).unbind(0)
    for ours, theirs, tensors in (
        (lambda x: _dropout.dropout(x, p), lambda x: F.dropout(x, p), (x,)),
        (lambda x, r: _dropout.dropout(x, p, r), lambda x, r: F.dropout(x, p) + r, (x, residual)),
    ):
        (found, after), (expected, after_theirs) = (
            _from_seed(f, *tensors, drawn_before=drawn_before) for f in (ours, theirs)
        )
        assert torch.equal(after, after_theirs)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_what_the_kernel_does_not_take_is_torchs():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(seeded(1)))
    for t in (x.t(), x.double(), x.bfloat16(), x[:0]):
        (found, after), (expected, after_theirs) = (
            _from_seed(f, t) for f in (lambda x: _dropout.dropout(x, 0.3), lambda x: F.dropout(x, 0.3))
        )
        assert torch.equal(after, after_theirs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_picked_from_a_dense_draw():
    places = torch.tensor([[0, 4, 6], [6, 6, 1]])
    torch.manual_seed(seeded(3))
    dense = F.dropout(torch.ones(5, 2, 7), 0.4)
    after = torch.rand(2)
    torch.manual_seed(seeded(3))
    picked = _dropout.windows(torch.empty(1, requires_grad=True), places, 5, 7, 0.4)
    assert not picked.requires_grad
    assert torch.equal(torch.rand(2), after)
    torch.testing.assert_close(picked, dense.gather(2, places.expand(5, -1, -1)), rtol=1e-6, atol=0)


def test_a_second_derivative():
    x = torch.randn(40, dtype=torch.float32, requires_grad=True)
    torch.manual_seed(seeded(2))
    y = _dropout.dropout(x, 0.5)
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    weights = cotangent(x)
    (second,) = torch.autograd.grad(grad, x, weights)
    torch.testing.assert_close(second, 6 * x.detach() * (y != 0) * 8 * weights)


def test_a_state_of_another_form_is_refused():
    if not _dropout._draws_are_torchs():
        pytest.skip("torch draws otherwise here")
    for state in (torch.zeros(5056, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)):
        with pytest.raises((ValueError, RuntimeError), match="generator"):
            torch.ops.fastasr_cpu.dropout_forward.default(torch.ones(4), None, state, 0.5)


def test_tangents_are_dropped_like_values():
    x, tangent = torch.randn(2, 40)
    with forward_ad.dual_level():
        torch.manual_seed(seeded(2))
        y, dy = forward_ad.unpack_dual(_dropout.dropout(forward_ad.make_dual(x, tangent), 0.5))
    torch.testing.assert_close(dy, torch.where(y == 0, 0.0, 2 * tangent))


def test_gradients_with_tangents_are_refused():
    x = torch.randn(40, requires_grad=True)
    y = _dropout.dropout(x, 0.5)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones(40), torch.ones(40))
        with pytest.raises(
            RuntimeError, match=r"fastasr\.ops\._dropout\.Dropout: not possible under forward-mode"
        ):
            torch.autograd.grad(y, x, grad)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_seed_decides_which_elements_are_dropped(dtype, gated):
    """Products of the unit matrix show the factors, forward and backward; a product with infinity, torch's rule."""
    rows, columns = 40, 2100  # more than the kernel for CPUs takes at once
    x = torch.eye(rows, dtype=dtype).reshape(4, 10, rows)
    weight, bias = torch.zeros(columns * (1 + gated), rows, dtype=dtype), torch.ones(columns * (1 + gated))
    weight, bias = weight.requires_grad_(), bias.to(dtype).requires_grad_()
    for p, seed in ((0.25, 0), (0.5, -(2**63)), (0.75, 2**63 - 1)):
        seed = torch.tensor([seed])
        options = {"dropout_p": p, "dropout_seed": seed}
        factors = _weights_dropout.kept(seed, p, 4, 10, columns).double() / (1 - p)
        y = linear_activation(x, weight, bias, "identity", gated, **options)
        dweight, dbias = torch.autograd.grad(y.sum(), (weight, bias))
        tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 0}
        torch.testing.assert_close(y.double(), factors, **tolerance)
        expected = factors.view(rows, columns).t().repeat(1 + gated, 1)
        torch.testing.assert_close(dweight.double(), expected, **tolerance)
        torch.testing.assert_close(dbias.double(), expected.sum(1), rtol=8 * tolerance["rtol"], atol=0)
        with torch.no_grad():
            infinite = linear_activation(x, weight, bias * torch.inf, "identity", gated, **options)
        assert torch.equal(infinite.isnan(), factors == 0)
        assert infinite[factors > 0].isinf().all()


def test_dropout_by_a_hash_needs_a_seed():
    x, weight = torch.ones(3, 4), torch.ones(5, 4)
    linear_activation(x, weight, dropout_p=0.0)
    with pytest.raises(ValueError, match="dropout_seed: expected a Tensor where dropout_p is more than 0"):
        linear_activation(x, weight, dropout_p=0.1)
    with pytest.raises(ValueError, match="linear_activation: dropout_p"):
        linear_activation(x, weight, dropout_p=1.0, dropout_seed=torch.tensor([1]))
