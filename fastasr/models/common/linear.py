# SPDX-License-Identifier: Apache-2.0
"""A linear layer that calls ``fastasr.ops.linear``."""

import torch
from torch import Tensor

from fastasr import ops


class Linear(torch.nn.Linear):
    """x (..., in_features) -> x W^T + b (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)
