# SPDX-License-Identifier: Apache-2.0
"""SiLU and GELU of a number like -1e30 are 0, and so are their slopes, whatever multiplies them."""

import pytest
import torch

from fastasr import ops

FAR = -1e30


def _zeros(*shape):
    return torch.zeros(shape, requires_grad=True)


def _filled(value, *shape):
    return torch.full(shape, value, requires_grad=True)


def _linear(activation):
    weight = torch.tensor([[1e30], [FAR]], requires_grad=True)
    return ops.linear_activation(torch.ones(1, 1), weight, None, activation, True), weight, 1e30


def _scan(activation):
    x, residual = _filled(1e30, 4, 1, 20), _filled(-1.0, 20)
    none = [torch.zeros(20, 2) for _ in range(4)]
    return ops.ema_scan(x, *none, residual, activation=activation), residual, 1.0


def _convolution(activation):
    h, bias = _zeros(4, 1, 40), _filled(FAR, 20)
    return ops.gated_depthwise_conv(h, torch.zeros(20, 3), bias, activation=activation), bias, 1e30


def _gate(_):
    h = torch.cat([torch.full((4, 1, 20), 1e30), torch.full((4, 1, 20), FAR)], -1).requires_grad_()
    return ops.gated_depthwise_conv(h, torch.ones(20, 1), activation="identity", gate="silu"), h, 1e30


@pytest.mark.parametrize(
    ("call", "activation"),
    [(f, name) for f in (_linear, _scan) for name in ("silu", "gelu")]
    + [(_convolution, "silu"), (_gate, "silu")],
)
def test_nothing_comes_back(call, activation):
    y, leaf, factor = call(activation)
    (gradient,) = torch.autograd.grad(y, leaf, torch.full_like(y, factor))
    assert not y.any()
    assert not gradient.any()
