# SPDX-License-Identifier: Apache-2.0
"""What complex_ema_scan promises beyond the contract of every op: cutting, carrying, forms of the state, upstream."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastasr import ops
from fastasr.ops._ema import convolution, recurrence
from fastasr.ops.complex_ema_scan import coefficients, definition
from fastasr.testing import Make
from fastasr.testing.samples.complex_ema_scan import NAMES, complex_ema
from fastasr.testing.table import floating, with_tensors
from fastasr.testing.tolerance import compare

PARAMETERS = NAMES[1:5]


def _gradients(function, arguments: dict, cotangents: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict]:
    leaves = with_tensors(arguments, lambda _, t: t.detach().clone().requires_grad_())
    out = function(**leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outputs, cotangents[: len(outputs)])
    return outputs, {name: t.grad for name, t in floating(leaves).items()}


def _close(a: Tensor, b: Tensor, tolerance: float) -> None:
    scale = max(1e-3, b.abs().max().item()) if b.numel() else 1.0
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("delta", [-9.0, 0.0, 30.0])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100])
def test_the_recurrence_is_the_convolution(length, delta):
    make = Make(torch.float64)
    q, p, c = coefficients(
        make.normal(3, 4), make.normal(3, 4, mean=delta), make.normal(3), make.normal(3, 4, 2)
    )
    x, state = make.normal(2, 3, length), torch.view_as_complex(make.normal(2, 3, 4, 2))
    steps, blocks = recurrence(x, q, p, c, state), convolution(x, q, p, c, state, True)
    for ours, theirs in zip(steps, blocks, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 16, 17, 65])
def test_an_infinity_at_the_last_step_leaves_the_imaginary_part_of_the_state_finite(length):
    make = Make(torch.float32)
    x, *rest = (make.normal(*shape) for shape in ((length, 2, 3), (3, 4), (3, 4), (3,), (3, 4, 2)))
    x[-1, 1, 2] = -math.inf
    for function in (definition, ops.complex_ema_scan):
        _, state = function(x, *rest, return_state=True)
        assert (state.real[1, 2] == -math.inf).all()
        assert state.real.isfinite().sum() == state.real.numel() - 4
        assert state.imag.isfinite().all()


def _module(x, alpha, delta, theta, gamma, omega, hx):
    """Megalodon's module on (B, D, L) with its parameters' shapes, one step after another in complex128."""
    states = alpha.shape[1]
    p = torch.sigmoid(alpha)[..., 0]
    n = torch.arange(1, states + 1, dtype=torch.float64)
    angle = n * torch.sigmoid(theta)[..., 0] * (2 * math.pi / states)  # (D, N)
    q = (1 - p * torch.sigmoid(delta)[..., 0]) * torch.exp(1j * angle)
    c = torch.view_as_complex(gamma) / math.sqrt(states)
    h, y = hx, []
    for t in range(x.shape[-1]):
        h = q * h + p * x[:, :, t, None]
        y.append((c * h).sum(-1).real)
    return torch.stack(y, -1) + omega * x, h


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_module_of_megalodon(dtype):
    make = Make(dtype)
    leaves = {
        "x": make.normal(2, 12, 90),
        "alpha": make.normal(12, 16, 1, scale=0.2),
        "delta": make.normal(12, 16, 1, scale=0.2),
        "theta": make.normal(12, 1, 1, mean=-3.0),
        "gamma": make.normal(12, 16, 2),
        "omega": make.normal(12, 1),
        "state": torch.view_as_complex(make.normal(2, 12, 16, 2)),
    }
    weights = make.normal(2, 12, 90), torch.view_as_complex(make.normal(2, 12, 16, 2))

    def run(function, wide):
        tensors = {
            k: v.detach().to(torch.promote_types(v.dtype, wide)).requires_grad_() for k, v in leaves.items()
        }
        y, h = function(**tensors)
        ((y * weights[0]).sum() + (h * weights[1]).sum().real).backward()
        return y, h, {k: t.grad for k, t in tensors.items()}

    y, h, grads = run(
        lambda state, **kw: ops.complex_ema_scan(**kw, state=state, return_state=True, layout="BDL"), dtype
    )
    z, g, expected = run(lambda state, **kw: _module(**kw, hx=state), torch.float64)
    assert h.is_complex()
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    _close(y, z, tolerance)
    _close(torch.view_as_real(h), torch.view_as_real(g), tolerance)
    for name, grad in grads.items():
        assert grad.dtype == leaves[name].dtype
        a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (grad, expected[name]))
        _close(a, b, tolerance)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(length=st.integers(1, 150), cut=st.integers(0, 150), states=st.sampled_from((1, 4, 7)))
def test_a_state_carried_over_a_cut_changes_nothing(direction, length, cut, states):
    cut = min(cut, length)
    arguments = complex_ema(
        Make(), length, 2, 20, states, state=True, mask=True, activation="silu", direction=direction
    )
    cotangents = (Make(seed=1).normal(length, 2, 20), Make(seed=2).normal(2, 20, states, 2))

    def pieces(x, padding_mask, state, **rest):
        parts = [(x[:cut], padding_mask[:, :cut]), (x[cut:], padding_mask[:, cut:])]
        outputs = []
        for part, mask in reversed(parts) if direction == "reverse" else parts:
            y, state = ops.complex_ema_scan(part, padding_mask=mask, state=state, **rest)
            outputs.append(y)
        return torch.cat(outputs[::-1] if direction == "reverse" else outputs), state

    whole, whole_grads = _gradients(ops.complex_ema_scan, arguments, cotangents)
    cut_up, cut_grads = _gradients(pieces, arguments, cotangents)
    for a, b in zip(cut_up, whole, strict=True):
        _close(a, b, 4e-6)
    for name in whole_grads:
        _close(cut_grads[name], whole_grads[name], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_step_at_a_time_is_the_whole(dtype):
    arguments = complex_ema(Make(dtype), 25, 3, 70, state=True, activation="silu")
    arguments["state"] = torch.view_as_complex(
        arguments["state"].to(torch.promote_types(dtype, torch.float32))
    )
    whole, final = ops.complex_ema_scan(**arguments)
    state, steps = arguments["state"], []
    for t in range(25):
        y, state = ops.complex_ema_scan(**arguments | {"x": arguments["x"][t : t + 1], "state": state})
        steps.append(y)
    _close(torch.cat(steps), whole, 8 * torch.finfo(dtype).eps)
    _close(torch.view_as_real(state), torch.view_as_real(final), 4e-6)


def test_forms_of_the_state():
    arguments = complex_ema(Make(), 20, 3, 10, state=True)
    y, final = ops.complex_ema_scan(**arguments)
    z, complex_final = ops.complex_ema_scan(
        **arguments | {"state": torch.view_as_complex(arguments["state"])}
    )
    assert torch.equal(y, z)
    assert torch.equal(final, torch.view_as_real(complex_final))
    conjugated = torch.view_as_complex(arguments["state"]).conj()
    a = ops.complex_ema_scan(**arguments | {"state": conjugated})[0]
    b = ops.complex_ema_scan(**arguments | {"state": conjugated.resolve_conj()})[0]
    assert torch.equal(a, b)
    _, fresh = ops.complex_ema_scan(**{k: v for k, v in arguments.items() if k != "state"})
    assert fresh.dtype is torch.complex64
    assert fresh.shape == (3, 10, 4)


@pytest.mark.parametrize("taps", [1, 9, 64])
def test_a_truncation_is_the_short_kernel(taps):
    arguments = complex_ema(Make(torch.float64), 80, 2, 5) | {"omega": None}
    q, p, c = coefficients(*(arguments[name] for name in PARAMETERS))
    kernel = ((p * c).unsqueeze(-1) * q.unsqueeze(-1) ** torch.arange(taps).double()).sum(1).real
    x = torch.nn.functional.pad(arguments["x"].permute(1, 2, 0), (taps - 1, 0))
    expected = torch.nn.functional.conv1d(x, kernel.flip(-1).unsqueeze(1), groups=5).permute(2, 0, 1)
    torch.testing.assert_close(
        ops.complex_ema_scan(**arguments, truncation=taps), expected, rtol=1e-12, atol=1e-12
    )


def test_bidirectional_is_the_sum_of_two():
    arguments = complex_ema(Make(torch.float64), 45, 2, 6, direction="bidirectional", mask=True)
    both = ops.complex_ema_scan(**arguments)
    one = {k: v for k, v in arguments.items() if k != "direction"}
    halves = [
        one | {name: arguments[name][rows] for name in PARAMETERS} for rows in (slice(0, 6), slice(6, None))
    ]
    forward = ops.complex_ema_scan(**halves[0])
    reverse = ops.complex_ema_scan(**halves[1] | {"omega": None}, direction="reverse")
    torch.testing.assert_close(both, forward + reverse, rtol=1e-12, atol=1e-12)


def test_an_angle_of_zero_is_ema_scan():
    arguments = complex_ema(Make(torch.float64), 50, 2, 6, mask=True, activation="silu")
    arguments["theta"] = torch.full((6,), -800.0, dtype=torch.float64)
    y = ops.complex_ema_scan(**arguments)
    real = {"damping": arguments["alpha"], "decay": arguments["delta"], "residual": arguments["omega"]}
    real |= {"expansion": torch.ones(6, 4).double(), "projection": arguments["gamma"][..., 0].contiguous()}
    kept = {k: arguments[k] for k in ("x", "padding_mask", "activation", "layout")}
    torch.testing.assert_close(y, ops.ema_scan(**kept, **real), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [6000, 1 << 17])
@pytest.mark.parametrize("alpha", [0.0, -9.0])
def test_long_and_narrow(length, alpha):
    arguments = complex_ema(Make(), length, 1, 3, 2, alpha=alpha, delta=alpha / 4, activation="silu")
    cotangents = (Make(seed=1).normal(length, 1, 3),)
    (y,), grads = _gradients(ops.complex_ema_scan, arguments, cotangents)
    (eager,), eager_grads = _gradients(definition, arguments, cotangents)
    wide = with_tensors(arguments, lambda _, t: t.double())
    (expected,), expected_grads = _gradients(definition, wide, (cotangents[0].double(),))
    comparison = compare(y, eager, expected)
    assert comparison.ok, comparison
    for name, grad in grads.items():
        comparison = compare(grad, eager_grads[name], expected_grads[name])
        assert comparison.ok, f"{name}: {comparison}"


def _by_fft(x, alpha, delta, theta, gamma, omega, activation) -> Tensor:
    """Upstream's form: a kernel from powers of q and one product of transforms, in float32."""
    length, states = x.shape[0], alpha.shape[1]
    p = torch.sigmoid(alpha)
    n = torch.arange(1, states + 1).to(theta)
    angle = n * (torch.sigmoid(theta) * (2 * math.pi / states)).unsqueeze(-1)
    log_q = torch.complex(torch.log1p(-p * torch.sigmoid(delta)).float(), angle.float())
    powers = torch.exp(log_q.unsqueeze(-1) * torch.arange(length))
    weight = torch.complex(gamma[..., 0].float(), gamma[..., 1].float()) * (p * states**-0.5).float()
    kernel = (weight.unsqueeze(-1) * powers).sum(1).real
    u = x.permute(1, 2, 0)
    transform = torch.fft.rfft(u.float(), n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(transform, n=2 * length)[..., :length].to(x.dtype).permute(2, 0, 1)
    return activation(y + x * omega)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_is_not_above_that_of_the_fft(dtype):
    arguments = complex_ema(Make(dtype), 400, 2, 64, alpha=-2.0, activation="silu")
    wide = with_tensors(arguments, lambda _, t: t.double())
    cotangent = Make(dtype, seed=1).normal(400, 2, 64)

    def fft(activation, layout, direction, **tensors):
        return _by_fft(**tensors, activation=torch.nn.functional.silu)

    (expected,), expected_grads = _gradients(definition, wide, (cotangent.double(),))
    (ours,), our_grads = _gradients(ops.complex_ema_scan, arguments, (cotangent,))
    (theirs,), their_grads = _gradients(fft, arguments, (cotangent,))

    def error(a, b):
        return (a.double() - b).square().mean().sqrt().item()

    assert error(ours, expected) <= error(theirs, expected)
    for name, grad in expected_grads.items():
        assert error(our_grads[name], grad) <= 1.1 * error(their_grads[name], grad), name
