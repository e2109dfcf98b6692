# SPDX-License-Identifier: Apache-2.0
"""Tests of ema_scan and complex_ema_scan beyond the contract of every op: cutting, carrying, long sequences, forms of
the state, upstream.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastasr
from fastasr import ops
from fastasr.ops._linear_recurrence import convolution
from fastasr.ops.ema_scan import damped, rotating
from fastasr.testing import Make, tables
from fastasr.testing.checks import as_near_as_eager, compared
from fastasr.testing.samples import complex_ema_scan as complex_samples
from fastasr.testing.samples import ema_scan as samples
from fastasr.testing.table import floating, with_tensors

REAL, COMPLEX = samples.AVERAGE, complex_samples.AVERAGE
COEFFICIENTS = {REAL: damped, COMPLEX: rotating}
PARAMETERS = {
    REAL: ("damping", "decay", "expansion", "projection"),
    COMPLEX: ("alpha", "delta", "theta", "gamma"),
}
both = pytest.mark.parametrize("average", [REAL, COMPLEX], ids=["real", "complex"])


def _op(average):
    return getattr(ops, average.op)


def _numbers(average, t: Tensor) -> Tensor:
    """Returns a state as the coefficients' numbers."""
    return torch.view_as_complex(t) if average is COMPLEX else t


def _gradients(function, arguments: dict, cotangents: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict]:
    leaves = with_tensors(arguments, lambda _, t: t.detach().clone().requires_grad_())
    out = function(**leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outputs, cotangents[: len(outputs)])
    return outputs, {name: t.grad for name, t in floating(leaves).items()}


def _close(a: Tensor, b: Tensor, tolerance: float) -> None:
    scale = max(1e-3, b.abs().max().item()) if b.numel() else 1.0
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


def _recurrence(x: Tensor, q: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Re Σ c h for x (B, D, L), step by step, and the last h (B, D, N)."""
    y = []
    for t in range(x.shape[-1]):
        h = q**1.0 * h + b * x[..., t, None]
        y.append((c * h).sum(-1).real)
    return torch.stack(y, -1) if y else torch.zeros_like(x), h


@both
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("mean", [-9.0, 0.0, 30.0])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100])
def test_the_convolution_is_the_recurrence(average, length, mean, place):
    name = list(average.means)[place]
    arguments = average.call(Make(torch.float64), length, 2, 3, layout="BDL", state=True, **{name: mean})
    coefficients = COEFFICIENTS[average](*(arguments[name] for name in PARAMETERS[average]))
    x, state = arguments["x"], _numbers(average, arguments["state"])
    steps, blocks = _recurrence(x, *coefficients, state), convolution(x, *coefficients, state, True)
    torch.testing.assert_close(steps, blocks, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(length=st.integers(1, 150), cut=st.integers(0, 150), states=st.sampled_from((1, 4, 7)))
def test_a_state_carried_over_a_cut_changes_nothing(average, direction, length, cut, states):
    cut, scan = min(cut, length), _op(average)
    options = {"state": True, "mask": True, "activation": "silu", "direction": direction}
    arguments = average.call(Make(), length, 2, 20, states, **options)
    cotangents = (Make(seed=1).normal(length, 2, 20), Make(seed=2).normal(2, 20, states, *average.state))

    def pieces(x, padding_mask, state, **rest):
        parts = [(x[:cut], padding_mask[:, :cut]), (x[cut:], padding_mask[:, cut:])]
        outputs = []
        for part, mask in reversed(parts) if direction == "reverse" else parts:
            y, state = scan(part, padding_mask=mask, state=state, **rest)
            outputs.append(y)
        return torch.cat(outputs[::-1] if direction == "reverse" else outputs), state

    whole, whole_grads = _gradients(scan, arguments, cotangents)
    cut_up, cut_grads = _gradients(pieces, arguments, cotangents)
    numbers = 2 if average is COMPLEX else 1
    for a, b in zip(cut_up, whole, strict=True):
        _close(a, b, 2e-6 * numbers)
    for name in whole_grads:
        _close(cut_grads[name], whole_grads[name], 1e-5 * numbers)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_step_at_a_time_is_the_whole(average, dtype):
    arguments = average.call(Make(dtype), 25, 3, 70, state=True, activation="silu")
    state = arguments["state"].to(torch.promote_types(dtype, torch.float32))
    state = arguments["state"] = _numbers(average, state) if average is COMPLEX else arguments["state"]
    scan, steps = _op(average), []
    whole, final = scan(**arguments)
    for t in range(25):
        y, state = scan(**arguments | {"x": arguments["x"][t : t + 1], "state": state})
        steps.append(y)
    _close(torch.cat(steps), whole, 8 * torch.finfo(dtype).eps)
    if average is COMPLEX:
        _close(torch.view_as_real(state), torch.view_as_real(final), 4e-6)
    else:
        _close(state, final, 2e-6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    length=st.integers(0, 200),
    taps=st.integers(1, 220),
    channels=st.sampled_from((1, 5, 33)),
    direction=st.sampled_from(("forward", "reverse", "bidirectional")),
    damping=st.sampled_from((0.0, -8.0, 8.0)),
    layout=st.sampled_from(("LBD", "BDL")),
    mask=st.booleans(),
)
def test_truncation(length, taps, channels, direction, damping, layout, mask):
    arguments = REAL.call(
        Make(), length, 2, channels, 3, truncation=taps, direction=direction, damping=damping, layout=layout,
        mask=mask, activation="silu",
    )  # fmt: skip
    for what, comparison in compared(tables()["ema_scan"], arguments, torch.float32):
        least = 5e-6 if what == "values" else 1e-4  # from float64, where one draw misses the contract
        assert comparison.ok or comparison.worst <= least, f"{what}: {comparison}"


@both
@pytest.mark.parametrize("taps", [1, 9, 64])
def test_a_truncation_is_the_short_kernel(average, taps):
    arguments = average.call(Make(torch.float64), 80, 2, 5) | {average.residual: None}
    q, b, c = COEFFICIENTS[average](*(arguments[name] for name in PARAMETERS[average]))
    kernel = ((b * c).unsqueeze(-1) * q.unsqueeze(-1) ** torch.arange(taps).double()).sum(1).real  # (D, taps)
    x = torch.nn.functional.pad(arguments["x"].permute(1, 2, 0), (taps - 1, 0))
    expected = torch.nn.functional.conv1d(x, kernel.flip(-1).unsqueeze(1), groups=5).permute(2, 0, 1)
    y = _op(average)(**arguments, truncation=taps)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@both
def test_bidirectional_is_the_sum_of_two(average):
    scan = _op(average)
    arguments = average.call(Make(torch.float64), 45, 2, 6, direction="bidirectional", mask=True)
    one = {k: v for k, v in arguments.items() if k != "direction"}
    halves = [
        one | {name: arguments[name][rows] for name in PARAMETERS[average]}
        for rows in (slice(0, 6), slice(6, None))
    ]
    forward = scan(**halves[0])
    reverse = scan(**halves[1] | {average.residual: None}, direction="reverse")
    torch.testing.assert_close(scan(**arguments), forward + reverse, rtol=1e-12, atol=1e-12)


@both
def test_rows_of_the_batch_are_apart(average):
    scan, arguments = _op(average), average.call(Make(), 90, 5, 40, state=True, mask=True, layout="BLD")
    whole = scan(**arguments)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        cut = {name: arguments[name][rows] for name in ("x", "state", "padding_mask")}
        for a, b in zip(scan(**arguments | cut), whole, strict=True):
            assert torch.equal(a, b[rows])


def _assert_contract(average, length: int, **means) -> None:
    def arguments(dtype: torch.dtype, draw: int) -> dict:
        return average.call(Make(dtype, seed=draw), length, 1, 3, 2, activation="silu", **means)

    as_near_as_eager(tables()[average.op], arguments)


@pytest.mark.parametrize("damping", [0.0, -12.0])
def test_two_to_the_seventeen_steps(damping):
    _assert_contract(REAL, 1 << 17, damping=damping, decay=damping / 4)


@pytest.mark.parametrize("length", [6000, 1 << 17])
@pytest.mark.parametrize("alpha", [0.0, -9.0])
def test_long_and_narrow(length, alpha):
    _assert_contract(COMPLEX, length, alpha=alpha, delta=alpha / 4)


def _real_by_fft(x, damping, decay, expansion, projection, residual, activation) -> Tensor:
    """Computes upstream's form: a kernel from exp(t log q) and one product of transforms, in float32."""
    length = x.shape[0]
    p = torch.sigmoid(damping)
    q = 1 - p * torch.sigmoid(decay)
    powers = torch.exp(torch.arange(length).to(p) * torch.log(q).unsqueeze(-1))
    kernel = ((p * expansion * projection * p.shape[1] ** -0.5).unsqueeze(-1) * powers).sum(1)
    u = x.permute(1, 2, 0)
    transform = torch.fft.rfft(u.float(), n=2 * length) * torch.fft.rfft(kernel.float(), n=2 * length)
    y = torch.fft.irfft(transform, n=2 * length)[..., :length].to(x.dtype).permute(2, 0, 1)
    return activation(y + x * residual)


def _complex_by_fft(x, alpha, delta, theta, gamma, omega, activation) -> Tensor:
    """Does the same for complex numbers."""
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


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_is_not_above_that_of_the_fft(average, dtype):
    scan, by_fft = _op(average), _real_by_fft if average is REAL else _complex_by_fft
    arguments = average.call(Make(dtype), 400, 2, 64, activation="silu", **{next(iter(average.means)): -2.0})
    wide = with_tensors(arguments, lambda _, t: t.double())
    cotangent = Make(dtype, seed=1).normal(400, 2, 64)

    def fft(activation, layout, direction, **tensors):
        return by_fft(**tensors, activation=torch.nn.functional.silu)

    (expected,), expected_grads = _gradients(scan.definition, wide, (cotangent.double(),))
    (ours,), our_grads = _gradients(scan, arguments, (cotangent,))
    (theirs,), their_grads = _gradients(fft, arguments, (cotangent,))

    def error(a, b):
        return (a.double() - b).square().mean().sqrt().item()

    assert error(ours, expected) <= error(theirs, expected)
    for name, grad in expected_grads.items():
        assert error(our_grads[name], grad) <= 1.1 * error(their_grads[name], grad), name


@both
def test_lengths_do_not_recompile(average):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, scan = CompileCounterWithBackend("aot_eager"), _op(average)
    compiled = torch.compile(scan, fullgraph=True, backend=counter, dynamic=True)
    arguments = average.call(Make(), 61, 2, 12, state=True)
    graphs = []
    with torch.no_grad():
        for length in (61, 43, 29):
            short = arguments | {"x": arguments["x"][:length].clone()}
            torch.testing.assert_close(compiled(**short), scan(**short))
            graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], graphs


@pytest.mark.parametrize("length", [1, 16, 17, 65])
def test_an_infinity_at_the_last_step_leaves_the_imaginary_part_of_the_state_finite(length):
    make = Make(torch.float32)
    x, *rest = (make.normal(*shape) for shape in ((length, 2, 3), (3, 4), (3, 4), (3,), (3, 4, 2)))
    x[-1, 1, 2] = -math.inf
    for backend in ("eager", "auto"):
        with fastasr.backend(backend):
            _, state = ops.complex_ema_scan(x, *rest, return_state=True)
        assert (state.real[1, 2] == -math.inf).all()
        assert state.real.isfinite().sum() == state.real.numel() - 4
        assert state.imag.isfinite().all()


def _module(x, alpha, delta, theta, gamma, omega, hx):
    """Runs Megalodon's module on (B, D, L) with its parameters' shapes, one step after another in
    complex128.
    """
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


def test_forms_of_the_state():
    arguments = COMPLEX.call(Make(), 20, 3, 10, state=True)
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


def test_an_angle_of_zero_is_ema_scan():
    arguments = COMPLEX.call(Make(torch.float64), 50, 2, 6, mask=True, activation="silu")
    arguments["theta"] = torch.full((6,), -800.0, dtype=torch.float64)
    y = ops.complex_ema_scan(**arguments)
    real = {"damping": arguments["alpha"], "decay": arguments["delta"], "residual": arguments["omega"]}
    real |= {"expansion": torch.ones(6, 4).double(), "projection": arguments["gamma"][..., 0].contiguous()}
    kept = {k: arguments[k] for k in ("x", "padding_mask", "activation", "layout")}
    torch.testing.assert_close(y, ops.ema_scan(**kept, **real), rtol=1e-12, atol=1e-12)
