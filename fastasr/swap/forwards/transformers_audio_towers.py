# SPDX-License-Identifier: Apache-2.0
"""Modules of transformers' speech encoders whose layers are a Transformer's: the audio towers of Qwen3-ASR and Qwen
Omni, GLM-ASR, Moonshine, its streaming encoder, Voxtral Realtime, Nemotron 3.5 Transcribe, Nemotron 3 Diarization and
Mimi; and the attention of LASR and Fun-ASR-Nano.

A layer: x ← x + attention(norm x); x ← x + W2 act(W1 norm x). Attention has no positions, or upstream's own function
rotates queries and keys before the op.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.convolutions import conv1d
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import STANDARD
from fastasr.ops import _dispatch
from fastasr.swap.forwards.common import is_part, may_read, other_scale, projections
from fastasr.swap.forwards.transformers_beams import cross_attention
from fastasr.swap.forwards.transformers_conformer import hidden_keys
from fastasr.swap.forwards.whisper import with_feed_forward
from fastasr.swap.rule import Upstream, upstream_class


# --------------------------------------------------------------------------- recordings in a row
def row_attention(
    self: Upstream, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, **kwargs: Any
) -> Tensor:
    """Serves the audio towers of Qwen3-ASR, Qwen2.5-Omni and Qwen3-Omni: hidden states (N, width) of recordings, or of
    windows in them, that begin and end at ``cu_seqlens`` (R + 1,) -> (N, width). Each sees itself."""
    implementation = masks.implementation(self.config)
    reason = other_scale(self) if implementation in STANDARD else masks.unread(False, implementation)
    share = self.attention_dropout if self.training else 0.0
    dropout = dropout_of(self, share, hidden_states.device, reason)
    if dropout is None:
        return type(self).forward(self, hidden_states, cu_seqlens, max_seqlen, **kwargs)
    layers = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (t[None] for t in projections(hidden_states, (self.num_heads, -1), *layers))
    if _dispatch.served("rel_attention", q) or not may_read(cu_seqlens):
        y = ops.rel_attention(q, k, v, starts=cu_seqlens.long(), **dropout)
    else:  # The definition would form the scores of all pairs of rows.
        parts = zip(*(t.split(cu_seqlens.diff().tolist(), 1) for t in (q, k, v)), strict=True)
        y = torch.cat([ops.rel_attention(*part, **dropout) for part in parts], 1)
    return plumbing.linear(self.out_proj, y[0].flatten(1))


def row_layer(self: Upstream, hidden_states: Tensor, cu_seqlens: Tensor, **kwargs: Any) -> tuple[Tensor]:
    """Serves a layer around ``row_attention``, the same arguments -> ((N, width),)."""
    normed = self.self_attn_layer_norm(hidden_states)
    x = hidden_states + self.self_attn(hidden_states=normed, cu_seqlens=cu_seqlens, **kwargs)
    return (with_feed_forward(self, x),)


# --------------------------------------------------------------------------- batches
def rotary_attention(
    self: Upstream,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *more: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Serves GLM-ASR, LASR, Nemotron's encoders, Moonshine's and Voxtral Realtime's: hidden states (B, T, width),
    cosines and sines (B or 1, T, dimensions that are rotated), attention mask (``masks.read``) -> ((B, T, width),
    None). A cache gets the keys and values. Upstream's code serves a call whose cache has frames already. In
    Moonshine's decoder beams share the encoder's frames."""
    if kwargs.get("key_value_states") is not None and position_embeddings is None and not more:
        return cross_attention(self, hidden_states, attention_mask=attention_mask, **kwargs)
    y = _rotary(self, hidden_states, position_embeddings, attention_mask, bool(more), **kwargs)
    if y is None:
        upstream = type(self).forward
        return upstream(self, hidden_states, position_embeddings, attention_mask, *more, **kwargs)
    return y, None


def mimi_attention(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Serves Mimi, whose arguments have another order, as above."""
    y = _rotary(self, hidden_states, position_embeddings, attention_mask, cache=cache, **kwargs)
    if y is None:
        upstream = type(self).forward
        return upstream(self, hidden_states, attention_mask, cache, position_embeddings, **kwargs)
    return y, None


def windowed_attention(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Serves Moonshine Streaming's encoder, which has no positions, as above."""
    y, _ = _attended(self, hidden_states, attention_mask, is_causal=kwargs.get("is_causal"))
    return type(self).forward(self, hidden_states, attention_mask, **kwargs) if y is None else (y, None)


def fun_asr_attention(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    input_features_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Serves Fun-ASR-Nano, which has no positions, as above. The memory of the values is added, if there is one; its
    mask is 1 at valid frames (B, T)."""
    y, v = _attended(self, hidden_states, attention_mask, is_causal=kwargs.get("is_causal"))
    if y is None or v is None:
        return type(self).forward(self, hidden_states, attention_mask, input_features_mask, **kwargs)
    if self.fsmn is not None:
        y = y + self.fsmn(v.flatten(2), input_features_mask)
    return y, None


def _rotary(
    module: Upstream,
    x: Tensor,
    positions: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    others: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    others = others or any(kwargs.get(name) is not None for name in ("past_key_values", "key_value_states"))
    if positions is None or others or not _is_new(module, kwargs.get("cache")):
        _left.note(module, masks.OTHER_KEYS)
        return None
    return _attended(module, x, mask, positions, **kwargs)[0]


def _is_new(module: Upstream, cache: Any) -> bool:
    """Says whether the module's keys would be the first in transformers' cache, or there is none."""
    return cache is None or (
        type(cache).__name__ == "DynamicCache" and cache.get_seq_length(module.layer_idx) == 0
    )


def _attended(
    module: Upstream,
    x: Tensor,
    mask: Tensor | None,
    positions: tuple[Tensor, Tensor] | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the attention of x (B, T, width), and the values (B, T, H, d); or None twice where upstream's code serves
    the call, which is noted."""
    share, window = module.attention_dropout if module.training else 0.0, _window(module)
    fits = kwargs.get("is_causal") is None
    hidden = hidden_keys(module, x, mask, fits, share, zeros=True, window=window)
    if hidden is None:
        return None, None
    q, k, v = projections(x, (-1, module.head_dim), module.q_proj, module.k_proj, module.v_proj)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    if positions is not None:
        rotated = sys.modules[upstream_class(module).__module__].apply_rotary_pos_emb
        q, k = rotated(q, k, *positions, unsqueeze_dim=2)
    if cache is not None:
        cache.update(k.transpose(1, 2), v.transpose(1, 2), module.layer_idx, kwargs=kwargs)
    y = ops.rel_attention(q, k, v, **hidden)
    return plumbing.linear(module.o_proj, y.flatten(2)), v


def _window(module: Upstream) -> tuple[int, int] | None:
    """Returns the context of every query as ``ops.rel_attention`` takes it, or None if it sees all keys."""
    config = module.config
    if module.is_causal and hasattr(config, "sliding_window"):
        return config.sliding_window - 1, 0
    windows = getattr(config, "sliding_windows", None)
    if windows is None:
        return None
    before, behind = windows[module.layer_idx]
    return before - 1, max(behind - 1, 0)


# --------------------------------------------------------------------------- feed-forward, layers
def mlp(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves GLM-ASR, Nemotron's encoders, Mimi, and the encoders of Moonshine and Moonshine Streaming: hidden states
    (..., width) -> same shape."""
    activation = self.act_fn if hasattr(self, "act_fn") else self.activation_fn
    return plumbing.linear(self.fc2, activations.activated(self.fc1, activation, hidden_states))


def gated_mlp(self: Upstream, x: Tensor) -> Tensor:
    """Serves Voxtral Realtime's encoder: W3 (act(W1 x) ⊙ W2 x) of x (..., width)."""
    gate = activations.activated(self.gate_proj, self.act_fn, x)
    return plumbing.linear(self.down_proj, gate * plumbing.linear(self.up_proj, x))


def voxtral_realtime_layer(self: Upstream, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Serves a layer of Voxtral Realtime's encoder: hidden states (B, T, width) -> same shape. A residual and the
    RMSNorm behind it are one kernel."""
    first, last = self.self_attn_layer_norm, self.final_layer_norm
    if args or not (is_part(first, self) and is_part(last, self)):
        _left.note(self, "a norm has hooks or is no plain one")
        return type(self).forward(self, hidden_states, *args, **kwargs)
    n = ops.norm_activation(
        hidden_states, first.weight, eps=first.variance_epsilon, kind="rms", activation="identity"
    )
    update = self.self_attn(hidden_states=n, **kwargs)[0]
    x, n = ops.add_norm(hidden_states, update, last.weight, None, last.variance_epsilon, kind="rms")
    return x + self.mlp(n)


# --------------------------------------------------------------------------- front ends
def voxtral_realtime_convolution(self: Upstream, x: Tensor, padding_cache: Any = None) -> Tensor:
    """Serves a causal convolution of Voxtral Realtime: x (B, channels, T), the frames of earlier chunks -> (B,
    channels', T')."""
    if padding_cache is None:
        return conv1d(self, F.pad(x, (self.left_pad, 0)))
    return conv1d(self, padding_cache.update(x, self.cache_key, self))


def moonshine_streaming_convolution(
    self: Upstream, x: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Serves one of Moonshine Streaming: x (B, channels, T), mask (B, T) -> (B, channels', T'), bool (B, T'). A frame
    that sees no valid one is 0."""
    y = conv1d(self, F.pad(x, (self.left_pad, 0)))
    if mask is None:
        return y, None
    seen = F.pad(mask, (self.left_pad, 0)).unfold(1, self.kernel_size[0], self.stride[0])
    valid = seen.sum(2) > 0
    return y.mul_(valid.unsqueeze(1)), valid
