# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolutions over time: the formula that several ops share, and activations and gates of the gated one."""

import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._op import Op

# With the kernels' numbers
ACTIVATIONS = {"identity": 0, "swoosh_r": 1, "silu": 2}
GATES = {"sigmoid": 0, "silu": 1}


def check_delay(op: Op, taps: int, delay: int) -> None:
    """Raises unless the taps, ⌊taps / 2⌋ + delay of them on past frames, reach the frame itself."""
    if not -(taps // 2) <= delay <= (taps - 1) // 2:
        op.fail("delay", f"{-(taps // 2)} to {(taps - 1) // 2} for {taps} taps", delay)


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
