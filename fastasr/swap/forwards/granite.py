# SPDX-License-Identifier: Apache-2.0
"""Modules of transformers' Granite Speech, its Plus and Granite Speech 5, whose frames see the block of C frames that
they are in."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left
from fastasr.models.common import plumbing
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.plain import is_plain
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import STANDARD, mean_of_values
from fastasr.models.fast_conformer.convolution import after_gate, convolved, pointwise
from fastasr.models.fast_conformer.masks import OTHER, seen
from fastasr.ops import _kept
from fastasr.swap.forwards.common import channels_first, in_sequence, is_part, may_read, projections, shaw
from fastasr.swap.rule import Upstream

_SILU = torch.nn.SiLU()


def granite_speech_attention(self: Upstream, hidden_states: Tensor, attention_dists: Tensor) -> Tensor:
    """Serves transformers' Granite Speech and its Plus. hidden states (B, T, width), rows of the table of positions (C,
    C) -> (B, T, width): s[i,j] = q_i·(k_j + E[dists[i mod C, j mod C]]) / √d within blocks of C frames. Padding is seen
    by the other frames of its block: upstream's encoder has no lengths."""
    rows = _rows_in_blocks(self, hidden_states.shape[1], attention_dists)
    if rows is None:
        _left.note(self, OTHER)
        return type(self).forward(self, hidden_states, attention_dists)
    x = self.pre_norm(hidden_states)
    layers = plumbing.linear(self.to_q, x), *plumbing.linear(self.to_kv, x).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in layers)
    y = _in_blocks(self, q, k, v, rows, {})
    return plumbing.dropout(self.dropout, plumbing.linear(self.to_out, y.flatten(2)))


def granite_speech5_attention(
    self: Upstream,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Serves transformers' Granite Speech 5, whose blocks see no padding: as above, with an attention mask (bool
    (B, T), True at valid frames) or None -> ((B, T, width), None). Every query of a block of padding gives the mean of
    the C values of its block, those behind the end being of frames of 0."""
    mask, implementation = attention_mask, masks.implementation(self.config)
    known = implementation in STANDARD
    rows, reason = _rows_in_blocks(self, hidden_states.shape[1], position_embeddings), None
    if not known or rows is None or (mask is not None and mask.shape != hidden_states.shape[:2]):
        reason = masks.unread(known, implementation)
    share = self.attention_dropout if self.training else 0.0
    dropout = dropout_of(self, share, hidden_states.device, reason)
    if dropout is None or rows is None:
        return type(self).forward(self, hidden_states, position_embeddings, mask, **kwargs)
    heads, frames = (self.config.num_attention_heads, -1), hidden_states.shape[1]
    by = None if mask is None else seen(mask)
    has_means = (
        by is not None and by.empty_rows is not None and masks.are_empty_rows_read(by, hidden_states.device)
    )
    if has_means:  # Their blocks are whole, and a projection need not give 0 behind the end.
        hidden_states = F.pad(hidden_states, (0, 0, 0, -frames % self.context_size))
    q, k, v = projections(hidden_states, heads, self.q_proj, self.k_proj, self.v_proj)
    queries, keys, values = (t[:, :frames] for t in (q, k, v))
    y = _in_blocks(self, queries, keys, values, rows, masks.of_kernel(mask, by) | dropout)
    if has_means and mask is not None:
        y = _with_means(y, q, k, v, mask, self.context_size)
    return plumbing.linear(self.o_proj, y.flatten(2)), None


def _in_blocks(
    module: Upstream, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, hidden: dict[str, Any]
) -> Tensor:
    size = module.context_size
    return shaw(q, k, v, rows, (size - 1, size - 1), {"context": (0, 0), "chunk_size": size, **hidden})


def _rows_in_blocks(module: Upstream, frames: int, indices: Tensor) -> Tensor | None:
    """Returns the rows (2C − 1, d) of the table of positions by offset, or None if ``indices`` (C, C) or the table are
    no plain ones."""
    size, table = module.context_size, module.rel_pos_emb
    if not frames or not is_plain(table, torch.nn.Embedding) or indices.shape != (size, size):
        return None
    if may_read(indices):
        version = None if indices.is_inference() else indices._version
        if not _kept.on(indices, "_fastasr_by_offset", version, lambda: _is_by_offset(indices)):
            return None
    return table(torch.cat([indices[1:, 0].flip(0), indices[0]]))


def _is_by_offset(indices: Tensor) -> bool:
    return torch.equal(indices[1:, 1:], indices[:-1, :-1])


def _with_means(y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: int) -> Tensor:
    """Returns y (B, T, H, d) with upstream's values in blocks of ``size`` frames without a valid one, of whole blocks
    of q, k and v."""
    frames = y.shape[1]

    def blocks(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, size)).flatten(0, 1)

    empty = ~F.pad(mask, (0, q.shape[1] - frames)).unflatten(1, (-1, size)).any(2)  # [B, blocks]
    mean = mean_of_values(blocks(q), blocks(k), blocks(v), 0.0).to(y.dtype)
    mean = mean.expand(-1, size, -1, -1).unflatten(0, empty.shape).flatten(1, 2)[:, :frames]
    return torch.where(empty.repeat_interleave(size, 1)[:, :frames, None, None], mean, y)


def granite_speech_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves Granite Speech and its Plus: hidden states (B, T, width) -> same shape. Padding is not masked."""
    if not is_plain(self.glu, torch.nn.GLU):
        _left.note(self, "glu is not a plain GLU")
        return type(self).forward(self, hidden_states)
    conv, around = self.depth_conv, (0, 0)
    if is_part(conv, self):
        conv, around = conv.conv, conv.padding
    h = pointwise(self.up_conv, self.norm(hidden_states))
    y = after_gate(h, conv, self.batch_norm, self.silu, self.down_conv, around=around)
    return y if plumbing.is_idle(self.dropout) else self.dropout(channels_first(self, y))


def granite_speech5_convolution(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Serves Granite Speech 5: hidden states (B, T, width), mask (bool (B, T), True at valid frames) or None -> (B,
    ⌈T / stride⌉, width)."""
    h = plumbing.linear(self.pointwise_lin1, hidden_states)
    hidden = None if attention_mask is None else ~attention_mask
    y = convolved(h, self.depthwise_conv, self.norm, _SILU, hidden, stride=self.depthwise_conv.stride[0])
    return plumbing.linear(self.pointwise_lin2, y)


def granite_speech_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Granite Speech, whose LayerNorm comes first: hidden states (..., width) -> same shape."""
    layers = self.up_proj, self.silu, self.dropout, self.down_proj, self.dropout
    return in_sequence(layers, self.pre_norm(hidden_states))
