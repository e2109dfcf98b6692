# SPDX-License-Identifier: Apache-2.0
"""swoosh_linear: the feed-forward modules of Zipformer-M's stacks 0 and 3.

Forward is inference without dropout. The passes with gradients are a training step: dropout 0.1 with a mask shared over
time, as upstream trains.
"""

from functools import partial

import torch
import torch.nn.functional as F

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    FRAMES,
    Case,
    Implementation,
    compiled,
    costs,
    parameters,
    upstream_member,
)  # fmt: skip

DROPOUT = 0.1


def formula(x, weight, bias, dropout_p: float) -> torch.Tensor:
    """Computes linear(mask * swoosh_l(x)); the mask is shared over the first dimension, time."""
    y = ops.swoosh_l.definition(x)
    if dropout_p > 0:
        shape = (1, *x.shape[1:])
        y = y * ((torch.rand(shape, device=x.device, dtype=x.dtype) > dropout_p) * (1 / (1 - dropout_p)))
    return F.linear(y, weight, bias)


def _formula(function, x, weight, bias) -> Implementation:
    return Implementation(
        lambda: function(x, weight, bias, DROPOUT),
        parameters(x, weight, bias),
        inference=lambda: function(x, weight, bias, 0.0),
    )


def _fastasr(x, weight, bias) -> Implementation:
    def call(training: bool):
        return ops.swoosh_linear(
            x, weight, bias, kind="SwooshL", dropout_p=DROPOUT, dropout_shared_dim=0, training=training
        )

    return Implementation(lambda: call(True), parameters(x, weight, bias), inference=lambda: call(False))


def _upstream(x, weight, bias) -> Implementation:
    cls = upstream_member("zipformer.modules.scaling.ActivationDropoutAndLinear")
    outputs, inputs = weight.shape
    build = partial(cls, inputs, outputs, activation="SwooshL", dropout_p=DROPOUT, dropout_shared_dim=0)
    training, inference = build().to(x), build().to(x).eval()
    for module in (training, inference):
        module.weight = torch.nn.Parameter(weight.detach())
        module.bias = torch.nn.Parameter(bias.detach())
    return Implementation(
        lambda: training(x), parameters(x, training.weight, training.bias), inference=lambda: inference(x)
    )


def _make(shape: tuple[int, ...], outputs: int, device: str, dtype: torch.dtype):
    inputs = shape[-1]
    x = torch.randn(shape, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
    bias = torch.randn(outputs, device=device, dtype=dtype)
    return {
        "eager": lambda: _formula(formula, x, weight, bias),
        "compile": lambda: _formula(compiled(formula), x, weight, bias),
        "upstream": lambda: _upstream(x, weight, bias),
        "fastasr": lambda: _fastasr(x, weight, bias),
    }


def _case(shape: tuple[int, ...], outputs: int) -> Case:
    text, inputs, rows = "x".join(map(str, shape)), shape[-1], torch.Size(shape[:-1]).numel()
    product, weight = 2 * rows * inputs * outputs, inputs * outputs
    forward = rows * inputs + weight + rows * outputs
    passes = costs((forward, product), (forward + rows * inputs + weight, 2 * product))
    return Case("swoosh_linear", f"{text}->{outputs}", text, partial(_make, shape, outputs), passes)


CASES = (_case((796, 4, 512), 192), _case((100, 4, 1536), 512))
ON_DEVICE = (_case((FRAMES, BATCH, 512), 192), _case((FRAMES, BATCH, 1536), 512))
