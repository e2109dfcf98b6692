# SPDX-License-Identifier: Apache-2.0
"""torch's MultiheadAttention, as torchaudio's Conformer and SpeechBrain's Transformer call it."""

from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import repeated_inputs
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.plain import is_plain
from fastasr.models.fast_conformer.masks import OTHER, WANTED
from fastasr.swap.forwards.beams import keeps_copies, queries, rows
from fastasr.swap.forwards.common import has_other_keys, is_mask
from fastasr.swap.rule import Upstream

PAIRS = (
    "a mask of pairs of frames, as that of a decoder's attention to its own tokens, or positions as a mask"
)


def multihead_attention(
    self: Upstream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    *more: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Serves torch's attention: query, which is key and value, (T, B, width), or (B, T, width) with ``batch_first``,
    masks bool (B, T) and (T, T), True at hidden keys, or None -> (query's shape, None)."""
    y = None
    if not has_other_keys(self, query, key, value):
        fits = query.dim() == 3 and not (more or kwargs)
        reason = WANTED if need_weights else None if fits else OTHER
        x = query if self.batch_first else query.transpose(0, 1)
        y = _attended(self, self, x, key_padding_mask, attn_mask, reason)
    if y is None:
        masks = key_padding_mask, need_weights, attn_mask
        return type(self).forward(self, query, key, value, *masks, *more, **kwargs)
    return (y if self.batch_first else y.transpose(0, 1)), None


def speechbrain_attention(
    self: Upstream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_attn_weights: bool = True,
    pos_embs: Tensor | None = None,
) -> Any:
    """Serves SpeechBrain's attention around torch's: query, which is key and value, (B, T, width), mask bool (B, T),
    True at padding, or None -> (B, T, width), and None for the weights if they are asked for. Then a sequence without
    frames gives NaN. Attention to an encoder's frames is upstream's, and beams share it."""
    if key is value and query is not key and attn_mask is None and pos_embs is None:
        found = _of_beams(self, query, key, key_padding_mask, return_attn_weights)
        if found is not None:
            return found
    y, attention = None, self.att
    if not has_other_keys(self, query, key, value):
        fits = is_plain(attention, torch.nn.MultiheadAttention) and not attention.batch_first
        reason = None if fits and why_not(attention) is None else OTHER
        if attn_mask is not None or pos_embs is not None:
            reason = PAIRS
        y = _attended(self, attention, query, key_padding_mask, None, reason)
    if y is None:
        masks = attn_mask, key_padding_mask, return_attn_weights
        return type(self).forward(self, query, key, value, *masks, pos_embs)
    if not return_attn_weights:
        return y
    if key_padding_mask is not None:  # A filled copy is contiguous, and frames come first in memory.
        y = y.transpose(0, 1).masked_fill(key_padding_mask.all(1)[:, None], torch.nan).transpose(0, 1)
    return y, None


def _of_beams(module: Upstream, query: Tensor, key: Tensor, padding: Tensor | None, weights: bool) -> Any:
    """Returns upstream's results for beams, which share the frames of a recording, or None if there are none."""
    if keeps_copies(module, query, key):
        return None
    beams, frames = repeated_inputs.without_copies(module, key)
    first = None if padding is None else padding[::beams]
    if beams == 1 or not (
        padding is None or torch.equal(padding, padding[::beams].repeat_interleave(beams, 0))
    ):
        return None
    found = type(module).forward(module, queries(query, beams), frames, frames, None, first, weights)
    return tuple(rows(t, beams) for t in found) if weights else rows(found, beams)


def why_not(attention: Upstream) -> str | None:
    """Returns why torch's attention is none that our forward computes, or None."""
    if not attention._qkv_same_embed_dim:
        return "kdim or vdim is not embed_dim"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv or add_zero_attn is set"
    return None


def _attended(
    module: Upstream,
    attention: Upstream,
    x: Tensor,
    padding: Tensor | None,
    pairs: Tensor | None,
    reason: str | None,
) -> Tensor | None:
    """Returns the attention of x (B, T, width), frames first in memory unless ``batch_first``, or None where upstream's
    code serves the call of ``module``, which is noted."""
    batch, frames = x.shape[:2]
    if reason is None and not (is_mask(padding, batch, frames) and is_mask(pairs, frames, frames)):
        reason = OTHER
    dropout = dropout_of(module, attention.dropout if attention.training else 0.0, x.device, reason)
    if dropout is None:
        return None
    frames_first = not attention.batch_first
    x = x.transpose(0, 1) if frames_first else x
    # Upstream reads the weights of the last layer and does not call it.
    qkv = ops.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    parts = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    q, k, v = (t.transpose(0, 1) for t in parts) if frames_first else parts
    y = ops.rel_attention(q, k, v, key_padding_mask=padding, attn_mask=pairs, **dropout).flatten(2)
    # The next dropout draws in the order of the memory.
    y = ops.linear(
        y.transpose(0, 1) if frames_first else y, attention.out_proj.weight, attention.out_proj.bias
    )
    return y.transpose(0, 1) if frames_first else y
