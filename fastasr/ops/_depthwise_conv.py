# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolutions over time: the formula that several ops share, and the activations of the gated one."""

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"identity": 0, "swoosh_r": 1, "silu": 2}  # with the kernels' numbers


def depthwise_conv(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the T frames of the depthwise convolution of u (B, C, T + K - 1)."""
    channels, taps = weight.shape[0], weight.shape[-1]
    frames = u.shape[2] - taps + 1
    if not channels:  # torch refuses a convolution of no groups
        empty = weight.reshape(0, taps).sum(1, keepdim=True)
        return u[..., :frames] + (empty if bias is None else empty + bias.unsqueeze(1))
    if not frames:  # torch refuses a convolution to no frames
        u = F.pad(u, (0, 1))
    return F.conv1d(u, weight.reshape(channels, 1, taps), bias, groups=channels)[..., :frames]
