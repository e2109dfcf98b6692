# SPDX-License-Identifier: Apache-2.0
"""Feed-forward block with the normalisation after the sum: y = norm(x + W2 act(W1 x + b1) + b2)."""

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import plumbing
from fastasr.models.mega import activations, normalizations


class NormalizedPositionwiseFeedForward(torch.nn.Module):
    """x (..., size) -> same shape."""

    def __init__(
        self,
        size: int,
        hidden_size: int,
        normalization: torch.nn.Module | type[torch.nn.Module] = torch.nn.LayerNorm,
        activation: torch.nn.Module | type[torch.nn.Module] = torch.nn.ReLU,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear1 = torch.nn.Linear(size, hidden_size)
        self.linear2 = torch.nn.Linear(hidden_size, size)
        self.normalization = normalizations.instance(normalization, size)
        self.activation = activations.instance(activation)
        self.dropout = torch.nn.Dropout(p=dropout_rate)
        self.hidden_dropout = torch.nn.Dropout(p=dropout_rate)
        self.reset_parameters()

    def reset_parameters(self, val: float = 0.0, std: float = 0.02) -> None:
        for linear in (self.linear1, self.linear2):
            torch.nn.init.normal_(linear.weight, mean=val, std=std)
            torch.nn.init.constant_(linear.bias, val)

    def forward(self, x: Tensor) -> Tensor:
        hidden = activations.dropped(self.linear1, self.activation, self.hidden_dropout, x)
        y = plumbing.linear(self.linear2, hidden)
        y = plumbing.dropout(self.dropout, y)
        norm = self.normalization
        if plumbing.is_layer_norm(norm):
            return ops.residual_norm(x, y, norm.weight, norm.bias, norm.eps)
        return norm(x + y)
