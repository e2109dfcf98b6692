# SPDX-License-Identifier: Apache-2.0
"""Modules of torchaudio's wav2vec 2.0, HuBERT and WavLM."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastasr import ops
from fastasr._transforms import is_transformed
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.convolutions import over_time
from fastasr.models.common.plain import is_plain, weight_and_bias
from fastasr.models.fast_conformer.masks import OTHER
from fastasr.ops import _kept
from fastasr.swap.forwards import transformers_conformer, waveforms, wavlm, whisper
from fastasr.swap.forwards.common import bias_of_pairs, drops, is_part, may_read
from fastasr.swap.rule import Upstream

_GELU = torch.nn.GELU()  # Upstream's forwards call the function.
_BY_OFFSET = "by offset"  # Stands in the place of a mask, which WavLM does not take.
_HIDDEN = -9984.0  # -1e4 in bfloat16: the weight of a key with such a score is 0


# --------------------------------------------------------------------------- convolutions
def convolution(self: Upstream, x: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Serves a layer on the waveform: x (B, C, T), lengths (B,) or None -> ((B, C', T'), lengths)."""
    y, norm = over_time(self.conv, x), self.layer_norm
    if norm is None:
        y = _GELU(y)
    elif _is_layer_norm(norm, self):
        y = ops.norm_activation(
            y.transpose(1, 2), norm.weight, norm.bias, eps=norm.eps, activation="gelu"
        ).transpose(1, 2)
    else:
        y = waveforms.channels_activated(norm, _GELU, y)
    if length is not None:
        length = torch.div(length - self.kernel_size, self.stride, rounding_mode="floor") + 1
        length = length.clamp(min=0)
    return y, length


def _is_layer_norm(norm: Upstream, owner: Upstream) -> bool:
    """Says whether this is upstream's LayerNorm over the channels of (B, C, T)."""
    return (
        type(norm).__name__ == "LayerNorm"
        and is_part(norm, owner)
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
    )


def positions(self: Upstream, x: Tensor) -> Tensor:
    """Serves the convolution whose result is added as positions: x (B, T, width) -> same shape."""
    y = over_time(self.conv, x.transpose(-2, -1))
    if self.num_remove > 0:
        y = y[..., : -self.num_remove]
    y = _GELU(y)
    return y.transpose(-2, -1)


# --------------------------------------------------------------------------- attention, feed-forward
def attention(
    self: Upstream,
    x: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Serves the attention without positions: x (B, T, width), attention mask (B, 1, T, T), which is added to the
    scores, 0 or about -10000 by key, -> ((B, T, width), None)."""
    fits = x.ndim == 3 and x.shape[2] == self.embed_dim
    hidden, reason = None, "" if fits else OTHER
    if fits and attention_mask is not None:
        hidden, reason = _hidden_keys(attention_mask, *x.shape[:2])
    dropout = drops(self, x, not reason, reason)
    if dropout is None:
        return type(self).forward(self, x, attention_mask, position_bias, key_padding_mask)
    keys = {} if hidden is None else {"key_padding_mask": hidden}
    return whisper.attention(self, x, keys | dropout), None


def _hidden_keys(mask: Tensor, batch: int, frames: int) -> tuple[Tensor | None, str]:
    """Returns bool (B, T), True at keys that the mask hides from all queries, and "", or None and the reason why
    upstream's code serves the call."""
    fits = mask.shape == (batch, 1, frames, frames) and mask.is_floating_point()
    if not fits or mask.requires_grad or not may_read(mask) or is_transformed():
        return None, OTHER
    # On a CPU, reading it anew for every layer is a small part of the work.
    version = object() if mask.is_cpu else _kept.content(mask)
    return _kept.on(mask, "_fastasr_hidden", version, partial(_read, mask))


def _read(mask: Tensor) -> tuple[Tensor | None, str]:
    keys = mask[:, 0, :1]  # [B, 1, T]
    hidden = keys <= _HIDDEN
    by_key = mask.stride(2) == 0 or torch.equal(mask, keys.unsqueeze(1).expand_as(mask))
    if not by_key or not bool((hidden | (keys == 0)).all()):
        return None, OTHER
    # Upstream adds the same number to all scores of a recording without frames, so that its queries see all keys.
    return (None, "a query sees no key") if bool(hidden.all(2).any()) else (hidden.squeeze(1), "")


def feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves the feed-forward: x (..., width) -> same shape."""
    return transformers_conformer.feed_forward(self, _GELU, x)


# --------------------------------------------------------------------------- WavLM
def wavlm_attention(
    self: Upstream,
    query: Tensor,
    key_padding_mask: Tensor | None = None,
    attention_mask: Any = None,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Serves WavLM's attention: query (B, T, width) -> ((B, T, width), position bias). The first layer makes the bias:
    (2T − 1, H) for the other layers if the mask is ``_BY_OFFSET``, or upstream's (B, H, T, T)."""
    batch, rows, reason = len(query), position_bias, None
    by_offset = isinstance(attention_mask, str)
    mask = None if by_offset else attention_mask
    if key_padding_mask is not None or mask is not None or query.ndim != 3:
        reason = OTHER
    elif rows is not None and rows.ndim != 2:
        reason = "the position bias has every pair of frames"
    dropout = dropout_of(self, self.dropout if self.training else 0.0, query.device, reason)
    upstream = partial(type(self).forward, self, query, key_padding_mask, mask)
    if dropout is None:
        if rows is None or rows.ndim != 2:
            return upstream(position_bias)
        return upstream(_pairs(rows, batch))[0], rows
    if rows is None and self.rel_attn_embed is not None:
        rows = wavlm.bias_by_offset(self, query)
        position_bias = rows if by_offset else _pairs(rows, batch)
    bias: dict[str, Any] = {}
    if rows is not None:
        bias = {"offset_bias": rows, "offset_gate": wavlm.gate_of_queries(self, query)}
    # Upstream reads the weight of these layers and does not call them.
    qkv = ops.linear(query, self.attention.in_proj_weight, self.attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
    y = ops.rel_attention(q, k, v, **bias, **dropout).flatten(2)
    out = self.attention.out_proj
    if is_plain(out, NonDynamicallyQuantizableLinear):  # torch's linear layer by another name
        return ops.linear(y, *weight_and_bias(out)), position_bias
    return out(y), position_bias


def _pairs(rows: Tensor, batch: int) -> Tensor:
    return bias_of_pairs(rows, batch).unflatten(0, (batch, -1))


def wavlm_layers(
    self: Upstream, x: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None
) -> Any:
    """Runs upstream's layers of WavLM, which hand on the position bias by offset if our attention runs in all."""
    return type(self).forward(self, x, _by_offset(self, attention_mask), position_bias)


def wavlm_outputs(
    self: Upstream, x: Tensor, attention_mask: Tensor | None = None, num_layers: int | None = None
) -> Any:
    """Does the same for ``get_intermediate_outputs``."""
    return type(self).get_intermediate_outputs(self, x, _by_offset(self, attention_mask), num_layers)


def _by_offset(self: Upstream, mask: Tensor | None) -> Any:
    return _BY_OFFSET if mask is None and wavlm.hand_on(self, wavlm_attention) else mask
