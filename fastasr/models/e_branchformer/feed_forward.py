# SPDX-License-Identifier: Apache-2.0
"""Feed-forward block: W2 dropout(act(W1 x + b1)) + b2."""

import torch
from torch import Tensor

from fastasr.models.common import activations, plumbing


class PositionwiseFeedForward(torch.nn.Module):
    """x (..., idim) -> same shape."""

    def __init__(
        self, idim: int, hidden_units: int, dropout_rate: float, activation: str | torch.nn.Module = "relu"
    ) -> None:
        super().__init__()
        self.w_1 = torch.nn.Linear(idim, hidden_units)
        self.w_2 = torch.nn.Linear(hidden_units, idim)
        self.dropout = torch.nn.Dropout(dropout_rate)
        self.activation = activations.instance("PositionwiseFeedForward", "activation", activation)

    def forward(self, x: Tensor) -> Tensor:
        return plumbing.linear(self.w_2, activations.dropped(self.w_1, self.activation, self.dropout, x))
