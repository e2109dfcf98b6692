# SPDX-License-Identifier: Apache-2.0
"""Modules of SpeechBrain's Conformer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.plain import is_plain
from fastasr.models.fast_conformer.attention import projected
from fastasr.models.fast_conformer.convolution import pointwise
from fastasr.models.fast_conformer.masks import OTHER
from fastasr.swap.forwards.common import in_sequential, is_mask, is_one_table
from fastasr.swap.rule import Upstream


def speechbrain_attention(
    self: Upstream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_embs: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    return_attn_weights: bool = True,
) -> Tensor | tuple[Tensor, Any]:
    """Serves SpeechBrain's RelPosMHAXL, which divides scores by √width. query, which is key and value, (B, T, width),
    position embeddings (1, 2T − 1, width), masks bool (B, T) and (T, T), True at hidden keys, or None -> (B, T, width),
    and None for the weights if they are asked for."""
    batch, frames = query.shape[:2]
    fits = query is key is value and is_one_table(pos_embs, frames)
    fits = fits and is_mask(key_padding_mask, batch, frames) and is_mask(attn_mask, frames, frames)
    share, reason = plumbing.dropped_share(self.dropout_att), None if fits else OTHER
    dropout = dropout_of(self, share, query.device, reason)
    if dropout is None:
        return type(self).forward(
            self, query, key, value, pos_embs, key_padding_mask, attn_mask, return_attn_weights
        )
    heads, scale = self.num_heads, self.num_heads**-0.5
    u, w = (bias.view(heads, self.head_dim) * scale for bias in (self.pos_bias_u, self.pos_bias_v))
    q, k, v = ops.linear(query, self.in_proj_weight).view(batch, frames, heads, -1).chunk(3, -1)
    if self.vbias is not None:
        v = v + self.value_bias_weight.view(heads, self.vhead_dim)
    p = projected(self, self.linear_pos, pos_embs[0]).view(-1, heads, self.head_dim)
    hidden: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    y = ops.rel_attention(q * scale, k, v, p, u, w, **hidden, **dropout)
    out = plumbing.linear(self.out_proj, y.flatten(2))
    return (out, None) if return_attn_weights else out


def speechbrain_convolution(
    self: Upstream, x: Tensor, mask: Tensor | None = None, dynchunktrain_config: Upstream = None
) -> Tensor:
    """Serves SpeechBrain's Conformer, with LayerNorm as norm: x (B, T, width), mask (bool (B, T, 1), True where the
    result is 0) or None -> (B, T, width). With dynamic chunks (Li et al., "Dynamic chunk convolution for unified
    streaming and non-streaming Conformer ASR", 2023) the taps on later frames see only the same chunk."""
    before, after = in_sequential(self.bottleneck, 2), in_sequential(self.after_conv, 4)
    chunk_size = None if dynchunktrain_config is None else dynchunktrain_config.chunk_size
    if (
        before is None
        or after is None
        or not is_plain(before[1], torch.nn.GLU)
        or (delay := plumbing.conv_delay(self.conv, self.causal)) is None
        or (chunk_size is not None and delay)
    ):
        _left.note(self, "a part has hooks, its convolution is no plain one, or is causal within chunks")
        return type(self).forward(self, x, mask, dynchunktrain_config)
    norm, activation, last, dropout = after
    h = pointwise(before[0], self.layer_norm(x)).transpose(0, 1)
    if chunk_size is None:
        form: dict[str, Any] = {"weight": self.conv.weight, "delay": delay}
    else:
        form = _within_chunks(self.conv.weight, chunk_size)
    z = ops.gated_depthwise_conv(h, bias=self.conv.bias, activation="identity", **form).transpose(0, 1)
    y = plumbing.linear(last, activations.norm_activated(norm, activation, z))
    if chunk_size is not None and not plumbing.is_idle(dropout):  # upstream draws for whole chunks
        frames = y.shape[1]
        y = plumbing.dropout(dropout, F.pad(y, (0, 0, 0, -frames % chunk_size)))[:, :frames]
    else:
        y = plumbing.dropout(dropout, y)
    return y if mask is None else y.masked_fill(mask, 0.0)


def _within_chunks(weight: Tensor, chunk_size: int) -> dict[str, Any]:
    """Returns the arguments of ``ops.gated_depthwise_conv`` for taps (C, 1, K) whose last ⌊K / 2⌋ stay in the chunk."""
    past = weight.shape[-1] // 2 + 1
    return {
        "weight": F.pad(weight[..., past:], (past, 0)),
        "causal_weight": weight[..., :past],
        "chunk_scale": weight.new_zeros(2, len(weight), weight.shape[-1]),
        "chunk_size": chunk_size,
    }


def speechbrain_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves SpeechBrain's positionwise feed-forward, without the last dropout: x (B, T, width) -> same shape."""
    layers = in_sequential(self.ffn, 4)
    if layers is None:
        _left.note(self, "ffn is not a plain Sequential of 4 modules")
        return type(self).forward(self, x)
    first, activation, dropout, last = layers
    if plumbing.is_idle(dropout):
        return plumbing.linear(last, activations.activated(first, activation, x))
    found = activations.dropped_in_kernel(first, activation, dropout, x)
    if found is not None:
        return plumbing.linear(last, found)
    hidden = activations.activated(first, activation, x.transpose(0, 1))  # upstream draws in this order
    return plumbing.linear(last, plumbing.dropout(dropout, hidden)).transpose(0, 1)
