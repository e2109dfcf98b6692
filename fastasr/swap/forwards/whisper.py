# SPDX-License-Identifier: Apache-2.0
"""The attention of transformers' Whisper and wav2vec 2.0, which has no positions, and Whisper's layer."""

from typing import Any

import torch
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.attention_of_recordings import of_recordings
from fastasr.models.common.ragged import Packing
from fastasr.models.fast_conformer.masks import WANTED
from fastasr.ops import _dropout
from fastasr.swap.forwards.common import projections, share_of_dropout
from fastasr.swap.forwards.transformers_conformer import hidden_keys
from fastasr.swap.rule import Upstream

# What upstream's code does more for, if a call gives it
_NOT_SERVED = ("key_value_states", "cache", "past_key_values", "is_causal", "position_bias")


def whisper_attention(
    self: Upstream, hidden_states: Tensor, *others: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Serves the encoders of transformers' Whisper and wav2vec 2.0: hidden states (B, T, width), attention mask
    (``masks.read``, or a ``Packing``) by name -> ((B, T, width), None). The order of other arguments differs from class
    to class."""
    mask = kwargs.get("attention_mask")
    packing = mask if isinstance(mask, Packing) else None
    if packing is None and kwargs.get("output_attentions"):
        _left.note(self, WANTED)
        return type(self).forward(self, hidden_states, *others, **kwargs)
    hidden: dict[str, Any] | None = {}
    if packing is None:
        fits = not others and all(kwargs.get(name) is None for name in _NOT_SERVED)
        hidden = hidden_keys(self, hidden_states, mask, fits)
    if hidden is None:
        return type(self).forward(self, hidden_states, *others, **kwargs)
    # Whisper multiplies its queries by the scale before the product, wav2vec 2.0 the product.
    return attention(self, hidden_states, hidden, packing), None


def attention(module: Upstream, x: Tensor, hidden: dict[str, Any], packing: Packing | None = None) -> Tensor:
    """Returns the attention of modules with the names of Whisper's to x (B, T, width), or to packed frames. ``hidden``:
    the kernel's arguments for hidden keys and dropout."""
    q, k, v = projections(x, (module.num_heads, -1), module.q_proj, module.k_proj, module.v_proj)
    if packing is None:
        y = ops.rel_attention(q, k, v, **hidden)
    else:
        share: Any = share_of_dropout(module)
        y = of_recordings(packing, q[0], k[0], v[0], None, None, None, share).unsqueeze(0)
    return plumbing.linear(module.out_proj, y.flatten(2))


def whisper_layer(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Serves the layers of Whisper's encoder: hidden states (B, T, width), attention mask as the attention takes it ->
    (B, T, width)."""
    between, behind = (self.activation_dropout, self.dropout) if self.training else (0.0, 0.0)
    y = self.self_attn_layer_norm(hidden_states)
    y, _ = self.self_attn(hidden_states=y, attention_mask=attention_mask, **kwargs)
    return with_feed_forward(self, _added(y, hidden_states, behind), between, behind)


def with_feed_forward(module: Upstream, x: Tensor, between: float = 0.0, behind: float = 0.0) -> Tensor:
    """Returns x (..., width) plus the feed-forward of a layer with Whisper's names, which drops these shares, within
    bounds in float16."""
    y = activations.dropped(module.fc1, module.activation_fn, between, module.final_layer_norm(x))
    x = _added(plumbing.linear(module.fc2, y), x, behind)
    if x.dtype == torch.float16:
        bound = torch.finfo(torch.float16).max - 1000
        x = x.clamp(-bound, bound)
    return x


def _added(y: Tensor, residual: Tensor, share: float) -> Tensor:
    return _dropout.dropout(y, share, residual) if share else residual + y
