# SPDX-License-Identifier: Apache-2.0
"""Front ends of depthwise strided convolutions, by :mod:`fastasr.models.fast_conformer.subsampling`."""

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common import plumbing
from fastasr.models.common.plain import is_plain, is_plain_named
from fastasr.models.fast_conformer.subsampling import are_plain, convolved, subsampled
from fastasr.swap.rule import Upstream


def nemo_subsampling(self: Upstream, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Serves NeMo's ConvSubsampling: x (B, T₀, mel_bins), lengths (B) -> ((B, ⌈T₀ / factor⌉, width), int64 (B)).

    Frames behind a sequence's end are 0 before every convolution, in recordings of any length: upstream splits long
    recordings, and does not mask them if it splits by channel.
    """
    if self.subsampling_conv_chunking_factor == -1:
        return type(self).forward(self, x, lengths)  # This raises.
    if not (is_plain_named(self.conv, ("MaskedConvSequential",), self) and are_plain(self.conv)):
        _left.note(self, "conv or one of its layers has hooks or is no plain one")
        return type(self).forward(self, x, lengths)
    lengths = lengths.long()
    valid = torch.arange(x.shape[1], device=x.device, dtype=torch.int64) < lengths.unsqueeze(1)
    y = convolved(self.conv, x * valid.unsqueeze(2), lengths)
    return plumbing.linear(self.out, y), subsampled(self.conv, lengths)


def phi4_subsampling(self: Upstream, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Serves transformers' Phi-4-multimodal: features (B, T₀, mel_bins), mask (B, T₀), True or 1 at valid frames, or
    None -> (B, ⌈T₀ / factor⌉, width), and bool (B, 1, ⌈T₀ / factor⌉) or None. Padding is not masked."""
    if not (is_plain(self.conv, torch.nn.Sequential) and are_plain(self.conv)):
        _left.note(self, "conv or one of its layers has hooks or is no plain one")
        return type(self).forward(self, hidden_states, mask)
    y = plumbing.linear(self.out, convolved(self.conv, hidden_states, None))
    if mask is None:
        return y, None
    lengths = torch.ceil(mask.sum(1) / self.subsampling_factor)
    frame = torch.arange(y.shape[1], device=y.device, dtype=torch.int64)
    return y, (frame < lengths.unsqueeze(1)).unsqueeze(1)
