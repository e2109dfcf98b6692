# SPDX-License-Identifier: Apache-2.0
"""Modules of FunASR's encoders, and of transformers' Fun-ASR-Nano: attention with a memory of the values (Gao et al.,
"SAN-M", 2020), the memory alone, and a feed-forward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.plain import is_plain
from fastasr.swap.forwards.common import channels_first, dropped
from fastasr.swap.rule import Upstream


def sanm_attention(
    self: Upstream,
    x: Tensor,
    mask: Tensor | None,
    mask_shfit_chunk: Tensor | None = None,
    mask_att_chunk_encoder: Tensor | None = None,
) -> Tensor:
    """Serves FunASR's attention without positions, with its memory: x (B, T, channels), mask (B, 1, T), 0 at padding
    and 1 elsewhere, or None -> (B, T, width)."""
    conv, pad, delay, reason = self.fsmn_block, self.pad_fn, None, None
    if is_plain(pad, torch.nn.ConstantPad1d) and pad.value == 0.0:
        delay = plumbing.conv_delay(conv, around=pad.padding)
    if delay is None:
        reason = "fsmn_block or pad_fn has hooks or is no plain one"
    elif (
        mask_shfit_chunk is not None
        or mask_att_chunk_encoder is not None
        or (mask is not None and mask.shape != (len(x), 1, x.shape[1]))
    ):
        reason = "masks of chunks, or a mask that is not (B, 1, T)"
    dropout = dropout_of(self, plumbing.dropped_share(self.dropout), x.device, reason)
    if delay is None or dropout is None:
        return type(self).forward(self, x, mask, mask_shfit_chunk, mask_att_chunk_encoder)
    hidden = None if mask is None else mask[:, 0].eq(0)
    q, k, v = plumbing.linear(self.linear_q_k_v, x).chunk(3, -1)
    memory = ops.depthwise_conv_residual(v, conv.weight, conv.bias, padding_mask=hidden, delay=delay)
    memory = dropped(self.dropout, memory)
    if hidden is not None:
        memory = memory.masked_fill(hidden.unsqueeze(-1), 0.0)
    q, k, v = (t.unflatten(-1, (self.h, self.d_k)) for t in (q, k, v))
    y = ops.rel_attention(q, k, v, key_padding_mask=hidden, **dropout)
    return plumbing.linear(self.linear_out, y.flatten(2)) + memory


def fun_asr_memory(self: Upstream, hidden_states: Tensor, input_features_mask: Tensor) -> Tensor:
    """Serves the memory of transformers' Fun-ASR-Nano (FSMN), without a gate: hidden states (B, T, width), mask (B, T),
    1 at valid frames -> same shape: u plus its depthwise convolution, with u 0 at padding."""
    u = hidden_states * input_features_mask.unsqueeze(-1).to(hidden_states.dtype)
    conv, pad = self.conv, self.pad
    odd = is_plain(pad, torch.nn.ConstantPad1d) and pad.value == 0.0 and pad.padding[0] == pad.padding[1]
    if not odd or plumbing.conv_delay(conv, around=pad.padding) != 0:
        _left.note(self, "conv or pad has hooks, or has an even number of taps")
        return type(self).forward(self, hidden_states, input_features_mask)
    y = channels_first(self, ops.depthwise_conv_residual(u, conv.weight, conv.bias))
    return F.dropout(y, self.dropout) if self.training and self.dropout else y


def fun_asr_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Fun-ASR-Nano: hidden states (..., width) -> same shape."""
    rate = self.hidden_dropout if self.training else 0.0
    hidden = activations.dropped(self.fc1, self.activation_fn, rate, hidden_states)
    hidden = plumbing.linear(self.fc2, hidden)
    return F.dropout(hidden, rate) if rate else hidden
