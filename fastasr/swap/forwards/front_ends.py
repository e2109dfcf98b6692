# SPDX-License-Identifier: Apache-2.0
"""Front ends whose convolutions have all channels as input. Only NeMo's masks padding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common.convolutions import are_plain, convolved, in_sequence, projected
from fastasr.models.common.plain import is_plain_named
from fastasr.models.e_branchformer.subsampling import CONVOLUTIONS, subsampled
from fastasr.swap.rule import Upstream


def espnet_subsampling(kind: str) -> Callable:
    """Returns the forward of ESPnet's input layer of this name: x (B, T, idim), x_mask (B, 1, T) or None -> what
    ``out`` returns for the frames (B, T', width), and x_mask (B, 1, T')."""

    def forward(self: Upstream, x: Tensor, x_mask: Tensor | None) -> tuple[Any, Tensor | None]:
        return subsampled(self, CONVOLUTIONS[kind], x, x_mask)

    return forward


def gigaam_subsampling(self: Upstream, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Serves GigaAM's StridingSubsampling: x (B, T, features), lengths (B) -> (B, T', width), int32 (B)."""
    y = projected(self.out, in_sequence(self.conv, x.unsqueeze(1)))
    return y, self.calc_output_length(lengths)


def nemo_striding(self: Upstream, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Serves NeMo's ConvSubsampling of the kind striding: x (B, T, mel_bins), lengths (B) -> (B, T', width), int64 (B).

    Frames behind a sequence's end are 0 before every convolution and in the output.
    """
    conv = self.conv
    if self.subsampling_conv_chunking_factor == -1:
        return type(self).forward(self, x, lengths)  # This raises.
    if not (is_plain_named(conv, ("MaskedConvSequential",), self) and are_plain(conv)):
        _left.note(self, "conv or one of its layers has hooks or is no plain one")
        return type(self).forward(self, x, lengths)
    lengths = lengths.long()

    def within(maps: Tensor) -> Tensor:
        frames = torch.arange(maps.shape[2], device=maps.device, dtype=torch.int64)
        return maps.masked_fill_((frames >= lengths.unsqueeze(1))[:, None, :, None], 0.0)

    def behind(layer: Upstream, maps: Tensor) -> Tensor:
        nonlocal lengths
        lengths = (lengths + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
        return within(maps)

    maps = convolved(conv, within(x.unsqueeze(1).clone()), behind)
    return projected(self.out, maps), lengths
