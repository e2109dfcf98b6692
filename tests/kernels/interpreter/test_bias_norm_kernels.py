# SPDX-License-Identifier: Apache-2.0
"""BiasNorm kernels in the interpreter against float64."""

import pytest
import torch

from fastasr.kernels.bias_norm import DTYPES, MAX_CHANNELS, bias_norm_backward, bias_norm_forward
from fastasr.testing.tolerance import compare

SHAPES = [(1, 1), (40,), (3, 7), (9, 2, 16), (5, 4, 192), (11, 193), (6, 513), (3, 2048), (2, 5000)]


def _formula(x, bias, log_scale):
    return x * (((x - bias) ** 2).mean(-1, keepdim=True) ** -0.5 * log_scale.exp())


def _inputs(shape, dtype, parameters=None):
    torch.manual_seed(0)
    parameters = parameters or dtype
    x, bias = torch.randn(shape).to(dtype), (torch.randn(shape[-1]) * 0.1).to(parameters)
    output = torch.promote_types(dtype, parameters)
    return x, bias, torch.tensor(0.3).to(parameters), torch.randn(shape).to(output)


def _gradients(x, bias, log_scale, grad):
    leaves = [t.clone().requires_grad_() for t in (x, bias, log_scale)]
    y = _formula(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype)))


def _run(x, bias, log_scale, grad):
    return (bias_norm_forward(x, bias, log_scale), *bias_norm_backward(grad, x, bias, log_scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_not_above_that_of_eager(shape, dtype):
    arguments = _inputs(shape, dtype)
    eager, truth = _gradients(*arguments), _gradients(*(t.double() for t in arguments))
    for name, a, e, t in zip(("y", "dx", "dbias", "dlog_scale"), _run(*arguments), eager, truth, strict=True):
        assert a.dtype == dtype
        comparison = compare(a, e, t)
        # All elements of a row share the error of its scale, so few rows are few samples of it.
        few = t.numel() == 1 or t.numel() < 16 * shape[-1]
        assert comparison.ok or (few and comparison.worst < 3 * comparison.eps), f"{name}: {comparison}"


def test_mixed_types():
    """With x in bfloat16 and parameters in float32 the output is float32, and nothing is rounded on the
    way.
    """
    x, bias, log_scale, grad = _inputs((5, 4, 192), torch.bfloat16, torch.float32)
    truth = _gradients(*(t.double() for t in (x, bias, log_scale, grad)))
    y, dx, dbias, dlog_scale = _run(x, bias, log_scale, grad)
    assert (y.dtype, dx.dtype, dbias.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for a, t in zip((y, dx.float(), dbias, dlog_scale), truth, strict=True):
        error = (a - t).abs().max() / t.abs().max()
        assert error < (4e-3 if a is not y and a.shape == x.shape else 2e-6)


def test_rows_are_dealt_to_parts_completely():
    """With more rows than parts, every row counts once in the parameters' gradients."""
    x, bias, log_scale, grad = _inputs((4101, 24), torch.float32)
    truth = _gradients(*(t.double() for t in (x, bias, log_scale, grad)))
    for a, t in zip(_run(x, bias, log_scale, grad), truth, strict=True):
        assert (a - t).abs().max() / t.abs().max() < 3e-6


def test_special_values():
    """A row equal to the bias has no norm; NaN and infinity stay in their row, in y and in dx."""
    x = torch.ones(5, 8)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    x[3] = torch.arange(8.0)
    bias, log_scale, grad = torch.ones(8), torch.tensor(0.5), torch.ones(5, 8)
    y, dx, _, _ = _run(x, bias, log_scale, grad)
    expected, expected_dx, _, _ = _gradients(x, bias, log_scale, grad)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert torch.isfinite(y[3]).all()
    assert torch.isfinite(dx[3]).all()
    torch.testing.assert_close(dx[3], expected_dx[3])
    zero_bias = bias_norm_backward(grad[:1], x[3:4], torch.zeros(8), log_scale)
    assert all(torch.isfinite(t).all() for t in zero_bias), "rows beyond the last must not be divided by zero"


@pytest.mark.parametrize("value", [-200.0, -90.0, 0.0, 60.0, 88.0, 90.0, float("inf"), float("nan")])
def test_log_scale_over_its_range(value):
    x, bias, _, _ = _inputs((2, 16), torch.float32)
    y = bias_norm_forward(x, bias, torch.tensor(value))
    torch.testing.assert_close(
        y, _formula(x, bias, torch.tensor(value)), equal_nan=True, rtol=1e-5, atol=1e-38
    )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty(shape):
    x, bias, log_scale = torch.empty(shape), torch.ones(8), torch.tensor(0.1)
    y, dx, dbias, dlog_scale = _run(x, bias, log_scale, x)
    assert y.shape == dx.shape == shape
    assert torch.equal(dbias, torch.zeros(8))
    assert dlog_scale == 0


def test_repeats_bit_for_bit():
    arguments = _inputs((700, 48), torch.float32)
    for a, b in zip(_run(*arguments), _run(*arguments), strict=True):
        assert torch.equal(a, b)


def test_too_many_channels():
    x = torch.empty(1, MAX_CHANNELS + 1)
    with pytest.raises(ValueError, match="channels"):
        bias_norm_forward(x, x[0], torch.tensor(0.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_address_is_stored_twice(shape, writes):
    x, bias, log_scale, grad = _inputs(shape, torch.float32)
    bias_norm_forward(x, bias, log_scale)
    assert writes.count == x.numel()
    bias_norm_backward(grad, x, bias, log_scale)
    assert writes.clashes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_read_past_the_end(shape, dtype, guarded):
    arguments = _inputs(shape, dtype)
    for a, b in zip(_run(*arguments), _run(*map(guarded, arguments)), strict=True):
        assert torch.equal(a, b)
