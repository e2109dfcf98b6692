# SPDX-License-Identifier: Apache-2.0
"""Feed-forward block: W2 dropout(SiLU(W1 x + b1)) + b2."""

import torch

from fastasr.models.common import activations, plumbing
from fastasr.ops import _dropout


class FastConformerFeedForward(torch.nn.Module):
    """x (..., width) -> same shape. ``activation_dropout`` is the rate of the dropout between the layers."""

    def __init__(self, width, hidden, bias=True, activation_dropout=0.0):
        super().__init__()
        self.linear1 = torch.nn.Linear(width, hidden, bias=bias)
        self.activation = torch.nn.SiLU()
        self.linear2 = torch.nn.Linear(hidden, width, bias=bias)
        self.activation_dropout = activation_dropout

    def forward(self, hidden_states):
        hidden = activations.activated(self.linear1, self.activation, hidden_states)
        if self.training and self.activation_dropout > 0.0:
            hidden = _dropout.dropout(hidden, self.activation_dropout)
        return plumbing.linear(self.linear2, hidden)
