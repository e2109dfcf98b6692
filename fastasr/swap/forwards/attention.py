# SPDX-License-Identifier: Apache-2.0
"""Self-attention with relative positions, which :func:`fastasr.ops.rel_attention` computes without its weights.

Each forward runs upstream's code if the op cannot serve a call: if weights are asked for, the mask is of another kind,
dropout is drawn as upstream draws it, or each sequence has its own position embeddings.
"""

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr._recording import recording
from fastasr.models.common import attention_dropout, plumbing
from fastasr.models.common.plain import is_plain, is_upstreams, is_watched, runs
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import Row
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import (
    STANDARD,
    first_rows,
    mean_of_values,
    of_recordings,
    projected,
)
from fastasr.models.fast_conformer.masks import seen
from fastasr.ops._relative_positions import relative_shift
from fastasr.swap.rule import Upstream

_WEIGHTS = "attention weights are asked for"
_NONE: Mapping[str, Any] = types.MappingProxyType({})  # no dropout
_OTHER = "an input, a mask or positions that rel_attention does not take"


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
        return _packed(self, hidden_states, relative_position_embeddings, attention_mask), None
    fits = _is_one_table(relative_position_embeddings, hidden_states.shape[1])
    options = _options(self, hidden_states, attention_mask, fits)
    if options is None:
        return type(self).forward(self, hidden_states, attention_mask, relative_position_embeddings, **kwargs)
    return _attention(self, hidden_states, relative_position_embeddings, *options), None


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
    table, options = self.distance_embedding, None
    if packing is None:
        options = _options(self, hidden_states, attention_mask, is_plain(table, torch.nn.Embedding))
        if options is None:
            return type(self).forward(self, hidden_states, attention_mask, *positions, **kwargs)
    layers = self.linear_q, self.linear_k, self.linear_v
    q, k, v = (plumbing.linear(layer, hidden_states).unflatten(-1, (self.num_heads, -1)) for layer in layers)
    span = self.left_max_position_embeddings, self.right_max_position_embeddings
    if packing is not None:
        rows = table.weight.to(q.dtype).unsqueeze(1)
        share: Any = share_of_dropout(self)
        y = of_recordings(packing, q[0], k[0], v[0], rows, None, None, share, span)[None]
    else:
        assert options is not None
        y = _shaw(q, k, v, table.weight, span, *options)
    return plumbing.linear(self.linear_out, y.flatten(2)), None


def granite_speech_attention(self: Upstream, hidden_states: Tensor, attention_dists: Tensor) -> Tensor:
    """Serves transformers' Granite Speech and its Plus. hidden states (B, T, width), rows of the table of positions (C,
    C) -> (B, T, width): s[i,j] = q_i·(k_j + E[dists[i mod C, j mod C]]) / √d within blocks of C frames. Padding is seen
    by the other frames of its block: upstream's encoder has no lengths."""
    rows = _rows_in_blocks(self, hidden_states.shape[1], attention_dists)
    if rows is None:
        _left.note(self, _OTHER)
        return type(self).forward(self, hidden_states, attention_dists)
    x = self.pre_norm(hidden_states)
    projections = plumbing.linear(self.to_q, x), *plumbing.linear(self.to_kv, x).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in projections)
    size = self.context_size
    y = _shaw(q, k, v, rows, (size - 1, size - 1), {"context": (0, 0), "chunk_size": size})
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
    the C values of its block, those behind the end being 0."""
    (batch, frames), mask = hidden_states.shape[:2], attention_mask
    rows, dropout = _rows_in_blocks(self, frames, position_embeddings), None
    known = self.config._attn_implementation in STANDARD
    fits = rows is not None and known and (mask is None or mask.shape == (batch, frames))
    if fits:
        share = self.attention_dropout if self.training else 0.0
        dropout = attention_dropout.of_kernel(share, hidden_states.device)
    if dropout is None or rows is None:
        if fits:
            attention_dropout.note_formed(self)
        else:
            masks.note_unread(self, known, self.config._attn_implementation)
        return type(self).forward(self, hidden_states, position_embeddings, mask, **kwargs)
    heads, size = self.config.num_attention_heads, self.context_size
    layers = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (plumbing.linear(layer, hidden_states).unflatten(-1, (heads, -1)) for layer in layers)
    hidden = {"context": (0, 0), "chunk_size": size}
    by = None if mask is None else seen(mask)
    y = _shaw(q, k, v, rows, (size - 1, size - 1), hidden | masks.of_kernel(mask, by), dropout)
    if (
        mask is not None
        and by is not None
        and by.empty_rows is not None
        and masks.are_empty_rows_read(by, y.device)
    ):
        y = _with_means(y, q, k, v, mask, size)
    return plumbing.linear(self.o_proj, y.flatten(2)), None


def _rows_in_blocks(module: Upstream, frames: int, indices: Tensor) -> Tensor | None:
    """Returns the rows (2C − 1, d) of the table of positions by offset, or None if ``indices`` (C, C) or the table are
    no plain ones."""
    size, table = module.context_size, module.rel_pos_emb
    if not frames or not is_plain(table, torch.nn.Embedding) or indices.shape != (size, size):
        return None
    if _may_read():
        version = None if indices.is_inference() else indices._version
        kept = getattr(indices, "_fastasr_by_offset", None)
        if kept is None or kept[0] != version:
            kept = version, torch.equal(indices[1:, 1:], indices[:-1, :-1])
            vars(indices)["_fastasr_by_offset"] = kept
        if not kept[1]:
            return None
    return table(torch.cat([indices[1:, 0].flip(0), indices[0]]))


def _with_means(y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: int) -> Tensor:
    """Returns y (B, T, H, d) with upstream's values in blocks of ``size`` frames without a valid one."""
    frames = y.shape[1]
    missing = -frames % size

    def blocks(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, 0, 0, missing))
        return t.unflatten(1, (-1, size)).flatten(0, 1)

    empty = ~F.pad(mask, (0, missing)).unflatten(1, (-1, size)).any(2)  # [B, blocks]
    mean = mean_of_values(blocks(q), blocks(k), blocks(v), 0.0).to(y.dtype)
    mean = mean.expand(-1, size, -1, -1).unflatten(0, empty.shape).flatten(1, 2)[:, :frames]
    return torch.where(empty.repeat_interleave(size, 1)[:, :frames, None, None], mean, y)


def wavlm_attention(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    index: int = 0,
    by_offset: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Any, Tensor | None]:
    """Serves transformers' WavLM, whose scores have a bias by offset times a gate of the query (Chen et al., "WavLM",
    2022). hidden states (B, T, width), attention mask (B, T) that is 1 at valid frames, or None -> ((B, T, width),
    None, position bias). The first layer makes the position bias: (2T − 1, H) for the other layers if ``by_offset``,
    which ``wavlm_encoder`` sets, or upstream's (B H, T, T). A sequence without frames gives NaN."""
    batch, frames, heads = *hidden_states.shape[:2], self.num_heads
    rows, reason, dropout = position_bias, None, None
    if is_watched(self):
        reason = _WEIGHTS
    elif position_bias is not None and position_bias.ndim != 2:
        reason = "the position bias has every pair of frames"
    else:
        share = self.dropout if self.training else 0.0
        dropout = attention_dropout.of_kernel(share, hidden_states.device)
    if dropout is None:
        if reason is None:
            attention_dropout.note_formed(self)
        else:
            _left.note(self, reason)
        if rows is None or rows.ndim != 2:
            return type(self).forward(self, hidden_states, attention_mask, position_bias, index, **kwargs)
        pairs = _bias_of_pairs(rows, batch)
        return *type(self).forward(self, hidden_states, attention_mask, pairs, index, **kwargs)[:2], rows
    if rows is None:
        offsets = torch.arange(1 - frames, frames, dtype=torch.int64, device=hidden_states.device)
        rows = self.rel_attn_embed(self._relative_positions_bucket(offsets))
        position_bias = rows if by_offset else _bias_of_pairs(rows, batch)
    # Upstream reads the weights of these layers and does not call them.
    layers = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (
        ops.linear(hidden_states, layer.weight, layer.bias).unflatten(-1, (heads, -1)) for layer in layers
    )
    gates = self.gru_rel_pos_linear(hidden_states.unflatten(-1, (heads, -1)))
    a, b = torch.sigmoid(gates.unflatten(-1, (2, 4)).sum(-1)).unbind(-1)
    gate = a * (b * self.gru_rel_pos_const.view(heads) - 1.0) + 2.0  # [B, T, H]
    hidden = None if attention_mask is None else attention_mask.ne(1)
    y = ops.rel_attention(
        q, k, v, offset_bias=rows, offset_gate=gate, key_padding_mask=hidden, **dropout
    ).flatten(2)
    if hidden is not None:
        y = y.masked_fill(hidden.all(1)[:, None, None], torch.nan)
    # The frames lie first in memory, as upstream's: the next dropout draws in this order.
    y = ops.linear(y.transpose(0, 1), self.out_proj.weight, self.out_proj.bias).transpose(0, 1)
    return y, None, position_bias


def wavlm_encoder(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Runs upstream's encoder of WavLM. Its layers hand on the position bias by offset if ours run in all of them."""
    if all(runs(layer.attention, wavlm_attention) for layer in self.layers):
        kwargs["by_offset"] = True
    return type(self).forward(self, hidden_states, attention_mask, **kwargs)


class ByOffset(NamedTuple):
    """What ``phi4_encoder`` gives its layers in place of upstream's mask (B or 1, H, T, T): rows (2T − 1, H) of the
    bias by offset, and a bias per key (B, 1, T) or None."""

    rows: Tensor
    keys: Tensor | None


def phi4_attention(
    self: Upstream, hidden_states: Tensor, attention_mask: ByOffset | Tensor, **kwargs: Any
) -> Tensor:
    """Serves the audio encoder of transformers' Phi-4-multimodal, if ``phi4_encoder`` gives it the bias: hidden states
    (B, T, width) -> same shape: s[i,j] = q_i·k_j / √d + b[j − i] + c_j."""
    given, dropout = attention_mask, None
    if not isinstance(given, ByOffset):
        _left.note(self, "the bias has every pair of frames")
    elif (implementation := self.config._attn_implementation) not in STANDARD:
        masks.note_unread(self, False, implementation)
    else:
        share = self.attention_dropout if self.training else 0.0
        dropout = attention_dropout.of_kernel(share, hidden_states.device)
        if dropout is None:
            attention_dropout.note_formed(self)
    if dropout is None or not isinstance(given, ByOffset):
        if isinstance(given, ByOffset):
            given = _pairs(given)
        return type(self).forward(self, hidden_states, given, **kwargs)
    layers = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (plumbing.linear(layer, hidden_states).unflatten(-1, (-1, self.head_dim)) for layer in layers)
    y = ops.rel_attention(q, k, v, offset_bias=given.rows, key_bias=given.keys, **dropout)
    return plumbing.linear(self.o_proj, y.flatten(2))


def _pairs(bias: ByOffset) -> Tensor:
    """Returns the sum of both biases (B or 1, H, T, T)."""
    pairs = _bias_of_pairs(bias.rows, 1).unsqueeze(0)
    return pairs if bias.keys is None else pairs + bias.keys.unsqueeze(2)


def phi4_encoder(self: Upstream, hidden_states: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Serves the audio encoder of transformers' Phi-4-multimodal: features (B, T₀, mel_bins), mask (B, T₀), True or 1
    at valid frames, or None -> (B, T, width). Its layers get the bias by offset, and upstream's mask, which adds 1 to
    the scores of valid keys and hides none, as a bias per key. More than 500 frames are sequences of 500, the last of
    them filled with zeros."""
    bias = self.relative_attention_bias_layer
    if not all(runs(layer.self_attn, phi4_attention) for layer in self.encoders) or is_watched(bias):
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
    # All rows of the mask are the same, without chunks.
    given = ByOffset(rows, None if valid is None else seen_keys[:, :1].to(rows.dtype))
    for layer in self.encoders:
        y = layer(y, given)
    return y.reshape(batch, -1, width)[:, :whole]


def sanm_attention(
    self: Upstream,
    x: Tensor,
    mask: Tensor | None,
    mask_shfit_chunk: Tensor | None = None,
    mask_att_chunk_encoder: Tensor | None = None,
) -> Tensor:
    """Serves FunASR's attention without positions, with its memory of the values (Gao et al., "SAN-M", 2020): x (B, T,
    channels), mask (B, 1, T), 0 at padding and 1 elsewhere, or None -> (B, T, width)."""
    conv, pad, delay, dropout = self.fsmn_block, self.pad_fn, None, None
    if is_plain(pad, torch.nn.ConstantPad1d) and pad.value == 0.0:
        delay = plumbing.conv_delay(conv, around=pad.padding)
    if delay is None:
        _left.note(self, "fsmn_block or pad_fn has hooks or is no plain one")
    elif (
        mask_shfit_chunk is not None
        or mask_att_chunk_encoder is not None
        or (mask is not None and mask.shape != (len(x), 1, x.shape[1]))
    ):
        _left.note(self, "masks of chunks, or a mask that is not (B, 1, T)")
    else:
        dropout = attention_dropout.of_kernel(plumbing.dropped_share(self.dropout), x.device)
        if dropout is None:
            attention_dropout.note_formed(self)
    if delay is None or dropout is None:
        return type(self).forward(self, x, mask, mask_shfit_chunk, mask_att_chunk_encoder)
    hidden = None if mask is None else mask[:, 0].eq(0)
    q, k, v = plumbing.linear(self.linear_q_k_v, x).chunk(3, -1)
    memory = ops.depthwise_conv_residual(v, conv.weight, conv.bias, padding_mask=hidden, delay=delay)
    if not plumbing.is_idle(self.dropout):  # upstream draws channels first
        memory = self.dropout(memory.transpose(1, 2).contiguous()).transpose(1, 2)
    if hidden is not None:
        memory = memory.masked_fill(hidden.unsqueeze(-1), 0.0)
    q, k, v = (t.unflatten(-1, (self.h, self.d_k)) for t in (q, k, v))
    y = ops.rel_attention(q, k, v, key_padding_mask=hidden, **dropout)
    return plumbing.linear(self.linear_out, y.flatten(2)) + memory


def _bias_of_pairs(rows: Tensor, batch: int) -> Tensor:
    """Returns the bias (B H, T, T) of every pair of frames, from (2T − 1, H) by offset."""
    frames = (rows.shape[0] + 1) // 2
    pairs = relative_shift(rows.t().unsqueeze(1).expand(-1, frames, -1))
    return pairs.repeat(batch, 1, 1)


def gemma4_attention(
    self: Upstream, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Serves the audio tower of transformers' Gemma 4, whose scores go through a soft cap c: s[i,j] = c tanh((q_i·k_j +
    q_i·R[i − j]) / c). hidden states (B, T, width), positions (1, l + 1, width) of l … 0 frames behind the query,
    attention mask (B, 1, blocks, C, C + l), 0 at the keys that a query sees -> ((B, T, width), None). A query sees l
    keys, itself included. All of it after the projections is float32, as upstream's."""
    frames = hidden_states.shape[1]
    hidden = None
    if is_watched(self):
        _left.note(self, _WEIGHTS)
    else:
        if position_embeddings.shape[:2] == (1, self.max_past_horizon + 1):
            hidden = _hidden_in_windows(self, attention_mask, frames, self.max_past_horizon - 1)
        if hidden is None:
            _left.note(self, _OTHER)
    if hidden is None:
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask)
    layers = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (layer(hidden_states).float().unflatten(-1, (self.num_heads, -1)) for layer in layers)
    q, k = q * self.q_scale * F.softplus(self.per_dim_scale), k * self.k_scale
    rows = self.relative_k_proj(position_embeddings).view(-1, self.num_heads, self.head_dim)
    y = _in_windows(self, q, k, v, rows, self.max_past_horizon - 1, *hidden)
    return self.post(y.flatten(2).to(hidden_states.dtype)), None


def gemma3n_attention(self: Upstream, hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Serves the audio tower of transformers' Gemma 3n: as above, in the model's dtype, with a mask bool (B, T), True
    at padding, and a window of l + 1 keys -> (B, T, H, d)."""
    positions, past = self.relative_position_embedding, self.max_past_horizon
    if not is_upstreams(positions, self) or mask.shape != hidden_states.shape[:2] or mask.dtype != torch.bool:
        _left.note(self, _OTHER)
        return type(self).forward(self, hidden_states, mask)
    layers = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (plumbing.linear(layer, hidden_states).unflatten(-1, (self.num_heads, -1)) for layer in layers)
    q = q * self.q_scale * F.softplus(self.per_dim_scale)
    behind = torch.arange(past, -1, -1, dtype=torch.int64, device=q.device).unsqueeze(0)
    rows = positions.pos_proj(positions._get_timing_signal_1d_pos(behind, dtype=q.dtype))
    rows = rows.view(-1, self.num_heads, self.head_dim)
    return _in_windows(self, q, k, v, rows, past, mask, _empty_windows(mask, past))


def _in_windows(
    module: Upstream,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    past: int,
    hidden: Tensor,
    empty: Tensor | None,
) -> Tensor:
    """Returns the attention of Gemma's audio towers to the last ``past`` keys and the query's own. ``rows`` (l + 1, H,
    d) are the positions of l … 0 frames behind the query; upstream does not divide the scores by √d. ``hidden`` and
    ``empty`` (B, T) or None: the keys that are hidden, and the queries that see none. Upstream gives the mean of all
    values of the block's window there, of which those outside the recording are 0."""
    frames, root = q.shape[1], q.shape[-1] ** 0.5
    cap, span = float(module.attention_logits_soft_cap), (len(rows) - 1, 0)
    y = ops.rel_attention(
        q * root,
        k,
        v,
        rows.to(q.dtype),
        key_padding_mask=hidden,
        context=(past, 0),
        soft_cap=cap,
        pos_span=span,
    )
    if empty is None:
        return y
    means = module._extract_block_context(v).mean(2).repeat_interleave(module.chunk_size, 1)[:, :frames]
    return torch.where(empty[:, :, None, None], means, y)


def _empty_windows(hidden: Tensor, past: int) -> Tensor | None:
    """Returns (B, T): the queries none of whose last ``past`` keys, nor their own, is visible; None where a CPU finds
    that there are none."""
    visible = F.pad((~hidden).cumsum(1), (past + 1, 0))
    empty = visible[:, past + 1 :] == visible[:, : hidden.shape[1]]
    known = empty.is_cpu and _may_read()
    return None if known and not empty.any() else empty


def _may_read() -> bool:
    """Says whether a call may depend on values of tensors, and keep what it reads: not while it is compiled or
    recorded, because the same code then serves other values."""
    return not torch.compiler.is_compiling() and recording() is None


def _hidden_in_windows(
    module: Upstream, mask: Any, frames: int, past: int
) -> tuple[Tensor, Tensor | None] | None:
    """Returns the hidden keys and the queries that see none, (B, T) or None, of Gemma 4's mask; None if it hides other
    keys than those of padding and those outside the window. All layers get one mask, which is read once."""
    if mask is None or not frames:
        return None
    kept = getattr(mask, "_fastasr_hidden", None)
    version = None if mask.is_inference() else mask._version
    if kept is not None and kept[0] == version:
        return kept[1]
    size, horizon = module.chunk_size, module.max_past_horizon
    visible = mask == 0
    found = None
    if visible.shape[1:] == (1, -(-frames // size), size, module.context_size):
        valid = visible.diagonal(horizon, 3, 4).flatten(1)[:, :frames]  # each query sees itself
        behind = torch.arange(size, dtype=torch.int64, device=mask.device)[:, None] + horizon
        behind = behind - torch.arange(module.context_size, dtype=torch.int64, device=mask.device)
        keys = module._extract_block_context(valid[:, :, None, None]).flatten(2)  # [B, blocks, context]
        expected = keys[:, None, :, None] & (behind >= 0) & (behind <= past)
        queries = torch.arange(expected.shape[2] * size, dtype=torch.int64, device=mask.device) < frames
        expected = expected & queries.view(-1, size, 1)
        if not _may_read() or torch.equal(visible, expected):
            found = ~valid, _empty_windows(~valid, past)
    if _may_read():
        mask._fastasr_hidden = version, found
    return found


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
    if (
        not output_attentions
        and _is_one_table(pos_emb, frames)
        and (attention_mask is None or attention_mask.shape == (batch, 1, frames))
    ):
        hidden = {} if attention_mask is None else {"key_padding_mask": attention_mask[:, 0].eq(0)}
        dropout = _dropout_of(self)
        if dropout is not None:
            return _attention(self, hidden_states, pos_emb, hidden, dropout), None
        attention_dropout.note_formed(self)
    else:
        _left.note(self, _WEIGHTS if output_attentions else _OTHER)
    return type(self).forward(self, hidden_states, attention_mask, pos_emb, output_attentions)


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
        return _packed(self, query, pos_emb, mask)
    batch, frames = query.shape[:2]
    keys = frames if cache is None else cache.shape[1] + frames
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
    fits = query is key is value and not half and _is_one_table(pos_emb, keys)
    fits = fits and (mask is None or (mask.dtype == torch.bool and mask.shape == (batch, frames, keys)))
    dropout = None
    if fits and self.use_pytorch_sdpa:
        share = self.dropout_rate if self.training else 0.0
        dropout = attention_dropout.of_kernel(share, query.device)
    elif fits:
        dropout = _dropout_of(self)
    if dropout is None:
        _note(self, fits, "autocast to float16 is on" if half else _OTHER)
        return type(self).forward(self, query, key, value, mask, pos_emb, cache)
    key, _, query, following = self.update_cache(key=key, value=value, query=query, cache=cache)
    y = _attention(self, query, pos_emb, *_hidden_pairs(mask, dropout), key)
    return y if cache is None else (y, following)


def gigaam_attention(
    self: Upstream, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Serves GigaAM's RelPositionMultiHeadAttention, NeMo's without dropout and cache: query, which is key and value
    too, (B, T, width), position embeddings (1, 2T − 1, width), mask bool (B, T, T), True at hidden keys, or None -> (B,
    T, width)."""
    if isinstance(mask, Packing):
        return _packed(self, query, pos_emb, mask)
    batch, frames = query.shape[:2]
    fits = query is key is value and _is_one_table(pos_emb, frames)
    fits = fits and (mask is None or (mask.dtype == torch.bool and mask.shape == (batch, frames, frames)))
    if not fits:
        _note(self, fits, _OTHER)
        return type(self).forward(self, query, key, value, pos_emb, mask)
    return _attention(self, query, pos_emb, *_hidden_pairs(mask, _NONE))


def firered_attention(
    self: Upstream, q: Tensor, k: Tensor, v: Tensor, pos_emb: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """Serves FireRedASR's RelPosMultiHeadAttention, which normalises queries, keys and values each by a LayerNorm of
    its own and adds the residual: q, which is k and v too, (B, T, width), position embeddings (1, 2T − 1, width), mask
    (B, 1, T), 0 at hidden keys, or None -> ((B, T, width), None)."""
    (batch, frames), dropout = q.shape[:2], None
    packing = mask if isinstance(mask, Packing) else None
    if packing is None:
        fits = q is k is v and _is_one_table(pos_emb, frames)
        fits = fits and (mask is None or mask.shape == (batch, 1, frames))
        dropout = attention_dropout.of_kernel(share_of_dropout(self), q.device) if fits else None
        if dropout is None:
            _note(self, fits, _OTHER)
            return type(self).forward(self, q, k, v, pos_emb, mask)
    heads = self.pos_bias_u.shape
    norms = self.layer_norm_q, self.layer_norm_k, self.layer_norm_v
    layers = self.w_qs, self.w_ks, self.w_vs
    queries, keys, values = (
        plumbing.linear(layer, norm(q)).view(batch, frames, *heads)
        for layer, norm in zip(layers, norms, strict=True)
    )
    rows = projected(self, self.linear_pos, pos_emb[0]).view(-1, *heads)
    if dropout is None:
        y = _of_recordings(self, packing, queries, keys, values, rows)
    else:
        hidden: dict[str, Any] = {} if mask is None else {"key_padding_mask": mask[:, 0].eq(0)}
        given: dict[str, Any] = hidden | dropout
        y = ops.rel_attention(queries, keys, values, rows, self.pos_bias_u, self.pos_bias_v, **given)
    return plumbing.dropout(self.dropout, plumbing.linear(self.fc, y.flatten(2)), q), None


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
    batch, frames = query.shape[:2]
    left, right = self.att_context_size
    fits = query is key is value and cache is None and not torch.is_autocast_enabled(query.device.type)
    fits = fits and pos_emb.shape[:2] == (1, left + right + 1) and left == right > 0
    fits = fits and pad_mask.dtype == torch.bool and pad_mask.shape == (batch, frames)
    dropout = _dropout_of(self) if fits else None
    if dropout is None:
        autocast = torch.is_autocast_enabled(query.device.type)
        _note(self, fits, "autocast is on" if autocast else f"{_OTHER}, a cache or an unequal context")
        return type(self).forward(self, query, key, value, pad_mask, pos_emb, cache)
    p = projected(self, self.linear_pos, pos_emb[0])
    hidden = {"key_padding_mask": pad_mask, "context": (left, right), "pos_span": (left, right)}
    return _attention(self, query, None, hidden, dropout, pad_mask, rows=p)


def nemo_transformer_attention(
    self: Upstream, x: Tensor, block_mask: Any = None, pos_emb: Tensor | None = None
) -> Tensor:
    """Serves NeMo's TransformerEncoder, which uses FlexAttention. x (B, T, width), BlockMask of lengths, causal or not,
    or None, position embeddings (1, 2T − 1, width) -> (B, T, width). Padding sees the valid frames, and a sequence
    without frames gives 0."""
    batch, frames = x.shape[:2]
    hidden = masks.of_nemo(block_mask, batch, frames, type(self)) if _is_one_table(pos_emb, frames) else None
    if hidden is None or pos_emb is None:
        _left.note(self, _OTHER)
        return type(self).forward(self, x, block_mask, pos_emb)
    heads = self.pos_bias_u.shape
    q, k, v = plumbing.linear(self.w_qkv, x).view(batch, frames, 3, *heads).unbind(2)
    if self.qk_norm:
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
    rows = projected(self, self.linear_pos, pos_emb[0]).view(-1, *heads)
    y = ops.rel_attention(q, k, v, rows, self.pos_bias_u, self.pos_bias_v, **hidden)
    return plumbing.linear(self.out_proj, y.flatten(2))


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
    masks_and_shapes = (
        ("key_padding_mask", key_padding_mask, (batch, frames)),
        ("attn_mask", attn_mask, (frames, frames)),
    )
    given = {name: (mask, shape) for name, mask, shape in masks_and_shapes if mask is not None}
    fits = query is key is value and _is_one_table(pos_embs, frames)
    fits = fits and all(mask.dtype == torch.bool and mask.shape == shape for mask, shape in given.values())
    share = plumbing.dropped_share(self.dropout_att)
    dropout = attention_dropout.of_kernel(share, query.device) if fits else None
    if dropout is None:
        _note(self, fits, _OTHER)
        return type(self).forward(
            self, query, key, value, pos_embs, key_padding_mask, attn_mask, return_attn_weights
        )
    heads, scale = self.num_heads, self.num_heads**-0.5
    u, w = (bias.view(heads, self.head_dim) * scale for bias in (self.pos_bias_u, self.pos_bias_v))
    q, k, v = ops.linear(query, self.in_proj_weight).view(batch, frames, heads, -1).chunk(3, -1)
    if self.vbias is not None:
        v = v + self.value_bias_weight.view(heads, self.vhead_dim)
    p = projected(self, self.linear_pos, pos_embs[0]).view(-1, heads, self.head_dim)
    hidden: dict[str, Any] = {name: mask for name, (mask, _) in given.items()}
    y = ops.rel_attention(q * scale, k, v, p, u, w, **hidden, **dropout)
    out = plumbing.linear(self.out_proj, y.flatten(2))
    return (out, None) if return_attn_weights else out


def _options(
    module: Upstream, x: Tensor, mask: Tensor | None, fits: bool
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns the arguments of ``ops.rel_attention`` for a call of a module of transformers: the keys that ``mask``
    hides, and dropout; None where upstream's code serves the call. ``fits``: whether the positions are served."""
    (batch, frames), config = x.shape[:2], module.config
    implementation = config._attn_implementation
    if implementation == "eager" and is_watched(module):
        _left.note(module, _WEIGHTS)
        return None
    pairs = masks.read(mask, implementation, batch, frames) if fits and implementation in STANDARD else None
    if pairs is None and (mask is not None or not fits or implementation not in STANDARD):
        masks.note_unread(module, implementation in STANDARD, implementation)
        return None
    by = None if pairs is None else seen(pairs, left=_before_chunks(config, frames))
    # A recorded call reads no values: there such a query gives 0. No valid frame depends on it.
    if by is not None and by.empty_rows is not None and recording() is None:
        _left.note(module, "a query sees no key")
        return None
    dropout = attention_dropout.of_kernel(plumbing.dropped_share(module.dropout), x.device)
    if dropout is None:
        attention_dropout.note_formed(module)
        return None
    hidden = masks.of_kernel(pairs, by)
    for name, value in hidden.items():
        if name.endswith("mask"):  # There is one for all sequences, or one for each.
            hidden[name] = value.expand(batch, *value.shape[1:])
    return hidden, dropout


def _before_chunks(config: Upstream, frames: int) -> int | None:
    """Returns how many frames before its chunk a query of SeamlessM4T v2 sees, None without chunks."""
    size = getattr(config, "speech_encoder_chunk_size", None)
    if size is None:
        return None
    count = config.speech_encoder_left_chunk_num
    return frames if count < 0 else size * count


def _shaw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    span: tuple[int, int],
    hidden: dict[str, Any],
    dropout: Mapping[str, Any] = _NONE,
) -> Tensor:
    """Returns softmax_j(q_i·(k_j + rows[clamp(j − i, −l, r) + l]) / √d) v, (B, T, H, d), of rows (l + r + 1, d) for all
    heads and ``span`` (l, r)."""
    return ops.rel_attention(q, k, v, rows.to(q.dtype).unsqueeze(1), pos_span=span, **hidden, **dropout)


def _note(module: Upstream, fits: bool, reason: str) -> None:
    if fits:
        attention_dropout.note_formed(module)
    else:
        _left.note(module, reason)


def _is_one_table(positions: Tensor | None, frames: int) -> bool:
    return positions is not None and positions.ndim == 3 and positions.shape[:2] == (1, 2 * frames - 1)


def _hidden_pairs(
    mask: Tensor | None, dropout: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any], Tensor | None]:
    """Returns what ``_attention`` takes for NeMo's mask (B, T, K), True at hidden keys, or None, and for dropout: the
    kernel's arguments, and the queries that see no key. Where the mask does not stand for lengths the kernel itself
    gives 0 at these."""
    by = None if mask is None else seen(mask, hides=True)
    empty_rows = by.empty_rows if by is not None and by.by_length else None
    return masks.of_kernel(mask, by, hides=True), dropout, empty_rows


def _dropout_of(module: Upstream) -> dict[str, Any] | None:
    """Returns the kernel's arguments for the module's dropout, None where upstream must draw it."""
    return attention_dropout.of_kernel(plumbing.dropped_share(module.dropout), module.pos_bias_u.device)


def share_of_dropout(module: Upstream) -> float | None:
    """Returns the share of its weights that an attention module of a served framework drops now, None if the dropout is
    no plain one."""
    if getattr(module, "use_pytorch_sdpa", False):
        return module.dropout_rate if module.training else 0.0
    dropout = getattr(getattr(module, "attention", module), "dropout", None)
    return 0.0 if dropout is None else plumbing.dropped_share(dropout)


def _packed(module: Upstream, x: Tensor, positions: Any, packing: Packing | Row) -> Tensor:
    """Returns the attention of modules with ESPnet's names to packed frames x (1, N, width)."""
    heads, layers = module.pos_bias_u.shape, (module.linear_q, module.linear_k, module.linear_v)
    q, k, v = (plumbing.linear(layer, x).view(*x.shape[:2], *heads) for layer in layers)
    rows = projected(module, module.linear_pos, positions[0]).view(-1, *heads)
    return plumbing.linear(module.linear_out, _of_recordings(module, packing, q, k, v, rows).flatten(2))


def _of_recordings(module: Upstream, packing: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Returns (1, N, H, d), where each recording sees itself, of q, k and v (1, N, H, d) and rows (2T − 1, H, d)."""
    biases = module.pos_bias_u, module.pos_bias_v
    share: Any = share_of_dropout(module)
    q, k, v = (t.squeeze(0) for t in (q, k, v))
    return of_recordings(packing, q, k, v, rows, *biases, share).unsqueeze(0)


def _attention(
    module: Upstream,
    x: Tensor,
    positions: Any,
    hidden: dict[str, Any],
    dropout: Mapping[str, Any],
    empty_rows: Tensor | None = None,
    keys: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Returns the attention of modules with ESPnet's names, without the values of ``empty_rows``, bool (B, T). ``keys``
    (B, K, width) are x unless given, ``rows`` the projected positions those of ``positions``."""
    heads, keys = module.pos_bias_u.shape, x if keys is None else keys
    q, k, v = (
        plumbing.linear(layer, given).view(*given.shape[:2], *heads)
        for layer, given in ((module.linear_q, x), (module.linear_k, keys), (module.linear_v, keys))
    )
    if rows is None:
        needed = max(0, x.shape[1] + keys.shape[1] - 1)
        rows = first_rows(projected(module, module.linear_pos, positions[0]), needed)
    y = ops.rel_attention(
        q, k, v, rows.view(-1, *heads), module.pos_bias_u, module.pos_bias_v, **hidden, **dropout
    )
    if empty_rows is not None:
        y = y.masked_fill(empty_rows[:, :, None, None], 0.0)
    return plumbing.linear(module.linear_out, y.flatten(2))
