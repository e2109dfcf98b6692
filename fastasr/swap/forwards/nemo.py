# SPDX-License-Identifier: Apache-2.0
"""Modules of NeMo's Conformer, FastConformer and TransformerEncoder, and of GigaAM's Conformer, which has their
formulas."""

import sys
from typing import Any

import torch
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.attention_of_recordings import of_recordings
from fastasr.models.common.plain import is_plain_named
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import Row
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import projected
from fastasr.models.fast_conformer.convolution import (
    after_gate,
    gated,
    gated_convolution,
    is_batch_norm,
    pointwise,
)
from fastasr.models.fast_conformer.masks import OTHER
from fastasr.models.fast_conformer.subsampling import are_plain, convolved, subsampled
from fastasr.ops._register import autocast_dtype
from fastasr.swap.forwards.common import (
    attention,
    by_mask,
    channels_first,
    drops,
    hidden_pairs,
    in_sequence,
    in_sequential,
    is_mask,
    is_one_table,
    packed_attention,
    projections,
)
from fastasr.swap.rule import Upstream


# --------------------------------------------------------------------------- attention
def nemo_attention(
    self: Upstream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Serves NeMo's RelPositionMultiHeadAttention. query, which is key and value too, (B, T, width), mask bool (B, T,
    K), True at hidden keys, or None, position embeddings (1, 2K − 1, width), cache (B, K − T, width) of earlier
    inputs or None, with K = T -> (B, T, width), and with a cache the next cache. Queries that see no key attend to
    nothing.
    Upstream's code serves autocast to float16, where it computes in another dtype.
    """
    if isinstance(mask, (Packing, Row)):
        return packed_attention(self, query, pos_emb, mask)
    batch, frames = query.shape[:2]
    keys = frames if cache is None else cache.shape[1] + frames
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
    fits = query is key is value and not half and is_one_table(pos_emb, keys)
    fits = fits and is_mask(mask, batch, frames, keys)
    dropout = drops(self, query, fits, "autocast to float16 is on" if half else OTHER)
    if dropout is None:
        return type(self).forward(self, query, key, value, mask, pos_emb, cache)
    key, _, query, following = self.update_cache(key=key, value=value, query=query, cache=cache)
    hidden, empty_rows = hidden_pairs(mask)
    y = attention(self, query, pos_emb, hidden | dropout, empty_rows, key)
    return y if cache is None else (y, following)


def gigaam_attention(
    self: Upstream, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Serves GigaAM's RelPositionMultiHeadAttention, NeMo's without dropout and cache: query, which is key and value
    too, (B, T, width), position embeddings (1, 2T − 1, width), mask bool (B, T, T), True at hidden keys, or None -> (B,
    T, width)."""
    if isinstance(mask, Packing):
        return packed_attention(self, query, pos_emb, mask)
    batch, frames = query.shape[:2]
    if not (query is key is value and is_one_table(pos_emb, frames) and is_mask(mask, batch, frames, frames)):
        _left.note(self, OTHER)
        return type(self).forward(self, query, key, value, pos_emb, mask)
    return attention(self, query, pos_emb, *hidden_pairs(mask))


def gigaam_rotary_attention(
    self: Upstream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_emb: list[Tensor],
    mask: Packing | Tensor | None = None,
) -> Tensor:
    """Serves GigaAM's RotaryPositionMultiHeadAttention, whose positions turn the inputs of the queries' and the keys'
    projections by head: the same arguments with cosines and sines (T, 1, 1, d) -> (B, T, width)."""
    batch, frames = query.shape[:2]
    packing = mask if isinstance(mask, Packing) else None
    pairs = None if isinstance(mask, Packing) else mask
    if not (query is key is value and is_mask(pairs, batch, frames, frames)):
        _left.note(self, OTHER)
        return type(self).forward(self, query, key, value, pos_emb, mask)
    if packing is not None:
        frame = torch.arange(frames, dtype=torch.int64, device=query.device)
        pos_emb = [t[frame - packing.starts[packing.recording]] for t in pos_emb]
    heads = self.h, self.d_k
    by_frame = query.transpose(0, 1).unflatten(-1, heads)
    rotated, _ = sys.modules[type(self).__module__].apply_rotary_pos_emb(by_frame, by_frame, *pos_emb)
    q, k = projections(rotated.flatten(2).transpose(0, 1), heads, self.linear_q, self.linear_k)
    (v,) = projections(value, heads, self.linear_v)
    if packing is not None:
        y = of_recordings(packing, q[0], k[0], v[0], None, None, None, 0.0)[None]
    else:
        hidden, empty_rows = hidden_pairs(pairs)
        y = ops.rel_attention(q, k, v, **hidden)
        if empty_rows is not None:
            y = y.masked_fill(empty_rows[:, :, None, None], 0.0)
    return plumbing.linear(self.linear_out, y.flatten(2))


def nemo_local_attention(
    self: Upstream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_mask: Tensor,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Serves NeMo's RelPositionMultiHeadAttentionLongformer without global tokens: a query sees l frames before it and
    l behind it. query, which is key and value too, (B, T, width), pad mask bool (B, T), True at padding, position
    embeddings (1, 2l + 1, width) -> (B, T, width), without values at padding. Upstream's code serves caches and
    unequal contexts, where it gives keys the positions of others."""
    left, right = self.att_context_size
    autocast = autocast_dtype(query) is not None
    fits = query is key is value and cache is None and not autocast
    fits = fits and pos_emb.shape[:2] == (1, left + right + 1) and left == right > 0
    fits = fits and pad_mask.dtype == torch.bool and pad_mask.shape == query.shape[:2]
    dropout = drops(
        self, query, fits, "autocast is on" if autocast else f"{OTHER}, a cache or an unequal context"
    )
    if dropout is None:
        return type(self).forward(self, query, key, value, pad_mask, pos_emb, cache)
    p = projected(self, self.linear_pos, pos_emb[0])
    hidden = {"key_padding_mask": pad_mask, "context": (left, right), "pos_span": (left, right)}
    return attention(self, query, None, hidden | dropout, pad_mask, rows=p)


def nemo_transformer_attention(
    self: Upstream, x: Tensor, block_mask: Any = None, pos_emb: Tensor | None = None
) -> Tensor:
    """Serves NeMo's TransformerEncoder, which uses FlexAttention. x (B, T, width), BlockMask of lengths, causal or not,
    or None, position embeddings (1, 2T − 1, width) -> (B, T, width). Padding sees the valid frames, and a sequence
    without frames gives 0."""
    batch, frames = x.shape[:2]
    hidden = masks.of_nemo(block_mask, batch, frames, type(self)) if is_one_table(pos_emb, frames) else None
    if hidden is None or pos_emb is None:
        _left.note(self, OTHER)
        return type(self).forward(self, x, block_mask, pos_emb)
    heads = self.pos_bias_u.shape
    q, k, v = plumbing.linear(self.w_qkv, x).view(batch, frames, 3, *heads).unbind(2)
    if self.qk_norm:
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
    rows = projected(self, self.linear_pos, pos_emb[0]).view(-1, *heads)
    y = ops.rel_attention(q, k, v, rows, self.pos_bias_u, self.pos_bias_v, **hidden)
    return plumbing.linear(self.out_proj, y.flatten(2))


# --------------------------------------------------------------------------- convolution
def nemo_convolution(
    self: Upstream, x: Tensor, pad_mask: Tensor | None = None, cache: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Serves NeMo's Conformer: x (B, T, width), pad mask (bool (B, T), True at padding) or None, cache (B, width, P) of
    the gated frames before x or None -> (B, T, width), and with a cache the next cache."""
    conv, norm, by_frame = self.depthwise_conv, self.batch_norm, self.norm_type == "layer_norm"
    if cache is not None and (plumbing.conv_delay(conv) is None or not (by_frame or is_batch_norm(norm))):
        _left.note(self, "a cache, and a convolution or norm that is no plain one or has hooks")
        return type(self).forward(self, x, pad_mask, cache)
    h = pointwise(self.pointwise_conv1, x)
    layers = conv, norm, self.activation, self.pointwise_conv2
    y = channels_first(self, after_gate(h, *layers, **by_mask(pad_mask), cache=cache, by_frame=by_frame))
    return y if cache is None else (y, conv.update_cache(gated(h, pad_mask), cache)[1])


def gigaam_convolution(self: Upstream, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
    """Serves GigaAM's Conformer: x (B, T, width), pad mask (bool (B, T), True at padding) or None -> (B, T, width)."""
    layers = self.depthwise_conv, self.batch_norm, self.activation, self.pointwise_conv2
    return gated_convolution(x, self.pointwise_conv1, *layers, **by_mask(pad_mask))


# --------------------------------------------------------------------------- feed-forward and front end
def nemo_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves NeMo's Conformer, without the last dropout: x (..., width) -> same shape."""
    hidden = activations.dropped(self.linear1, self.activation, self.dropout, x)
    return plumbing.linear(self.linear2, hidden)


def gigaam_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves GigaAM's Conformer, without dropout: x (..., width) -> same shape."""
    return plumbing.linear(self.linear2, activations.activated(self.linear1, self.activation, x))


def nemo_transformer_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves NeMo's TransformerEncoder: x (..., width) -> same shape."""
    layers = in_sequential(self.net, 5)
    if layers is None:
        _left.note(self, "net is not a plain Sequential of 5 modules")
        return type(self).forward(self, x)
    return in_sequence(layers, x)


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
