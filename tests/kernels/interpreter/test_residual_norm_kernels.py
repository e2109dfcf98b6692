# SPDX-License-Identifier: Apache-2.0
"""The kernels of residual_norm and gated_residual_norm in the interpreter against float64."""

import pytest
import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import activate_with_slope
from fastasr.kernels.residual_norm import (
    DTYPES,
    MAX_CHANNELS,
    residual_norm_backward,
    residual_norm_forward,
)
from fastasr.ops import _activation, gated_residual_norm, residual_norm
from fastasr.testing.tolerance import compare

SHAPES = [(40,), (3, 7), (9, 2, 16), (5, 4, 192), (11, 193), (6, 513), (3, 2048), (2, 5000)]
EPS = 1e-5

# the activations, to be computed in float64, without cancellation in the tails
_TRUTHS = (
    lambda x: x * 1.0,
    torch.nn.functional.silu,
    torch.relu,
    torch.tanh,
    lambda x: 0.5 * x * torch.special.erfc(-x * 0.5**0.5),
)


def _inputs(shape, dtype, gated=True, mask=False):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype) for _ in range(4 if gated else 2)]
    inputs += [None] * (4 - len(inputs))
    keep = (torch.rand(shape) > 0.3).float() / 0.7 if mask else None
    weight, bias = 1 + 0.3 * torch.randn(shape[-1]), 0.2 * torch.randn(shape[-1])
    return torch.randn(shape).to(dtype), *inputs, keep, weight, bias


def _expected(grad, x, update, candidate, hidden, mask, weight, bias, activation, dtype):
    """Returns (y, dx, dupdate, dsum, dweight, dbias) by autograd through the definition, in ``dtype``."""
    leaves = [
        t if t is None else t.to(dtype).requires_grad_() for t in (x, update, candidate, hidden, weight, bias)
    ]
    x, update, candidate, hidden, weight, bias = leaves
    if candidate is None:
        y = residual_norm.definition(x, update, weight, bias, EPS)
        dx, _, dweight, dbias = torch.autograd.grad(y, (x, update, weight, bias), grad.to(dtype))
        return y.detach(), dx, torch.empty(0), torch.empty(0), dweight, dbias
    mask = mask if mask is None else mask.to(dtype)
    name = _activation.NAMES[activation]
    y = gated_residual_norm.definition(
        x, update, candidate, hidden, weight, bias, EPS, activation=name, dropout_mask=mask
    )
    dx, du, ds, _, dweight, dbias = torch.autograd.grad(y, leaves, grad.to(dtype))
    return y.detach(), dx, du, ds, dweight, dbias


def _run(grad, x, update, candidate, hidden, mask, weight, bias, activation=1, eps=EPS):
    tensors = (x, update, candidate, hidden, mask, weight, bias)
    y, _ = residual_norm_forward(*tensors, eps, activation, False)
    return (y, *residual_norm_backward(grad, *tensors, None, eps, activation))


def _compare(arguments, activation, dtype, few):
    eager = _expected(*arguments, activation, dtype)
    truth = _expected(*arguments, activation, torch.float64)
    names = ("y", "dx", "dupdate", "dsum", "dweight", "dbias")
    for name, a, e, t in zip(names, _run(*arguments, activation), eager, truth, strict=True):
        assert a.dtype == (torch.float32 if name in names[4:] else dtype)
        if not t.numel():
            continue
        comparison = compare(a, e, t)
        # All elements of a row share the error of its scale, so few rows are few samples of it.
        assert comparison.ok or (few and comparison.worst < 3 * comparison.eps), f"{name}: {comparison}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_not_above_that_of_eager(shape, gated, dtype):
    arguments = _inputs(shape, dtype, gated)
    few = torch.Size(shape).numel() < 16 * shape[-1]
    _compare(arguments, 1, dtype, few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", range(len(_activation.NAMES)), ids=_activation.NAMES)
def test_activations_and_a_mask(activation, dtype):
    _compare(_inputs((40, 33), dtype, mask=True), activation, dtype, False)


@triton.jit
def _activation_kernel(X, Y, SLOPE, N: tl.constexpr, ACTIVATION: tl.constexpr):
    i = tl.arange(0, N)
    y, slope = activate_with_slope(tl.load(X + i), ACTIVATION, True)
    tl.store(Y + i, y)
    tl.store(SLOPE + i, slope)


@pytest.mark.parametrize("activation", range(len(_activation.NAMES)), ids=_activation.NAMES)
def test_activations_over_their_range(activation):
    """Relative errors are small, in the tails too."""
    parts = (torch.linspace(-80, 80, 2000), torch.linspace(-3, 3, 2000), torch.logspace(-30, 0, 96))
    x = torch.cat(parts)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _activation_kernel[(1,)](x, y, slope, 4096, activation)
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


def test_rows_are_dealt_to_parts_completely():
    """With more rows than parts, every row counts once in the parameters' gradients."""
    arguments = _inputs((4101, 24), torch.float32)
    truth = _expected(*arguments, 1, torch.float64)
    for a, t in zip(_run(*arguments), truth, strict=True):
        assert (a - t).abs().max() / t.abs().max() < 3e-6


def test_rows_apart():
    """The rows are slices of one projection, or repeat."""
    grad, x, update, candidate, hidden, _, weight, bias = _inputs((6, 3, 24), torch.float32)
    wide = torch.full((6, 3, 60), float("nan"))
    wide[..., 5:29], wide[..., 30:54] = update, candidate
    sliced = _run(grad, x, wide[..., 5:29], wide[..., 30:54], hidden, None, weight, bias)
    for a, b in zip(sliced, _run(grad, x, update, candidate, hidden, None, weight, bias), strict=True):
        assert torch.equal(a, b)
    one = x[:1, :1].expand(6, 3, 24)
    repeated = _run(grad, one, update, candidate, hidden, None, weight, bias)
    for a, b in zip(
        repeated, _run(grad, one.contiguous(), update, candidate, hidden, None, weight, bias), strict=True
    ):
        assert torch.equal(a, b)


def test_rows_of_one_value():
    """A row without variance is normalised to zeros, however small eps is, at any number of channels."""
    x = torch.full((5, 193), 0.1)
    weight, bias, zero = torch.ones(193), torch.full((193,), 0.25), torch.zeros(5, 193)
    y, *_ = _run(x, x, zero, None, None, None, weight, bias, eps=1e-12)
    assert torch.equal(y, bias.expand(5, 193))


def test_no_epsilon():
    """Rows past the last, which have no variance, count for nothing."""
    grad, x, update, *_, weight, bias = _inputs((3, 40), torch.float32, gated=False)
    found = _run(grad, x, update, None, None, None, weight, bias, eps=0.0)
    assert all(torch.isfinite(t).all() for t in found)


def test_special_values():
    """NaN and infinity stay in their row."""
    arguments = _inputs((5, 8), torch.float32)
    x = arguments[1]
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    y, dx, *_ = _run(*arguments)
    clean = [0, 3, 4]
    expected = _expected(*arguments, 1, torch.float64)
    for a, t in zip((y, dx), expected, strict=False):
        torch.testing.assert_close(a[clean], t[clean].float())
        assert torch.isnan(a[1:3]).all()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty(shape, gated):
    y, dx, _, _, dweight, dbias = _run(*_inputs(shape, torch.float32, gated))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(8))
    assert torch.equal(dbias, torch.zeros(8))


def test_repeats_bit_for_bit():
    arguments = _inputs((700, 48), torch.float32)
    for a, b in zip(_run(*arguments), _run(*arguments), strict=True):
        assert torch.equal(a, b)


def test_too_many_channels():
    x = torch.empty(1, MAX_CHANNELS + 1)
    with pytest.raises(ValueError, match="channels"):
        residual_norm_forward(x, x, None, None, None, x[0], x[0], EPS, 0, False)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_address_is_stored_twice(shape, gated, writes):
    grad, *rest = _inputs(shape, torch.float32, gated)
    residual_norm_forward(*rest, EPS, 1, False)
    assert writes.count == grad.numel()
    residual_norm_backward(grad, *rest, None, EPS, 1)
    assert writes.clashes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_read_past_the_end(shape, gated, dtype, guarded):
    arguments = _inputs(shape, dtype, gated, mask=gated)
    again = [t if t is None else guarded(t) for t in arguments]
    for a, b in zip(_run(*arguments), _run(*again), strict=True):
        assert torch.equal(a, b)
