# SPDX-License-Identifier: Apache-2.0
"""Feed-forward block: W2 dropout(SiLU(W1 x + b1)) + b2."""

from typing import Any

import torch
from torch import Tensor

from fastasr._transforms import Function
from fastasr.models.common import activations, plumbing
from fastasr.ops import _dropout, _gemm
from fastasr.ops._activation import NUMBERS
from fastasr.ops._linear import bias_grad
from fastasr.ops._register import refuse_double_backward
from fastasr.ops._runtime import not_a_view


class FastConformerFeedForward(torch.nn.Module):
    """x (..., width) -> same shape. ``activation_dropout`` is the rate of the dropout between the layers."""

    def __init__(self, width: int, hidden: int, bias: bool = True, activation_dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = torch.nn.Linear(width, hidden, bias=bias)
        self.activation = torch.nn.SiLU()
        self.linear2 = torch.nn.Linear(hidden, width, bias=bias)
        self.activation_dropout = activation_dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        dropout = self.activation_dropout if self.training else 0.0
        if _is_served(self, hidden_states, dropout):
            first, second = self.linear1, self.linear2
            number = NUMBERS[activations.fused_name(self.activation)]
            return _Trained.apply(
                hidden_states, first.weight, first.bias, second.weight, second.bias, number, dropout
            )
        hidden = activations.dropped(self.linear1, self.activation, dropout, hidden_states)
        return plumbing.linear(self.linear2, hidden)


def _is_served(module: FastConformerFeedForward, x: Tensor, dropout: float) -> bool:
    """Says whether this is a training step with dropout whose layers the kernels compute."""
    if not (dropout and torch.is_grad_enabled() and x.numel()) or torch.is_autocast_enabled("cpu"):
        return False
    layers = module.linear1, module.linear2
    if activations.fused_name(module.activation) is None or not all(map(plumbing.is_plain_linear, layers)):
        return False
    parameters = (p for layer in layers for p in (layer.weight, layer.bias) if p is not None)
    return _dropout.serves(dropout, x, *parameters)


class _Trained(Function):
    """Keeps W1 x + b1 and which elements dropout kept. The second layer's input is as large, and backward computes it
    again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        activation: int,
        p: float,
    ) -> Tensor:
        z = _gemm.forward(x, weight1, bias1).contiguous()
        keep = _dropout.drawn(torch.ops.fastasr_cpu.dropout_keep.default, (z,), p)
        ctx.save_for_backward(x, weight1, weight2, z, keep)
        ctx.options = activation, p
        return not_a_view(_gemm.forward(_hidden(z, activation, keep, p), weight2, bias2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_double_backward("linear_activation")
        x, weight1, weight2, z, keep = ctx.saved_tensors
        activation, p = ctx.options
        needs, grad = ctx.needs_input_grad, grad.contiguous()
        dweight2 = _gemm.weight_grad(grad, _hidden(z, activation, keep, p)) if needs[3] else None
        dz = _gemm.input_grad(grad, weight2)
        backward = torch.ops.fastasr_cpu.linear_activation_backward.default
        dz, dbias1 = backward(dz, z, activation, needs[2], False, p, None, keep)
        return (
            _gemm.input_grad(dz, weight1) if needs[0] else None,
            _gemm.weight_grad(dz, x) if needs[1] else None,
            dbias1 if needs[2] else None,
            dweight2,
            bias_grad(grad) if needs[4] else None,
            None,
            None,
        )


def _hidden(z: Tensor, activation: int, keep: Tensor, p: float) -> Tensor:
    return torch.ops.fastasr_cpu.linear_activation_forward.default(z, activation, False, False, p, None, keep)
