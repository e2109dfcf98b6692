# SPDX-License-Identifier: Apache-2.0
"""Modules of transformers' Wav2Vec2Conformer, FastSpeech2Conformer, SeamlessM4T, SeamlessM4T v2 and w2v-BERT 2.0."""

from typing import Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr._recording import recording
from fastasr.models.common import activations, plumbing
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.attention_of_recordings import of_recordings
from fastasr.models.common.plain import is_plain, is_watched
from fastasr.models.common.ragged import Packing
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import STANDARD
from fastasr.models.fast_conformer.convolution import (
    FastConformerConvolution,
    after_gate,
    gated_convolution,
    pointwise,
)
from fastasr.models.fast_conformer.masks import OTHER, WANTED, WATCHED, seen
from fastasr.swap.forwards.common import (
    attention,
    by_mask,
    channels_first,
    dropped,
    drops,
    is_one_table,
    other_scale,
    packed_attention,
    projections,
    share_of_dropout,
    shaw,
)
from fastasr.swap.rule import Upstream


# --------------------------------------------------------------------------- attention
def wav2vec2_attention(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    relative_position_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Serves transformers' Wav2Vec2Conformer: hidden states (B, T, width), attention mask (``masks.read``), position
    embeddings (1, 2T − 1, width) -> ((B, T, width), None)."""
    if isinstance(attention_mask, Packing):
        return packed_attention(self, hidden_states, relative_position_embeddings, attention_mask), None
    fits = is_one_table(relative_position_embeddings, hidden_states.shape[1])
    hidden = hidden_keys(self, hidden_states, attention_mask, fits)
    if hidden is None:
        return type(self).forward(self, hidden_states, attention_mask, relative_position_embeddings, **kwargs)
    return attention(self, hidden_states, relative_position_embeddings, hidden), None


def relative_key_attention(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *positions: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Serves SeamlessM4T v2 and w2v-BERT 2.0 of transformers, whose heads share a table E of l + r + 1 rows (Shaw et
    al., "Self-attention with relative position representations", 2018): s[i,j] = q_i·(k_j + E[clamp(j − i, −l, r) + l])
    / √d. hidden states (B, T, width), attention mask (``masks.read``) -> ((B, T, width), None). With positions of
    Transformer-XL w2v-BERT has the attention of Wav2Vec2Conformer."""
    if self.position_embeddings_type == "relative":
        return wav2vec2_attention(self, hidden_states, attention_mask, *positions, **kwargs)
    packing = attention_mask if isinstance(attention_mask, Packing) else None
    table, hidden = self.distance_embedding, None
    if packing is None:
        hidden = hidden_keys(self, hidden_states, attention_mask, is_plain(table, torch.nn.Embedding))
        if hidden is None:
            return type(self).forward(self, hidden_states, attention_mask, *positions, **kwargs)
    q, k, v = projections(hidden_states, (self.num_heads, -1), self.linear_q, self.linear_k, self.linear_v)
    span = self.left_max_position_embeddings, self.right_max_position_embeddings
    if hidden is None:
        rows = table.weight.to(q.dtype).unsqueeze(1)
        share: Any = share_of_dropout(self)
        y = of_recordings(packing, q[0], k[0], v[0], rows, None, None, share, span)[None]
    else:
        y = shaw(q, k, v, table.weight, span, hidden)
    return plumbing.linear(self.linear_out, y.flatten(2)), None


def fastspeech2_attention(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    pos_emb: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Any]:
    """Serves transformers' FastSpeech2Conformer: hidden states (B, T, width), attention mask (B, 1, T) that is 0 at
    hidden keys or None, position embeddings (1, 2T − 1, width) -> ((B, T, width), None)."""
    batch, frames = hidden_states.shape[:2]
    fits = attention_mask is None or attention_mask.shape == (batch, 1, frames)
    fits = fits and not output_attentions and is_one_table(pos_emb, frames)
    dropout = drops(self, hidden_states, fits, WANTED if output_attentions else OTHER)
    if dropout is None:
        return type(self).forward(self, hidden_states, attention_mask, pos_emb, output_attentions)
    hidden = {} if attention_mask is None else {"key_padding_mask": attention_mask[:, 0].eq(0)}
    return attention(self, hidden_states, pos_emb, hidden | dropout), None


def hidden_keys(
    module: Upstream,
    x: Tensor,
    mask: Tensor | None,
    fits: bool,
    share: float | None = None,
    zeros: bool = False,
    window: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """Returns the arguments of ``ops.rel_attention`` for the keys that ``mask`` hides, and for dropout; None where
    upstream's code serves the call. ``fits``: whether the positions are served. ``share``: of the weights that are
    dropped, the module's own dropout unless given. ``zeros``: whether upstream's "sdpa" gives 0 where a query sees no
    key, as the op does. ``window``: as of ``masks.seen``."""
    (batch, frames), config = x.shape[:2], getattr(module, "config", None)
    implementation = "eager" if config is None else masks.implementation(config)  # SpeechT5 has no other
    if implementation == "eager" and is_watched(module):
        _left.note(module, WATCHED)
        return None
    pairs = masks.read(mask, implementation, batch, frames) if fits and implementation in STANDARD else None
    if pairs is None and (mask is not None or not fits or implementation not in STANDARD):
        _left.note(module, masks.unread(implementation in STANDARD, implementation))
        return None
    by = None if pairs is None else seen(pairs, left=_before_chunks(config, frames), window=window)
    # A recorded call reads no values: there such a query gives 0. No valid frame depends on it.
    unseen = by is not None and by.empty_rows is not None and recording() is None
    reason = other_scale(module)
    if unseen and not (zeros and implementation == "sdpa"):
        reason = "a query sees no key"
    dropout = dropout_of(module, share_of_dropout(module) if share is None else share, x.device, reason)
    if dropout is None:
        return None
    hidden = masks.of_kernel(pairs, by)
    if mask is None and implementation == "sdpa" and vars(module).get("is_causal"):
        hidden["context"] = (-1, 0)  # Upstream leaves the mask out where torch's kernel makes it.
    for name, value in hidden.items():
        if name.endswith("mask"):  # There is one for all sequences, or one for each.
            hidden[name] = value.expand(batch, *value.shape[1:])
    return hidden | dropout


def _before_chunks(config: Upstream, frames: int) -> int | None:
    """Returns how many frames before its chunk a query of SeamlessM4T v2 sees, None without chunks."""
    size = getattr(config, "speech_encoder_chunk_size", None)
    if size is None:
        return None
    count = config.speech_encoder_left_chunk_num
    return frames if count < 0 else size * count


# --------------------------------------------------------------------------- convolution
def wav2vec2_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Wav2Vec2Conformer: hidden states (B, T, width) -> same shape. Padding is not masked."""
    if not is_plain(self.glu, torch.nn.GLU):
        _left.note(self, "glu is not a plain GLU")
        return type(self).forward(self, hidden_states)
    layers = self.depthwise_conv, self.batch_norm, self.activation, self.pointwise_conv2
    y = gated_convolution(self.layer_norm(hidden_states), self.pointwise_conv1, *layers)
    return dropped(self.dropout, y)


def fastspeech2_convolution(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Serves transformers' FastSpeech2Conformer, with Parakeet's module: hidden states (B, T, width) -> same shape."""
    return channels_first(self, FastConformerConvolution.forward(self, hidden_states, attention_mask))


def seamless_convolution(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Serves transformers' SeamlessM4T: hidden states (B, T, width), mask (B, T), 1 at valid frames, or None -> (B, T,
    width). Upstream sets padding to 0 before ``pointwise_conv1``, which has no bias, so that the gated frame is 0."""
    return _seamless(self, hidden_states, attention_mask, "batch_norm")


def causal_seamless_convolution(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Serves SeamlessM4T v2 and w2v-BERT 2.0, whose convolution sees the past alone and whose norm is LayerNorm."""
    options = {"by_frame": True, "around": (self.depthwise_conv.kernel_size[0] - 1, 0)}
    return _seamless(self, hidden_states, attention_mask, "depthwise_layer_norm", **options)


def _seamless(
    self: Upstream, hidden_states: Tensor, attention_mask: Any, norm: Upstream, **options: Any
) -> Tensor:
    first = self.pointwise_conv1
    by_frame = plumbing.is_pointwise_conv1d(first) and first.bias is None
    if not is_plain(self.glu, torch.nn.GLU) or not by_frame:
        _left.note(self, "glu or pointwise_conv1 is no plain one, or has a bias")
        return type(self).forward(self, hidden_states, attention_mask)
    h = pointwise(first, self.layer_norm(hidden_states))
    packed = attention_mask is None or isinstance(attention_mask, Packing)
    hidden = by_mask(attention_mask if packed else ~attention_mask.bool())
    layers = self.depthwise_conv, getattr(self, norm), self.activation, self.pointwise_conv2
    return dropped(self.dropout, after_gate(h, *layers, **(hidden | options)))


# --------------------------------------------------------------------------- feed-forward
def wav2vec2_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Wav2Vec2Conformer: hidden states (..., width) -> same shape."""
    return feed_forward(self, self.intermediate_act_fn, hidden_states)


def feed_forward(module: Upstream, activation: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns the feed-forward of modules with the names of wav2vec 2.0's to x (..., width)."""
    hidden = activations.dropped(module.intermediate_dense, activation, module.intermediate_dropout, x)
    return plumbing.dropout(module.output_dropout, plumbing.linear(module.output_dense, hidden))
