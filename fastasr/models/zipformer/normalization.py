# SPDX-License-Identifier: Apache-2.0
"""BiasNorm: a normalisation that keeps a learnable part of each vector's length.

y = x * mean((x - bias)^2)^(-1/2) * exp(log_scale), where the mean is over channels and has no epsilon.
"""

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.zipformer.parameter_limits import limit_param_value


class BiasNorm(torch.nn.Module):
    """x with ``num_channels`` elements along ``channel_dim`` -> same shape.

    ``log_scale_min`` and ``log_scale_max`` limit ``log_scale`` through its gradient in training.
    ``store_output_for_backprop`` is accepted for compatibility; the backward pass always uses the input.
    """

    def __init__(
        self,
        num_channels: int,
        channel_dim: int = -1,
        log_scale: float = 1.0,
        log_scale_min: float = -1.5,
        log_scale_max: float = 1.5,
        store_output_for_backprop: bool = False,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.log_scale = torch.nn.Parameter(torch.tensor(log_scale))
        self.bias = torch.nn.Parameter(torch.empty(num_channels).normal_(std=1e-4))
        self.log_scale_min = log_scale_min
        self.log_scale_max = log_scale_max
        self.store_output_for_backprop = store_output_for_backprop

    def forward(self, x: Tensor) -> Tensor:
        log_scale = limit_param_value(
            self.log_scale,
            min=float(self.log_scale_min),
            max=float(self.log_scale_max),
            training=self.training,
        )
        return ops.bias_norm(x, self.bias, log_scale, self.channel_dim)
