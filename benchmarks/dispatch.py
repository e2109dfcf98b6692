# SPDX-License-Identifier: Apache-2.0
"""What a call costs besides its arithmetic: every op on a tensor of a few elements.

Rows hold milliseconds like all others; a call takes microseconds. Implementations: the eager formula, the
public function ``fastasr.ops.<name>``, and the registered operator ``torch.ops.fastasr.<name>``
("operator").
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from fastasr import ops
from fastasr.benchmarks.case import Report, Settings
from fastasr.benchmarks.harness import LoadMeter, Variant, interleave
from fastasr.benchmarks.rows import Row
from fastasr.ops.balancer_gradient import definition as balancer_gradient_definition
from fastasr.ops.bias_norm import definition as bias_norm_definition
from fastasr.ops.complex_ema_scan import definition as complex_ema_scan_definition
from fastasr.ops.ema_scan import definition as ema_scan_definition
from fastasr.ops.linear_activation import definition as linear_activation_definition
from fastasr.ops.nonlin_attention import definition as nonlin_attention_definition
from fastasr.ops.rel_attention import definition as rel_attention_definition
from fastasr.ops.residual_norm import definition as gated_residual_norm_definition
from fastasr.ops.residual_norm import definition_residual as residual_norm_definition
from fastasr.ops.rnnt_joiner import definition as rnnt_joiner_definition
from fastasr.ops.rnnt_lattice import definition as lattice_definition
from fastasr.ops.rnnt_pruned_lattice import definition as pruned_lattice_definition
from fastasr.ops.segment_attention import definition as segment_attention_definition
from fastasr.ops.toeplitz_attention import definition as toeplitz_attention_definition

NAME = "dispatch"
INFERENCE, NO_GRAD, FORWARD, BOTH = "inference mode", "no_grad", "forward", "forward+backward"
PASSES = (INFERENCE, NO_GRAD, FORWARD, BOTH)
CASE = "tiny tensor"
SHAPE = (2, 8)


@dataclass(frozen=True)
class Tiny:
    """An op's inputs at the smallest sensible size, and its three ways of being called."""

    inputs: tuple[torch.Tensor, ...]
    eager: Callable[..., torch.Tensor]
    public: Callable[..., torch.Tensor]
    operator: Callable[..., torch.Tensor]
    passes: tuple[str, ...] = PASSES


def _swoosh_linear_formula(x, weight, bias):
    return F.linear(ops.swoosh_l.definition(x), weight, bias)


def _swoosh_linear_operator(x, weight, bias):
    return torch.ops.fastasr.swoosh_linear(x, weight, bias, "SwooshL", None, -1)


def table(device: str = "cpu") -> dict[str, Tiny]:
    """Every op with its inputs on ``device``."""
    channels = SHAPE[-1]
    x, other = torch.randn(SHAPE, device=device), torch.randn(SHAPE, device=device)
    weight = torch.randn(channels, channels, device=device)
    bias, scale = torch.randn(channels, device=device), torch.rand(channels, device=device)
    log_scale = torch.tensor(0.5, device=device)
    starts = torch.zeros(1, 4, dtype=torch.int64, device=device)
    registered = torch.ops.fastasr
    joined = (
        torch.ones(1, 1, dtype=torch.int64, device=device),
        torch.zeros(1, 2, dtype=torch.int64, device=device),
    )
    limits = -0.05, 0.05, 0.2, 0.5, 0.04, -1
    return {
        "balancer_gradient": Tiny(
            (x, other),
            lambda g, x: balancer_gradient_definition(g, x, *limits),
            lambda g, x: ops.balancer_gradient(g, x, *limits),
            lambda g, x: registered.balancer_gradient(g, x, *limits),
            (INFERENCE, NO_GRAD),  # it is no function's gradient, and has none
        ),
        "swoosh_l": Tiny((x,), ops.swoosh_l.definition, ops.swoosh_l, registered.swoosh_l),
        "swoosh_r": Tiny((x,), ops.swoosh_r.definition, ops.swoosh_r, registered.swoosh_r),
        "swoosh_linear": Tiny(
            (x, weight, bias), _swoosh_linear_formula, ops.swoosh_linear, _swoosh_linear_operator
        ),
        "bias_norm": Tiny(
            (x, bias, log_scale),
            bias_norm_definition,
            ops.bias_norm,
            lambda x, b, s: registered.bias_norm(x, b, s, -1),
        ),
        "bypass": Tiny((x, other, scale), ops.bypass.definition, ops.bypass, registered.bypass),
        "ema_scan": Tiny(
            (x.unsqueeze(0), weight, weight, weight, weight, bias),
            ema_scan_definition,
            ops.ema_scan,
            lambda *tensors: registered.ema_scan(*tensors, None, None, 0, 0, 0, 0, False)[0],
        ),
        "complex_ema_scan": Tiny(
            (x.unsqueeze(0), weight, weight, bias, torch.stack((weight, weight), -1), bias),
            complex_ema_scan_definition,
            ops.complex_ema_scan,
            lambda *tensors: registered.complex_ema_scan(*tensors, None, None, 0, 0, 0, 0, False)[0],
        ),
        "gated_residual_norm": Tiny(
            (x, other, x, other, scale, bias),
            gated_residual_norm_definition,
            ops.gated_residual_norm,
            lambda x, u, c, h, w, b: registered.gated_residual_norm(x, u, c, h, None, w, b, 1e-5, 1),
        ),
        "depthwise_conv2d": Tiny(
            (torch.randn(1, 2, 1, channels, device=device), weight[:, :1, None].contiguous(), bias),
            ops.depthwise_conv2d.definition,
            ops.depthwise_conv2d,
            registered.depthwise_conv2d,
        ),
        "gated_depthwise_conv": Tiny(
            (torch.randn(2, 1, 2 * channels, device=device), weight[:, :3].contiguous(), bias),
            ops.gated_depthwise_conv.definition,
            ops.gated_depthwise_conv,
            lambda h, w, b: registered.gated_depthwise_conv(h, w, b)[0],
        ),
        "layer_norm_lstm": Tiny(
            (
                x.unsqueeze(0),
                torch.randn(4 * channels, channels, device=device),
                torch.randn(4 * channels, channels, device=device),
                torch.rand(4 * channels, device=device),
                torch.randn(4 * channels, device=device),
                scale,
                bias,
            ),
            lambda *tensors: ops.layer_norm_lstm.definition(*tensors)[0],
            lambda *tensors: ops.layer_norm_lstm(*tensors)[0],
            lambda *tensors: registered.layer_norm_lstm(*tensors, None, None, 1e-5, True)[0],
        ),
        "conv_spatial_gate": Tiny(
            (torch.randn(1, 2, 2 * channels, device=device), scale, bias, weight[:, :3].contiguous()),
            ops.conv_spatial_gate.definition,
            ops.conv_spatial_gate,
            registered.conv_spatial_gate,
        ),
        "depthwise_conv_residual": Tiny(
            (torch.randn(1, 2, channels, device=device), weight[:, :3].contiguous(), bias),
            ops.depthwise_conv_residual.definition,
            ops.depthwise_conv_residual,
            registered.depthwise_conv_residual,
        ),
        "linear": Tiny((x, weight, bias), F.linear, ops.linear, registered.linear),
        "linear_activation": Tiny(
            (x, weight, bias),
            linear_activation_definition,
            ops.linear_activation,
            lambda x, w, b: registered.linear_activation(x, w, b, 1)[0],
        ),
        "nonlin_attention": Tiny(
            (torch.rand(1, 2, 2, device=device), torch.randn(2, 1, 3 * channels, device=device)),
            nonlin_attention_definition,
            ops.nonlin_attention,
            registered.nonlin_attention,
        ),
        "rel_attention": Tiny(
            (
                *(torch.randn(1, 1, 1, channels, device=device) for _ in range(3)),
                x[:1].unsqueeze(1),
                x[:1],
                other[:1],
            ),
            rel_attention_definition,
            ops.rel_attention,
            lambda *tensors: registered.rel_attention(*tensors, None, None)[0],
        ),
        "zipformer_attention": Tiny(
            (
                torch.randn(2, 1, 5, device=device),
                torch.randn(1, 3, 1, device=device),
                torch.randn(2, 1, 3, device=device),
            ),
            lambda x, pos, v: ops.zipformer_attention.definition(x, pos, v, 1, 2),
            lambda x, pos, v: ops.zipformer_attention(x, pos, v, 1, 2),
            lambda x, pos, v: registered.zipformer_attention(x, pos, v, 1, 2),
        ),
        "zipformer_attention_weights": Tiny(
            (torch.randn(2, 1, 5, device=device), torch.randn(1, 3, 1, device=device)),
            lambda x, pos: ops.zipformer_attention_weights.definition(x, pos, 1, 2),
            lambda x, pos: ops.zipformer_attention_weights(x, pos, 1, 2),
            lambda x, pos: registered.zipformer_attention_weights(x, pos, 1, 2),
        ),
        "residual_norm": Tiny(
            (x, other, scale, bias),
            residual_norm_definition,
            ops.residual_norm,
            lambda x, u, w, b: registered.residual_norm(x, u, w, b, 1e-5),
        ),
        "rnnt_joiner": Tiny(
            (x.unsqueeze(0), other.unsqueeze(0), weight, bias),
            lambda *tensors: rnnt_joiner_definition(*tensors, *joined, s_range=1, termination_symbol=0)[1],
            lambda *tensors: ops.rnnt_joiner(*tensors, *joined, s_range=1, termination_symbol=0)[1],
            lambda *tensors: registered.rnnt_joiner(*tensors, *joined, None, 1, 0, 3, False)[1],
        ),
        "rnnt_lattice": Tiny(
            (torch.randn(1, 2, 4, device=device), torch.randn(1, 3, 3, device=device)),
            lattice_definition,
            ops.rnnt_lattice,
            lambda x, y: registered.rnnt_lattice(x, y, None, False, True)[0],
        ),
        "rnnt_pruned_lattice": Tiny(
            (torch.randn(1, 4, 2, device=device), torch.randn(1, 4, 2, device=device)),
            lambda x, y: pruned_lattice_definition(x, y, starts),
            lambda x, y: ops.rnnt_pruned_lattice(x, y, starts),
            lambda x, y: registered.rnnt_pruned_lattice(x, y, starts, None, False, False, True)[0],
        ),
        "segment_attention": Tiny(
            (x.unsqueeze(1),) * 3,
            partial(segment_attention_definition, num_heads=1, frames=len(x), segment_length=1),
            partial(ops.segment_attention, num_heads=1, frames=len(x), segment_length=1),
            lambda *tensors: registered.segment_attention(
                *tensors, None, None, None, 1, len(x), 1, 0, 0, 0, 0, 0
            ),
        ),
        "toeplitz_attention": Tiny(
            (x.unsqueeze(0), x.unsqueeze(0), other.unsqueeze(0), x, other, x[0, :1]),
            toeplitz_attention_definition,
            ops.toeplitz_attention,
            lambda *tensors: registered.toeplitz_attention(*tensors, None, None, True, 0, 1, False),
        ),
    }


def _variant(function: Callable, inputs: tuple[torch.Tensor, ...], pass_: str) -> Variant:
    if pass_ in (INFERENCE, NO_GRAD):
        return Variant(lambda: function(*inputs))
    inputs = tuple(t.detach().requires_grad_(True) for t in inputs)
    if pass_ == FORWARD:
        return Variant(lambda: function(*inputs))
    grad = torch.ones_like(function(*inputs).detach())

    def both():
        function(*inputs).backward(grad)
        for tensor in inputs:
            tensor.grad = None

    return Variant(both)


def _mode(pass_: str):
    """Entered once around the timing: entering it is not part of a call."""
    if pass_ == INFERENCE:
        return torch.inference_mode()
    return torch.set_grad_enabled(pass_ != NO_GRAD)


def measure(
    *,
    device: str = "cpu",
    settings: Settings | None = None,
    only: Callable[[str], bool] = lambda _: True,
    skip: Callable[[str, str], bool] = lambda _name, _pass: False,
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Yields the rows of one op and pass at a time. ``only(op)`` chooses ops, ``skip(op, pass)`` leaves
    out.
    """
    settings = settings or Settings()
    for name, tiny in table(device).items():
        if not only(name):
            continue
        for pass_ in tiny.passes:
            if skip(name, pass_):
                continue
            functions = {"eager": tiny.eager, "fastasr": tiny.public, "operator": tiny.operator}
            variants = {}
            with _mode(pass_):
                for implementation, function in functions.items():
                    try:
                        variant = _variant(function, tiny.inputs, pass_)
                        variant.call()
                    except Exception as error:  # reported, and the others measured
                        report(f"dispatch {name}, {pass_}: {implementation} failed: {error}")
                        continue
                    variants[implementation] = variant
                load = LoadMeter()
                timings = interleave(
                    variants,
                    reps=settings.reps,
                    warmup=20,
                    sample_seconds=settings.sample_seconds,
                    max_calls=5000,
                    device=device,
                )
            other = load.other_cores()
            yield [
                Row.measured(
                    suite="dispatch",
                    name=name,
                    case=CASE,
                    shape="x".join(map(str, SHAPE)),
                    dtype="float32",
                    device=device,
                    pass_=pass_,
                    implementation=implementation,
                    median_ms=round(timing.median * 1e3, 7),
                    q1_ms=round(timing.quartiles[0] * 1e3, 7),
                    q3_ms=round(timing.quartiles[1] * 1e3, 7),
                    reps=timing.reps,
                    load=other,
                )
                for implementation, timing in timings.items()
            ]
