# SPDX-License-Identifier: Apache-2.0
"""Bypass kernels in the interpreter against float64."""

import pytest
import torch

from fastasr.kernels.bypass import DTYPES, bypass_backward, bypass_forward
from fastasr.testing.tolerance import compare

# (shape, shape of scale)
CASES = [
    ((1, 1), (1,)),
    ((40,), (40,)),
    ((7, 5), (5,)),
    ((70, 32), (32,)),
    ((9, 4, 192), (192,)),
    ((9, 4, 192), (4, 192)),
    ((33, 300), (300,)),
    ((2, 3, 5), (2, 3, 5)),
]


def _inputs(shape, scale_shape, dtype):
    torch.manual_seed(0)
    x_orig, x, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    return grad, x_orig, x, torch.rand(scale_shape).to(dtype)


def _gradients(grad, x_orig, x, scale):
    leaves = [t.clone().requires_grad_() for t in (x_orig, x, scale)]
    y = leaves[0] + (leaves[1] - leaves[0]) * leaves[2]
    return (y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype)))


def _run(grad, x_orig, x, scale):
    return (bypass_forward(x_orig, x, scale), *bypass_backward(grad, x_orig, x, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "scale_shape"), CASES, ids=str)
def test_error_is_not_above_that_of_eager(shape, scale_shape, dtype):
    arguments = _inputs(shape, scale_shape, dtype)
    eager, truth = _gradients(*arguments), _gradients(*(t.double() for t in arguments))
    for name, a, e, t in zip(("y", "dx_orig", "dx", "dscale"), _run(*arguments), eager, truth, strict=True):
        assert a.dtype == dtype
        comparison = compare(a, e, t)
        # The interpreter adds up a column one by one, the compiled kernel by halves.
        sequential = name == "dscale" and comparison.worst < 4 * comparison.eps
        assert comparison.ok or sequential, f"{name}: {comparison}"


def test_mixed_types():
    """With x_orig in float32 and x in bfloat16, as under autocast, each gradient has its tensor's type."""
    grad, x_orig, x, scale = _inputs((9, 4, 192), (192,), torch.float32)
    x = x.bfloat16()
    truth = _gradients(*(t.double() for t in (grad, x_orig, x, scale)))
    found = _run(grad, x_orig, x, scale)
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    for a, t, bound in zip(found, truth, (1e-6, 1e-6, 4e-3, 1e-6), strict=True):
        assert (a.double() - t).abs().max() / t.abs().max() < bound


def test_rows_are_dealt_to_parts_completely():
    arguments = _inputs((9000, 3, 24), (3, 24), torch.float32)
    truth = _gradients(*(t.double() for t in arguments))
    for a, t in zip(_run(*arguments), truth, strict=True):
        assert (a - t).abs().max() / t.abs().max() < 3e-6


def test_scale_of_zero_and_one_select_exactly():
    grad, x_orig, x, _ = _inputs((6, 40), (40,), torch.float32)
    for value, chosen in ((0.0, x_orig), (1.0, None)):
        scale = torch.full((40,), value)
        y, dx_orig, dx, _ = _run(grad, x_orig, x, scale)
        if chosen is not None:
            assert torch.equal(y, chosen)
        assert torch.equal(dx, grad * value)
        assert torch.equal(dx_orig, grad * (1.0 - value))


def test_special_values():
    x_orig = torch.tensor([[float("inf"), 1.0, float("nan"), 2.0, float("-inf")]])
    x = torch.tensor([[1.0, float("inf"), 1.0, 3.0, float("-inf")]])
    scale = torch.full((5,), 0.25)
    torch.testing.assert_close(
        bypass_forward(x_orig, x, scale), x_orig + (x - x_orig) * scale, equal_nan=True
    )


@pytest.mark.parametrize(("shape", "scale_shape"), [((0, 8), (8,)), ((3, 0, 8), (8,)), ((3, 0, 8), (0, 8))])
def test_empty(shape, scale_shape):
    x, scale = torch.empty(shape), torch.ones(scale_shape)
    y, dx_orig, dx, dscale = _run(x, x, x, scale)
    assert y.shape == dx_orig.shape == dx.shape == shape
    assert torch.equal(dscale, torch.zeros(scale_shape))


def test_repeats_bit_for_bit():
    arguments = _inputs((700, 48), (48,), torch.float32)
    for a, b in zip(_run(*arguments), _run(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("shape", "scale_shape"), CASES, ids=str)
def test_no_address_is_stored_twice(shape, scale_shape, writes):
    grad, x_orig, x, scale = _inputs(shape, scale_shape, torch.float32)
    bypass_forward(x_orig, x, scale)
    assert writes.count == x.numel()
    bypass_backward(grad, x_orig, x, scale)
    assert writes.clashes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "scale_shape"), CASES, ids=str)
def test_no_read_past_the_end(shape, scale_shape, dtype, guarded):
    arguments = _inputs(shape, scale_shape, dtype)
    for a, b in zip(_run(*arguments), _run(*map(guarded, arguments)), strict=True):
        assert torch.equal(a, b)
