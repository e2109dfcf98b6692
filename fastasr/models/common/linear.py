# SPDX-License-Identifier: Apache-2.0
"""A linear layer that calls ``fastasr.ops.linear``."""

from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import repeated_inputs


class Linear(torch.nn.Linear):
    """x (..., in_features) -> x W^T + b (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        if repeated_inputs.thread.layers:
            return repeated_inputs.result(self, x, _product)
        return ops.linear(x, self.weight, self.bias)


def _product(layer: Any, x: Tensor) -> Tensor:
    return ops.linear(x, layer.weight, layer.bias)
