# SPDX-License-Identifier: Apache-2.0
"""Changes the frame rate by an integer factor.

down: y[t] = sum_i softmax(bias)[i] x[ds t + i]         the last frame is repeated up to a multiple of ds
up:   y[t] = x[t // ds]
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.zipformer.schedules import FloatLike
from fastasr.ops import _row


class SimpleDownsample(torch.nn.Module):
    """(time, batch, channels) -> (ceil(time / downsample), batch, channels).

    ``channels``, ``dropout`` and ``causal`` are accepted for compatibility and have no effect.
    """

    def __init__(self, channels: int, downsample: int, dropout: FloatLike, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.bias = torch.nn.Parameter(torch.zeros(downsample))
        self.name = None
        self.dropout = copy.deepcopy(dropout)
        self.downsample = downsample

    def forward(self, src: Tensor) -> Tensor:
        return _row.averaged(src, None, self.bias.softmax(dim=0))


class SimpleUpsample(torch.nn.Module):
    """(time, batch, channels) -> (time * upsample, batch, channels). It repeats each frame."""

    def __init__(self, num_channels: int, upsample: int) -> None:
        super().__init__()
        self.upsample = upsample

    def forward(self, src: Tensor) -> Tensor:
        frames, batch, channels = src.shape
        repeated = src.unsqueeze(1).expand(frames, self.upsample, batch, channels)
        return repeated.reshape(frames * self.upsample, batch, channels)


def convert_num_channels(x: Tensor, num_channels: int) -> Tensor:
    """Cuts the last dimension of x to ``num_channels`` channels or pads it with zeros. The result is contiguous,
    because a stack reads it several times, forward and backward.
    """
    missing = num_channels - x.shape[-1]
    if missing > 0:
        return F.pad(x, (0, missing))
    return (x[..., :num_channels] if missing else x).contiguous()
