# SPDX-License-Identifier: Apache-2.0
"""Modules of ESPnet's and torchaudio's Conformers. Padding is not masked."""

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common.plain import is_plain
from fastasr.models.fast_conformer.convolution import gated_convolution
from fastasr.swap.forwards.common import channels_first, dropped, in_sequence, in_sequential
from fastasr.swap.rule import Upstream


def espnet_convolution(self: Upstream, x: Tensor) -> Tensor:
    """Serves ESPnet's Conformer: x (B, T, width) -> same shape."""
    y = gated_convolution(
        x, self.pointwise_conv1, self.depthwise_conv, self.norm, self.activation, self.pointwise_conv2
    )
    return channels_first(self, y)


def torchaudio_convolution(self: Upstream, input: Tensor) -> Tensor:
    """Serves torchaudio's Conformer: input (B, T, width) -> same shape."""
    layers = in_sequential(self.sequential, 7)
    if layers is None or not is_plain(layers[1], torch.nn.GLU):
        _left.note(self, "sequential or its glu is not a plain one")
        return type(self).forward(self, input)
    first, _, *rest, dropout = layers
    return dropped(dropout, gated_convolution(self.layer_norm(input), first, *rest))


def torchaudio_feed_forward(self: Upstream, input: Tensor) -> Tensor:
    """Serves torchaudio's Conformer, whose LayerNorm comes first: input (..., width) -> same shape."""
    layers = in_sequential(self.sequential, 6)
    if layers is None:
        _left.note(self, "sequential is not a plain Sequential of 6 modules")
        return type(self).forward(self, input)
    return in_sequence(layers[1:], layers[0](input))
