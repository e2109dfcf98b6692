# SPDX-License-Identifier: Apache-2.0
"""Modules of ESPnet's and torchaudio's Conformers. Padding is not masked."""

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common.plain import is_plain
from fastasr.models.fast_conformer.convolution import gated_convolution
from fastasr.swap.forwards.common import channels_first, dropped, in_sequence
from fastasr.swap.rule import Upstream


def espnet_convolution(self: Upstream, x: Tensor) -> Tensor:
    """Serves ESPnet's Conformer: x (B, T, width) -> same shape."""
    y = gated_convolution(
        x, self.pointwise_conv1, self.depthwise_conv, self.norm, self.activation, self.pointwise_conv2
    )
    return channels_first(self, y)


def torchaudio_convolution(self: Upstream, input: Tensor) -> Tensor:
    """Serves torchaudio's Conformer: input (B, T, width) -> same shape."""
    first, gate, *rest, dropout = self.sequential
    if not is_plain(self.sequential, torch.nn.Sequential) or not is_plain(gate, torch.nn.GLU):
        _left.note(self, "sequential or its glu is not a plain one")
        return type(self).forward(self, input)
    return dropped(dropout, gated_convolution(self.layer_norm(input), first, *rest))


def torchaudio_feed_forward(self: Upstream, input: Tensor) -> Tensor:
    """Serves torchaudio's Conformer, whose LayerNorm comes first: input (..., width) -> same shape."""
    if not is_plain(self.sequential, torch.nn.Sequential):
        _left.note(self, "sequential is not a plain Sequential")
        return type(self).forward(self, input)
    norm, *layers = self.sequential
    return in_sequence(layers, norm(input))
