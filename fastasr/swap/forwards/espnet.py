# SPDX-License-Identifier: Apache-2.0
"""ESPnet's attention without positions, and modules of ESPnet's and torchaudio's Conformers, which do not mask
padding."""

from typing import Any

import torch
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import plumbing
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.plain import is_plain
from fastasr.models.e_branchformer.attention import masks, normed, projections
from fastasr.models.fast_conformer.convolution import gated_convolution
from fastasr.models.fast_conformer.masks import OTHER
from fastasr.swap.forwards.beams import attention_to_frames
from fastasr.swap.forwards.common import channels_first, dropped, has_other_keys, in_sequence, in_sequential
from fastasr.swap.rule import Upstream


def espnet_attention(
    self: Upstream, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, expand_kv: bool = False
) -> Tensor:
    """Serves ESPnet's attention without positions: query, which is key and value, (B, T, width), mask (B or 1, 1 or T,
    T), 0 at hidden keys, or None -> (B, T, width). Upstream's code runs in a decoder's steps with a
    cache, and in its attention to the encoder's frames, whose projections are kept as long as the frames exist."""
    if query is not key and key is value:
        kept: Tensor = attention_to_frames(self, query, key, value, mask, expand_kv)
        return kept
    others = has_other_keys(self, query, key, value)
    dropout = None if others else _dropout_of_weights(self, query, mask, expand_kv)
    if dropout is None:
        y: Tensor = type(self).forward(self, query, key, value, mask, expand_kv)
        return y
    batch, frames = query.shape[:2]
    q, k, v = (t.unflatten(-1, (self.h, self.d_k)) for t in projections(self, query, key, value))
    q, k = normed(self, "q_norm", q), normed(self, "k_norm", k)
    hidden = masks(None if mask is None else mask.eq(0), batch, frames)
    return plumbing.linear(self.linear_out, ops.rel_attention(q, k, v, **hidden, **dropout).flatten(2))


def _dropout_of_weights(
    module: Upstream, x: Tensor, mask: Tensor | None, expand_kv: bool
) -> dict[str, Any] | None:
    fits, share = not (expand_kv or module.use_flash_attn), plumbing.dropped_share(module.dropout)
    if module.use_sdpa:
        fits = fits and (mask is None or mask.dtype == torch.bool)  # It adds other masks to the scores.
        share = module.dropout_rate if module.training else 0.0
    return dropout_of(module, share, x.device, None if fits else OTHER)


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
