# SPDX-License-Identifier: Apache-2.0
"""Activations, and their slopes, over their whole range."""

import pytest
import torch
import triton
import triton.language as tl

from fastasr import backend
from fastasr.kernels._activation import activate_with_slope
from fastasr.kernels.bias_norm import bias_norm_forward
from fastasr.kernels.swoosh import swoosh_backward, swoosh_forward
from fastasr.ops import _activation, bias_norm, rel_attention
from fastasr.testing.checks import compared
from fastasr.testing.table import Make, table

# the activations, to be computed in float64, without cancellation in the tails
_TRUTHS = (
    lambda x: x * 1.0,
    torch.nn.functional.silu,
    torch.relu,
    torch.tanh,
    lambda x: 0.5 * x * torch.special.erfc(-x * 0.5**0.5),
)
INF, NAN = float("inf"), float("nan")


@triton.jit
def _activation_kernel(X, Y, SLOPE, N: tl.constexpr, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    i = tl.arange(0, N)
    y, slope = activate_with_slope(tl.load(X + i), ACTIVATION, PRECISE)
    tl.store(Y + i, y)
    tl.store(SLOPE + i, slope)


@pytest.mark.parametrize("activation", range(len(_activation.NAMES)), ids=_activation.NAMES)
def test_activations(activation):
    """Relative errors are small, in the tails too."""
    parts = (torch.linspace(-80, 80, 2000), torch.linspace(-3, 3, 2000), torch.logspace(-30, 0, 96))
    x = torch.cat(parts)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _activation_kernel[(1,)](x, y, slope, 4096, activation, True)
    wide = x.double().requires_grad_()
    truth = _TRUTHS[activation](wide)
    (slopes,) = torch.autograd.grad(truth.sum(), wide)
    if activation == 3:  # autograd's 1 - tanh^2 cancels
        slopes = torch.cosh(wide) ** -2
    # GELU: the rounding of x^2 is an error of its exponential.
    relative = 1e-6 * (1 + 0.1 * wide**2 if activation == 4 else torch.ones_like(wide))
    assert ((y - truth).abs() <= relative * truth.abs() + 1e-36).all()
    # The slopes of SiLU and GELU have a zero: near it the error is compared with 1.
    zero = (wide.abs() < 3) if activation in (1, 4) else torch.zeros_like(x, dtype=torch.bool)
    assert ((slope - slopes).abs() <= relative * torch.where(zero, 1.0, slopes.abs()) + 1e-36).all()


@pytest.mark.parametrize("activation", range(len(_activation.NAMES)), ids=_activation.NAMES)
@pytest.mark.parametrize("precise", [False, True], ids=["16 bits", "float32"])
def test_slopes_far_out(activation, precise):
    """A gate may multiply a slope by 1e30 and more: there it must be what it tends to."""
    x = torch.tensor([1e30, -1e30, 1e38, -1e38])
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _activation_kernel[(1,)](x, y, slope, 4, activation, precise)
    wide = x.double().requires_grad_()
    truth = _TRUTHS[activation](wide)
    (slopes,) = torch.autograd.grad(truth.sum(), wide)
    torch.testing.assert_close((y, slope), (truth.float(), slopes.float()), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_swoosh(dtype, right):
    big = 3e4 if dtype is torch.float16 else 1e38
    x = torch.tensor([INF, -INF, NAN, 1e4, -1e4, big, -big, 0.0, -0.0]).to(dtype)
    y = swoosh_forward(x, right, None, -1)
    dx, _ = swoosh_backward(torch.ones_like(x), x, right, None, -1, None, False)
    wide = x.double()
    shift, offset = (1.0, 0.313261687) if right else (4.0, 0.035)
    expected = torch.logaddexp(torch.zeros_like(wide), wide - shift) - 0.08 * wide - offset
    slope = torch.sigmoid(wide - shift) - 0.08
    for found, truth in ((y, expected), (dx, slope)):
        torch.testing.assert_close(
            found, truth.to(dtype), equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )


@pytest.mark.parametrize("value", [-200.0, -90.0, 0.0, 60.0, 88.0, 90.0, INF, NAN])
def test_log_scale_of_bias_norm(value):
    x, bias, log_scale = torch.randn(2, 16), 0.1 * torch.randn(16), torch.tensor(value)
    torch.testing.assert_close(
        bias_norm_forward(x, bias, log_scale),
        bias_norm.definition(x, bias, log_scale),
        equal_nan=True,
        rtol=1e-5,
        atol=1e-38,
    )


def test_gradients_where_an_attention_overflows():
    """Dropout's 1 / (1 - p) takes y beyond float16. Eager's gradients do not depend on y: they are finite."""
    make = Make(torch.float16)
    q, k = make.normal(2, 9, 2, 8), make.normal(2, 9, 2, 8)
    call = {"q": q, "k": k, "v": make.normal(2, 9, 2, 8, scale=100.0, mean=6e4), "dropout_p": 0.5}
    call["dropout_seed"] = torch.tensor([3])
    found = compared(
        table("rel_attention"), call, torch.float16, cotangent=make.normal(2, 9, 2, 8, scale=1e-4)
    )
    with backend("triton"):
        comparisons = dict(found)
    assert not rel_attention(**call).isfinite().all()
    assert all(c.ok for c in comparisons.values()), comparisons
