# SPDX-License-Identifier: Apache-2.0
"""Modules of the audio encoder of transformers' Phi-4-multimodal, and the encoder itself."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.plain import is_plain, runs
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import STANDARD
from fastasr.models.fast_conformer.convolution import pointwise
from fastasr.models.fast_conformer.subsampling import are_plain, convolved
from fastasr.swap.forwards.common import bias_of_pairs, channels_first, is_part, projections
from fastasr.swap.rule import Upstream


def _biases(given: Tensor, x: Tensor, heads: int) -> tuple[Tensor, Tensor | None]:
    """Returns the rows (2T − 1, H) of the bias by offset and the bias per key (B, 1, T) or None, for the numbers that
    ``phi4_encoder`` gives its layers in place of upstream's mask (B or 1, H, T, T): one tensor, whose gradient passes
    through checkpoints of layers."""
    batch, frames = x.shape[:2]
    count = (2 * frames - 1) * heads
    rows, keys = given[:count], given[count:]
    return rows.view(-1, heads), keys.view(batch, 1, frames) if keys.numel() else None


def _pairs(rows: Tensor, keys: Tensor | None) -> Tensor:
    """Returns the sum of both biases (B or 1, H, T, T)."""
    pairs = bias_of_pairs(rows).unsqueeze(0)
    return pairs if keys is None else pairs + keys.unsqueeze(2)


def phi4_attention(self: Upstream, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    """Serves the audio encoder of transformers' Phi-4-multimodal, if ``phi4_encoder`` gives it the biases: hidden
    states (B, T, width) -> same shape: s[i,j] = q_i·k_j / √d + b[j − i] + c_j."""
    implementation, reason = masks.implementation(self.config), None
    by_offset = attention_mask.ndim == 1
    if not by_offset:
        reason = "the bias has every pair of frames"
    elif implementation not in STANDARD:
        reason = masks.unread(False, implementation)
    share = self.attention_dropout if self.training else 0.0
    dropout = dropout_of(self, share, hidden_states.device, reason)
    if not by_offset:
        return type(self).forward(self, hidden_states, attention_mask, **kwargs)
    rows, keys = _biases(attention_mask, hidden_states, self.config.num_attention_heads)
    if dropout is None:
        return type(self).forward(self, hidden_states, _pairs(rows, keys), **kwargs)
    q, k, v = projections(hidden_states, (-1, self.head_dim), self.q_proj, self.k_proj, self.v_proj)
    y = ops.rel_attention(q, k, v, offset_bias=rows, key_bias=keys, **dropout)
    return plumbing.linear(self.o_proj, y.flatten(2))


def phi4_encoder(self: Upstream, hidden_states: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Serves the audio encoder of transformers' Phi-4-multimodal: features (B, T₀, mel_bins), mask (B, T₀), True or 1
    at valid frames, or None -> (B, T, width). Its layers get the bias by offset, and upstream's mask, which adds 1 to
    the scores of valid keys and hides none, as a bias per key. More than 500 frames are sequences of 500, the last of
    them filled with zeros."""
    bias = self.relative_attention_bias_layer
    if not all(runs(layer.self_attn, phi4_attention) for layer in self.encoders) or not is_part(bias, self):
        return type(self).forward(self, hidden_states, mask, **kwargs)
    # These draw from numpy's generator in training.
    y, seen_keys, valid = self.forward_embeddings(self.encoder_embedding(hidden_states), mask)
    (batch, whole, width), longest = y.shape, 500
    if whole > longest:
        missing = -whole % longest
        y = F.pad(y, (0, 0, 0, missing)).reshape(-1, longest, width)
        if valid is not None:
            valid = F.pad(valid[:, 0], (0, missing)).reshape(-1, longest)
        seen_keys = self.calculate_hs_mask(y, y.device, valid)
    frames = y.shape[1]
    offsets = torch.arange(1 - frames, frames, dtype=torch.int64, device=y.device)
    offsets = offsets.clamp(-bias.max_distance, bias.max_distance - 1)
    rows = bias.bias_values(offsets.abs() if bias.symmetric else offsets + bias.num_buckets // 2)
    given = rows.flatten()
    if valid is not None:  # All rows of the mask are the same, without chunks.
        given = torch.cat([given, seen_keys[:, 0].to(rows.dtype).flatten()])
    for layer in self.encoders:
        y = layer(y, given)
    return y.reshape(batch, -1, width)[:, :whole]


def phi4_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Phi-4-multimodal: hidden states (B, T, width) -> same shape: W3 SiLU(W2 z) of the causal
    depthwise convolution z of (a + b1) · SiLU(g + b2), (a, g) = W1 LayerNorm(x). Padding is not masked."""
    glu, separable, delay = self.glu, self.dw_sep_conv_1d, None
    if is_part(glu, self) and is_part(separable, self):
        first, depthwise, second = glu.ext_pw_conv_1d, separable.dw_conv, separable.pw_conv
        fused = all(activations.fused_name(a) == "silu" for a in (glu.glu_act, self.act))
        if fused and all(map(plumbing.is_pointwise_conv1d, (first, second))):
            delay = plumbing.conv_delay(depthwise, causal=True)
    if delay is None:
        _left.note(self, "a part has hooks or is no plain one, or an activation is not SiLU")
        return type(self).forward(self, hidden_states)
    shift = torch.cat([glu.b1, glu.b2], 1).flatten()
    bias = shift if first.bias is None else first.bias + shift
    h = ops.linear(self.layer_norm(hidden_states), first.weight.flatten(1), bias).transpose(0, 1)
    z = ops.gated_depthwise_conv(
        h, depthwise.weight, depthwise.bias, delay=delay, activation="identity", gate="silu"
    ).transpose(0, 1)
    z = ops.linear_activation(z, second.weight.flatten(1), second.bias, "silu")
    y = pointwise(self.ext_pw_conv_1d, z)
    return y if plumbing.is_idle(self.dropout) else self.dropout(channels_first(self, y))


def phi4_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Phi-4-multimodal, whose LayerNorm comes first: hidden states (..., width) -> same shape: W2
    (a · SiLU(g)) for (a, g) = W1 LayerNorm(x)."""
    x = self.layer_norm(hidden_states)
    hidden = activations.dropped(self.gate_up_proj, self.act_fn, self.dropout, x, gated=True)
    y = plumbing.linear(self.down_proj, hidden)
    return plumbing.dropout(self.dropout, y)


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
