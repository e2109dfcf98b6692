# SPDX-License-Identifier: Apache-2.0
"""Forward passes for the audio towers of transformers' Gemma 3n and Gemma 4, Conformers (Zhang et al., "Google USM",
2023) with an RMSNorm before and behind each branch.

A layer: x ← x + ½ RMS(FF(RMS x)); x ← x + RMS(attention(RMS x)); x ← x + convolution(RMS x); x ← x + ½ RMS(FF(RMS x));
RMS x. One kernel adds a branch, with its norm, to the stream and normalises the sum for the next branch. Norms read
their input between ±``gradient_clipping``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr._transforms import is_transformed
from fastasr.models.common import plumbing
from fastasr.models.common.activations import activated, fused_name
from fastasr.models.common.plain import is_plain, is_upstreams, is_watched
from fastasr.models.fast_conformer.masks import OTHER, WATCHED
from fastasr.ops import _kept
from fastasr.swap.forwards.common import is_part, may_read, projections
from fastasr.swap.rule import Upstream

_NO_NORM = "a norm has hooks or is no plain one"
_NO_PART = "a part has hooks or is no plain one, or norms add different numbers"
_SILU = torch.nn.SiLU()


# --------------------------------------------------------------------------- parts
def _is_norm(norm: Upstream, owner: Upstream) -> bool:
    return is_part(norm, owner) and norm.with_scale


def _normed(norm: Upstream, x: Tensor, limit: float = 0.0, activation: Any = "identity") -> Tensor:
    return ops.norm_activation(x, norm.weight, eps=norm.eps, kind="rms", activation=activation, limit=limit)


def _add_normed(
    norm: Upstream,
    x: Tensor,
    update: Tensor,
    limit: float = 0.0,
    scale: float = 1.0,
    of_update: Upstream = None,
    update_limit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns x + scale · of_update(update), and ``norm`` of it."""
    weight = None if of_update is None else of_update.weight
    return ops.add_norm(
        x, update, norm.weight, None, norm.eps, scale,
        kind="rms", update_weight=weight, update_limit=update_limit, limit=limit,
    )  # fmt: skip


def _bounds(layer: Upstream) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("input_min", "input_max", "output_min", "output_max")}


def _is_clipped(layer: Upstream, owner: Upstream) -> bool:
    """Says whether this is Gemma 4's layer with bounds around a product without a bias."""
    known = type(layer).__name__ == "Gemma4ClippableLinear" and is_upstreams(layer, owner)
    return known and layer.use_clipped_linears and _is_product(layer.linear)


def _is_product(linear: torch.nn.Module) -> bool:
    return plumbing.is_plain_linear(linear) and linear.bias is None


def _linear(layer: Upstream, x: Tensor, owner: Upstream) -> Tensor:
    if _is_clipped(layer, owner):
        return ops.clamped_linear(x, layer.linear.weight, **_bounds(layer))
    return plumbing.linear(layer, x)


def _between(first: Upstream, activation: Upstream, second: Upstream, x: Tensor, owner: Upstream) -> Tensor:
    """Returns second(activation(first(x))). The first layer's kernel clamps the input of the second too."""
    if _is_clipped(first, owner) and _is_clipped(second, owner):
        name, bounds = fused_name(activation), _bounds(second)
        following = {"next_min": bounds.pop("input_min"), "next_max": bounds.pop("input_max")}
        if name is not None:
            hidden = ops.clamped_linear(x, first.linear.weight, name, **_bounds(first), **following)
            return ops.clamped_linear(hidden, second.linear.weight, **bounds)
    return _linear(second, activated(first, activation, x), owner)


def _activation_of(module: Upstream) -> torch.nn.Module:
    return getattr(module, "act_fn", _SILU)  # Gemma 3n calls the function.


def _fed(module: Upstream, n: Tensor) -> Tensor:
    """Returns a feed-forward block of its normalised input, before the norm behind it."""
    return _between(module.ffw_layer_1, _activation_of(module), module.ffw_layer_2, n, module)


def _causal_delay(conv: Upstream, owner: Upstream) -> int | None:
    """Returns P − ⌊K / 2⌋ of Gemma's convolution, which sees P = K − 1 frames of the past."""
    known = type(conv)
    if known.__name__ != "Gemma4AudioCausalConv1d" or not is_upstreams(conv, owner):
        known = torch.nn.Conv1d
    if type(conv) is not known:
        return None
    return plumbing.conv_delay(conv, around=(conv.kernel_size[0] - 1, 0), known=known)


def _convolved(module: Upstream, n: Tensor, delay: int) -> Tensor:
    """Returns a convolution module of its normalised input, without the residual."""
    h = _linear(module.linear_start, n, module).transpose(0, 1)
    conv, norm, activation = module.depthwise_conv1d, module.conv_norm, _activation_of(module)
    z = ops.gated_depthwise_conv(h, conv.weight, conv.bias, delay=delay, activation="identity")
    name = fused_name(activation)
    y = _normed(norm, z.transpose(0, 1), _limit(module), name or "identity")
    return _linear(module.linear_end, y if name else activation(y), module)


def _limit(module: Upstream) -> float:
    return float(module.config.gradient_clipping)


# --------------------------------------------------------------------------- modules
def gemma4_clippable_linear(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves Gemma 4's linear layer between two clamps: hidden states (..., inputs) -> (..., outputs)."""
    if not _is_product(self.linear):
        _left.note(self, "linear has hooks or is no plain one")
        return type(self).forward(self, hidden_states)
    if not self.use_clipped_linears:
        return plumbing.linear(self.linear, hidden_states)
    return ops.clamped_linear(hidden_states, self.linear.weight, **_bounds(self))


def gemma_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves the feed-forward block of both: hidden states (B, T, width) -> same shape."""
    before, behind, limit = self.pre_layer_norm, self.post_layer_norm, _limit(self)
    if not (_is_norm(before, self) and _is_norm(behind, self)):
        _left.note(self, _NO_NORM)
        return type(self).forward(self, hidden_states)
    update = _fed(self, _normed(before, hidden_states, limit))
    return torch.add(hidden_states, _normed(behind, update, limit), alpha=self.post_layer_scale)


def gemma_light_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves the convolution module of both: hidden states (B, T, width) -> same shape. Padding is not masked."""
    delay = _causal_delay(self.depthwise_conv1d, self)
    if delay is None or not all(_is_norm(norm, self) for norm in (self.pre_layer_norm, self.conv_norm)):
        _left.note(self, "a norm or depthwise_conv1d has hooks or is no plain one")
        return type(self).forward(self, hidden_states)
    return hidden_states + _convolved(self, _normed(self.pre_layer_norm, hidden_states), delay)


def gemma4_layer(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Serves a layer of Gemma 4: hidden states (B, T, width), the attention's mask and positions -> (B, T, width)."""

    def attended(n: Tensor) -> Tensor:
        return self.self_attn(
            hidden_states=n, position_embeddings=position_embeddings, attention_mask=attention_mask
        )[0]

    parts = self.feed_forward1, self.lconv1d, self.feed_forward2
    norms = self.norm_pre_attn, self.norm_post_attn, self.norm_out
    y = _layer(self, hidden_states, parts, norms, attended)
    if y is None:
        return type(self).forward(self, hidden_states, attention_mask, position_embeddings, **kwargs)
    return y


def gemma3n_layer(self: Upstream, audio_encodings: Tensor, audio_mel_mask: Tensor) -> Tensor:
    """Serves a layer of Gemma 3n: encodings (B, T, width), mask bool (B, T), True at padding -> (B, T, width)."""
    attention = self.attention

    def attended(n: Tensor) -> Tensor:
        return plumbing.linear(attention.post, attention.attn(n, audio_mel_mask).flatten(2))

    parts = self.ffw_layer_start, self.lconv1d, self.ffw_layer_end, attention
    norms = attention.pre_attn_norm, attention.post_norm, self.norm
    y = _layer(self, audio_encodings, parts, norms, attended, audio_mel_mask)
    return type(self).forward(self, audio_encodings, audio_mel_mask) if y is None else y


def _layer(
    module: Upstream,
    x: Tensor,
    parts: tuple[Upstream, ...],
    norms: tuple[Upstream, ...],
    attended: Callable[[Tensor], Tensor],
    hidden: Tensor | None = None,
) -> Tensor | None:
    """Returns a layer's output, or None unless its parts, in the order of their use, may be run without a call of them.
    ``norms`` are before and behind the attention and at the end. The convolution reads 0 at ``hidden`` frames, bool
    (B, T)."""
    first, convolution, last = parts[:3]
    (before, behind, out), delay = norms, None
    if all(is_part(part, module) for part in parts):
        norms += first.post_layer_norm, convolution.pre_layer_norm, last.post_layer_norm  # with one eps
        others = first.pre_layer_norm, convolution.conv_norm, last.pre_layer_norm
        are_norms = all(_is_norm(norm, module) for norm in norms + others)
        if are_norms and len({norm.eps for norm in norms}) == 1:
            delay = _causal_delay(convolution.depthwise_conv1d, convolution)
    if delay is None or (hidden is not None and hidden.dtype != torch.bool):
        _left.note(module, _NO_PART)
        return None
    limit = _limit(module)
    x, n = _after_feed_forward(first, x, _normed(first.pre_layer_norm, x, _limit(first)), before, limit)
    x, n = _add_normed(convolution.pre_layer_norm, x, attended(n), of_update=behind, update_limit=limit)
    if hidden is not None and _hides(hidden):  # The norm of a frame of 0 is 0 as well.
        valid = (~hidden).unsqueeze(-1)
        x, n = x * valid, n * valid
    x, n = _add_normed(last.pre_layer_norm, x, _convolved(convolution, n, delay), _limit(last))
    return _after_feed_forward(last, x, n, out, limit)[1]


def _after_feed_forward(
    part: Upstream, x: Tensor, n: Tensor, norm: Upstream, limit: float
) -> tuple[Tensor, Tensor]:
    """Returns x + scale · RMS(FF(n)), and the next norm of it."""
    return _add_normed(
        norm, x, _fed(part, n), limit,
        scale=float(part.post_layer_scale), of_update=part.post_layer_norm, update_limit=_limit(part),
    )  # fmt: skip


def _hides(mask: Tensor) -> bool:
    """Says whether a mask of padding may hide a frame. A recorded call serves other masks too."""
    return not (mask.is_cpu and may_read(mask)) or bool(mask.any())


# --------------------------------------------------------------------------- attention
def gemma4_attention(
    self: Upstream, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Serves the audio tower of transformers' Gemma 4, whose scores go through a soft cap c: s[i,j] = c tanh((q_i·k_j +
    q_i·R[i − j]) / c). hidden states (B, T, width), positions (1, l + 1, width) of l … 0 frames behind the query,
    attention mask (B, 1, blocks, C, C + l), 0 at the keys that a query sees -> ((B, T, width), None). A query sees l
    keys, itself included. All of it after the projections is float32, as upstream's."""
    frames, hidden = hidden_states.shape[1], None
    if position_embeddings.shape[:2] == (1, self.max_past_horizon + 1) and not is_watched(self):
        hidden = _hidden_in_windows(self, attention_mask, frames, self.max_past_horizon - 1)
    if hidden is None:
        _left.note(self, WATCHED if is_watched(self) else OTHER)
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
    if not is_part(positions, self) or mask.shape != hidden_states.shape[:2] or mask.dtype != torch.bool:
        _left.note(self, OTHER)
        return type(self).forward(self, hidden_states, mask)
    q, k, v = projections(hidden_states, (self.num_heads, -1), self.q_proj, self.k_proj, self.v_proj)
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
    options: dict[str, Any] = {"context": (past, 0), "soft_cap": cap, "pos_span": span}
    y = ops.rel_attention(q * root, k, v, rows.to(q.dtype), key_padding_mask=hidden, **options)
    if empty is None:
        return y
    means = module._extract_block_context(v).mean(2).repeat_interleave(module.chunk_size, 1)[:, :frames]
    return torch.where(empty[:, :, None, None], means, y)


def _empty_windows(hidden: Tensor, past: int) -> Tensor | None:
    """Returns (B, T): the queries none of whose last ``past`` keys, nor their own, is visible; None where a CPU finds
    that there are none."""
    visible = F.pad((~hidden).cumsum(1), (past + 1, 0))
    empty = visible[:, past + 1 :] == visible[:, : hidden.shape[1]]
    known = empty.is_cpu and may_read(empty)
    return None if known and not empty.any() else empty


def _hidden_in_windows(
    module: Upstream, mask: Any, frames: int, past: int
) -> tuple[Tensor, Tensor | None] | None:
    """Returns the hidden keys and the queries that see none, (B, T) or None, of Gemma 4's mask; None if it hides other
    keys than those of padding and those outside the window. All layers get one mask, which is read once."""
    size, horizon = module.chunk_size, module.max_past_horizon
    if mask is None or not frames or mask.shape[1:] != (1, -(-frames // size), size, module.context_size):
        return None
    if torch._C._functorch.is_batchedtensor(mask):  # by torch.func.vmap
        return None

    def find() -> tuple[Tensor, Tensor | None] | None:
        visible = mask == 0
        valid = visible.diagonal(horizon, 3, 4).flatten(1)[:, :frames]  # each query sees itself
        behind = torch.arange(size, dtype=torch.int64, device=mask.device)[:, None] + horizon
        behind = behind - torch.arange(module.context_size, dtype=torch.int64, device=mask.device)
        keys = module._extract_block_context(valid[:, :, None, None]).flatten(2)  # [B, blocks, context]
        expected = keys[:, None, :, None] & (behind >= 0) & (behind <= past)
        queries = torch.arange(expected.shape[2] * size, dtype=torch.int64, device=mask.device) < frames
        expected = expected & queries.view(-1, size, 1)
        known = not may_read(visible) or torch.equal(visible, expected)
        return (~valid, _empty_windows(~valid, past)) if known else None

    if not may_read(mask):
        return find()
    content = _kept.content(mask == 0 if mask.is_cpu else mask)
    return _kept.on(mask, "_fastasr_hidden", content, find)


# --------------------------------------------------------------------------- front ends
def gemma4_subsampling(
    self: Upstream, hidden_states: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Serves a convolution of Gemma 4's front end: maps (B, C, T, F), mask (B, T), True or 1 at valid frames, or None
    -> (B, channels, ⌈T / 2⌉, ⌈F / 2⌉), whose channels are last in memory, so that LayerNorm over them takes one pass,
    and the mask of these frames."""
    conv, norm, name = self.conv, self.norm, fused_name(self.act)
    layer_norm = is_plain(norm, torch.nn.LayerNorm) and norm.weight is not None
    if not (plumbing.is_dense_conv2d(conv) and layer_norm and name):
        _left.note(self, "conv, norm or act has hooks or is no plain one")
        return type(self).forward(self, hidden_states, mask)
    x = hidden_states
    if mask is not None:
        mask = mask.to(x.device)
        if _hides(mask == 0):
            x = x * mask[:, None, :, None]
        mask = mask[:, ::2]
    y = _channels_last(conv, x.to(conv.weight.dtype))
    y = ops.norm_activation(y, norm.weight, norm.bias, eps=norm.eps, activation=name)
    return y.permute(0, 3, 1, 2), mask


def gemma3n_subsampling(self: Upstream, audio_encodings: Tensor) -> Tensor:
    """Serves a convolution of Gemma 3n's front end: maps (B, C, T, F) -> (B, channels, T', F'), whose channels are last
    in memory. A frame is normalised by the mean μ_t of all frames up to it, and by the mean of (x_s − μ_s)² over these.
    """
    conv, norm = self.conv, self.norm
    left, right, top, bottom = self.manual_padding
    if not (
        plumbing.is_dense_conv2d(conv) and is_part(norm, self) and is_plain(self.activation, torch.nn.ReLU)
    ):
        _left.note(self, "conv, norm or activation has hooks or is no plain one")
        return type(self).forward(self, audio_encodings)
    x = F.pad(audio_encodings, (left, right, top, bottom)).to(conv.weight.dtype)
    y = _channels_last(conv, x)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, (2, 3), correction=0)  # [B, T]
    count = torch.arange(1, wide.shape[1] + 1, dtype=wide.dtype, device=wide.device)
    so_far = mean.cumsum(1) / count
    spread = (variance + (mean - so_far).square()).cumsum(1) / count
    scale = torch.rsqrt(spread + norm.eps)[:, :, None, None] * norm.weight.to(wide.dtype)
    centred = wide - so_far[:, :, None, None]
    if torch.is_grad_enabled():
        y = (centred * scale).to(y.dtype).relu()
    else:
        y = centred.mul_(scale).to(y.dtype).relu_()
    return y.permute(0, 3, 1, 2)


def _channels_last(conv: Upstream, x: Tensor) -> Tensor:
    """Returns the convolution of maps x (B, C, T, F) as (B, T', F', channels), contiguous. With one channel in it is a
    product, which gives the channels last without a copy."""
    if x.shape[1] == 1:
        rows, columns = conv.padding
        x = F.pad(x[:, 0], (columns, columns, rows, rows))
        return ops.linear(plumbing.patches(conv, x), conv.weight.flatten(1), conv.bias)
    weight = conv.weight
    if not is_transformed():  # torch.func.vmap knows no order of channels.
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    y = F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)
    return y.permute(0, 2, 3, 1).contiguous()
