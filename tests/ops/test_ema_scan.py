# SPDX-License-Identifier: Apache-2.0
"""What ema_scan promises beyond the contract of every op: cutting, carrying, long sequences, upstream."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastasr import ops
from fastasr.ops._ema import convolution, recurrence
from fastasr.ops.ema_scan import coefficients, definition
from fastasr.testing import Make
from fastasr.testing.samples.ema_scan import ema
from fastasr.testing.table import floating, with_tensors

PARAMETERS = ("damping", "decay", "expansion", "projection")


def _gradients(function, arguments: dict, cotangents: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict]:
    leaves = with_tensors(arguments, lambda _, t: t.detach().clone().requires_grad_())
    out = function(**leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outputs, cotangents[: len(outputs)])
    return outputs, {name: t.grad for name, t in floating(leaves).items()}


def _close(a: Tensor, b: Tensor, tolerance: float) -> None:
    scale = max(1e-3, b.abs().max().item()) if b.numel() else 1.0
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("decay", [-9.0, 0.0, 30.0])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100])
def test_the_recurrence_is_the_convolution(length, decay):
    make = Make(torch.float64)
    q, b, c = coefficients(
        make.normal(3, 4, mean=decay), make.normal(3, 4), make.normal(3, 4), make.normal(3, 4)
    )
    x, state = make.normal(2, 3, length), make.normal(2, 3, 4)
    steps, blocks = recurrence(x, q, b, c, state), convolution(x, q, b, c, state, True)
    for ours, theirs in zip(steps, blocks, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(length=st.integers(1, 150), cut=st.integers(0, 150), states=st.sampled_from((1, 4, 7)))
def test_a_state_carried_over_a_cut_changes_nothing(direction, length, cut, states):
    cut = min(cut, length)
    arguments = ema(
        Make(), length, 2, 20, states, state=True, mask=True, activation="silu", direction=direction
    )
    cotangents = (Make(seed=1).normal(length, 2, 20), Make(seed=2).normal(2, 20, states))

    def pieces(x, padding_mask, state, **rest):
        parts = [(x[:cut], padding_mask[:, :cut]), (x[cut:], padding_mask[:, cut:])]
        outputs = []
        for part, mask in reversed(parts) if direction == "reverse" else parts:
            y, state = ops.ema_scan(part, padding_mask=mask, state=state, **rest)
            outputs.append(y)
        return torch.cat(outputs[::-1] if direction == "reverse" else outputs), state

    whole, whole_grads = _gradients(ops.ema_scan, arguments, cotangents)
    cut_up, cut_grads = _gradients(pieces, arguments, cotangents)
    for a, b in zip(cut_up, whole, strict=True):
        _close(a, b, 2e-6)
    for name in whole_grads:
        _close(cut_grads[name], whole_grads[name], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_step_at_a_time_is_the_whole(dtype):
    arguments = ema(Make(dtype), 25, 3, 70, state=True, activation="silu")
    whole, final = ops.ema_scan(**arguments)
    state, steps = arguments["state"], []
    for t in range(25):
        y, state = ops.ema_scan(**arguments | {"x": arguments["x"][t : t + 1], "state": state})
        steps.append(y)
    _close(torch.cat(steps), whole, 8 * torch.finfo(dtype).eps)
    _close(state, final, 2e-6)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
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
    arguments = ema(
        Make(), length, 2, channels, 3, truncation=taps, direction=direction, damping=damping, layout=layout,
        mask=mask, activation="silu",
    )  # fmt: skip
    cotangents = (torch.randn_like(arguments["x"]),)
    (y,), grads = _gradients(ops.ema_scan, arguments, cotangents)
    wide = with_tensors(arguments, lambda _, t: t.double())
    (expected,), expected_grads = _gradients(definition, wide, (cotangents[0].double(),))
    _close(y, expected, 5e-6)
    for name, grad in grads.items():
        _close(grad, expected_grads[name], 1e-4)


def test_a_truncation_is_the_short_kernel():
    make = Make(torch.float64)
    arguments = ema(make, 60, 2, 5) | {"residual": None}
    q, b, c = coefficients(*(arguments[name] for name in PARAMETERS))
    kernel = ((b * c).unsqueeze(-1) * q.unsqueeze(-1) ** torch.arange(9)).sum(1)  # (D, 9)
    x = torch.nn.functional.pad(arguments["x"].permute(1, 2, 0), (8, 0))
    expected = torch.nn.functional.conv1d(x, kernel.flip(-1).unsqueeze(1), groups=5).permute(2, 0, 1)
    torch.testing.assert_close(ops.ema_scan(**arguments, truncation=9), expected, rtol=1e-12, atol=1e-12)


def test_bidirectional_is_the_sum_of_two():
    arguments = ema(Make(torch.float64), 45, 2, 6, direction="bidirectional", mask=True)
    both = ops.ema_scan(**arguments)
    one = {k: v for k, v in arguments.items() if k != "direction"}
    halves = [
        one | {name: arguments[name][rows] for name in PARAMETERS} for rows in (slice(0, 6), slice(6, None))
    ]
    forward = ops.ema_scan(**halves[0])
    reverse = ops.ema_scan(**halves[1] | {"residual": None}, direction="reverse")
    torch.testing.assert_close(both, forward + reverse, rtol=1e-12, atol=1e-12)


def test_rows_of_the_batch_are_apart():
    arguments = ema(Make(), 90, 5, 40, state=True, mask=True, layout="BLD")
    whole = ops.ema_scan(**arguments)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        cut = {name: arguments[name][rows] for name in ("x", "state", "padding_mask")}
        for a, b in zip(ops.ema_scan(**arguments | cut), whole, strict=True):
            assert torch.equal(a, b[rows])


@pytest.mark.parametrize("damping", [0.0, -12.0])
def test_two_to_the_seventeen_steps(damping):
    arguments = ema(Make(), 1 << 17, 1, 3, 2, damping=damping, decay=damping / 4, activation="silu")
    cotangents = (Make(seed=1).normal(1 << 17, 1, 3),)
    (y,), grads = _gradients(ops.ema_scan, arguments, cotangents)
    wide = with_tensors(arguments, lambda _, t: t.double())
    (expected,), expected_grads = _gradients(ops.ema_scan, wide, (cotangents[0].double(),))
    _close(y, expected, 2e-5)
    for name, grad in grads.items():
        _close(grad, expected_grads[name], 2e-4)


def _by_fft(x, damping, decay, expansion, projection, residual, activation) -> Tensor:
    """Upstream's form: a kernel from exp(t log q) and one product of transforms, in float32."""
    length = x.shape[0]
    p = torch.sigmoid(damping)
    q = 1 - p * torch.sigmoid(decay)
    powers = torch.exp(torch.arange(length).to(p) * torch.log(q).unsqueeze(-1))
    kernel = ((p * expansion * projection * p.shape[1] ** -0.5).unsqueeze(-1) * powers).sum(1)
    u = x.permute(1, 2, 0)
    transform = torch.fft.rfft(u.float(), n=2 * length) * torch.fft.rfft(kernel.float(), n=2 * length)
    y = torch.fft.irfft(transform, n=2 * length)[..., :length].to(x.dtype).permute(2, 0, 1)
    return activation(y + x * residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_is_not_above_that_of_the_fft(dtype):
    arguments = ema(Make(dtype), 400, 2, 64, damping=-2.0, activation="silu")
    wide = with_tensors(arguments, lambda _, t: t.double())
    cotangent = Make(dtype, seed=1).normal(400, 2, 64)

    def fft(activation, layout, direction, **tensors):
        return _by_fft(**tensors, activation=torch.nn.functional.silu)

    (expected,), expected_grads = _gradients(definition, wide, (cotangent.double(),))
    (ours,), our_grads = _gradients(ops.ema_scan, arguments, (cotangent,))
    (theirs,), their_grads = _gradients(fft, arguments, (cotangent,))

    def error(a, b):
        return (a.double() - b).square().mean().sqrt().item()

    assert error(ours, expected) <= error(theirs, expected)
    for name in expected_grads:
        assert error(our_grads[name], expected_grads[name]) <= 1.1 * error(
            their_grads[name], expected_grads[name]
        )


@pytest.mark.parametrize("truncation", [None, 20])
def test_upstream(truncation):
    module = pytest.importorskip("espnet2.asr_transducer.decoder.modules.mega.multi_head_damped_ema")
    torch.manual_seed(0)
    upstream = module.MultiHeadDampedEMA(24, 4, torch.nn.SiLU(), truncation_length=truncation)
    names = (
        "damping_factor",
        "decay_factor",
        "ema_expansion_matrix",
        "kernel_projection_matrix",
        "residual_weight",
    )
    mask = Make(seed=3).uniform(2, 70) > 0.7
    x = torch.randn(70, 2, 24, requires_grad=True)
    ours = x.detach().clone().requires_grad_()
    cotangent = torch.randn(70, 2, 24)
    y, _ = upstream(x, mask=mask.unsqueeze(1))
    y.backward(cotangent)
    parameters = [getattr(upstream, name).detach().clone().requires_grad_() for name in names]
    z = ops.ema_scan(ours, *parameters, padding_mask=mask, truncation=truncation, activation="silu")
    z.backward(cotangent)
    _close(z, y, 3e-6)
    _close(ours.grad, x.grad, 3e-6)
    for name, p in zip(names, parameters, strict=True):
        _close(p.grad, getattr(upstream, name).grad, 2e-5)


def test_upstream_step():
    module = pytest.importorskip("espnet2.asr_transducer.decoder.modules.mega.multi_head_damped_ema")
    torch.manual_seed(0)
    upstream = module.MultiHeadDampedEMA(24, 4, torch.nn.SiLU())
    x, state = torch.randn(1, 3, 24), torch.randn(3, 24, 4)
    with torch.no_grad():
        y, after = upstream(x, state={"ema_state": state})
        tensors = (upstream.damping_factor, upstream.decay_factor, upstream.ema_expansion_matrix)
        tensors += (upstream.kernel_projection_matrix, upstream.residual_weight)
        ours, ours_after = ops.ema_scan(x, *tensors, state=state, return_state=True, activation="silu")
    _close(ours.reshape(3, 24), y.reshape(3, 24), 1e-6)
    _close(ours_after, after, 1e-6)


def test_lengths_do_not_recompile():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.ema_scan, fullgraph=True, backend=counter, dynamic=True)
    arguments = ema(Make(), 61, 2, 12, state=True)
    graphs = []
    with torch.no_grad():
        for length in (61, 43, 29):
            short = arguments | {"x": arguments["x"][:length].clone()}
            for a, b in zip(compiled(**short), ops.ema_scan(**short), strict=True):
                torch.testing.assert_close(a, b)
            graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], graphs
