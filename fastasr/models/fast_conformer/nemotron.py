# SPDX-License-Identifier: Apache-2.0
r"""Attention, convolution module and front end of Nemotron's streaming FastConformer (Noroozi et al.,
"Stateful Conformer with cache-based inference for streaming automatic speech recognition", ICASSP 2024).

Attention sees chunks: with a look-ahead of r frames, those of its own chunk of r + 1 frames and of the earlier ones
that fit into the left context. Convolutions over time are padded on the left (the front end's by one more frame on the
right); after the convolution LayerNorm stands for BatchNorm. Each takes the past from a cache and updates it, so that
chunks give the outputs of the whole recording. Attributes have the names of transformers'
``NemotronAsrStreamingEncoder``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr._transforms import is_transformed
from fastasr.models.common import plumbing
from fastasr.models.common.activations import fused_name, norm_activated
from fastasr.models.common.plain import is_plain_named
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import attended
from fastasr.models.fast_conformer.convolution import pointwise
from fastasr.models.fast_conformer.masks import is_readable, seen
from fastasr.models.fast_conformer.positions import FastConformerPositions
from fastasr.models.fast_conformer.subsampling import convolved, stem


def cached_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Serves NemotronAsrStreamingEncoderAttention: hidden states (B, T, width), position embeddings (B or 1, 2K − 1,
    width), attention mask (bool (B, 1, T, K), True: the query sees the key) or None -> ((B, T, width), None).

    The T keys follow those of the cache, K in all. A query that sees no key gets 0 before the last projection.
    transformers before 5.24 calls the cache past_key_values, and does not give it ``kwargs``.
    """
    given = {} if cache is None else {"kwargs": kwargs}
    cache = past_key_values if cache is None else cache
    batch, frames = hidden_states.shape[:2]
    keys = (position_embeddings.shape[1] + 1) // 2
    implementation = masks.implementation(self.config)
    if implementation != "sdpa" or not is_readable(attention_mask, batch, frames, keys):
        _left.note(self, masks.unread(implementation == "sdpa", implementation))
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
    shape = batch, frames, *self.bias_u.shape
    q = plumbing.linear(self.q_proj, hidden_states).view(shape)
    k = plumbing.linear(self.k_proj, hidden_states).view(shape)
    v = plumbing.linear(self.v_proj, hidden_states).view(shape)
    if cache is not None:
        if (layer := window_layer(cache, self.layer_idx)) is not None and _writes_in_place(layer, k):
            k, v = _extended(layer, k, v)
        else:
            found = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, **given)
            k, v = (t.transpose(1, 2).contiguous() for t in found)
    by = None if attention_mask is None else seen(attention_mask, left=self.config.sliding_window - 1)
    y = attended(self, q, k, v, position_embeddings, attention_mask, by)
    return plumbing.linear(self.o_proj, y.flatten(2)), None


def window_layer(cache: Any, index: int) -> Any:
    """Returns a layer of transformers' cache that holds the last frames of keys and values, none of which it may have
    to give back, or None."""
    layer: Any = cache.layers[index] if index < len(cache.layers) and not cache.offloading else None
    plain = type(layer).__name__ == "DynamicSlidingWindowLayer" and layer.is_initialized
    return layer if plain and not layer.record_past else None


def sees_everything(cache: Any, frames: int, look_ahead: int | None) -> bool:
    """Says whether the next frames of a stream see each other and all frames that transformers' ``cache`` holds."""
    if cache is None or look_ahead is None or not frames:
        return False
    layer = window_layer(cache, 0)
    if layer is None:
        return False
    size, past, first = look_ahead + 1, layer.get_seq_length(), layer.get_mask_sizes(frames)[1]
    chunk = past // size
    chunks = (layer.sliding_window - 1) // size
    return (past + frames - 1) // size == chunk and first // size >= chunk - chunks


class _Room:
    """Memory (2, B, N, H, d) of keys and values. The cache's, ``keys`` and ``values``, are the last up to ``end``.

    A copy of a cache's layer may share it: the first to come writes behind ``end``, and the other sees that its tensors
    are different ones.
    """

    def __init__(self, memory: Tensor, layer: Any) -> None:
        self.memory, self.end, self.keys, self.values = memory, layer.keys.shape[2], layer.keys, layer.values
        memory[0, :, : self.end] = layer.keys.transpose(1, 2)
        memory[1, :, : self.end] = layer.values.transpose(1, 2)


def _writes_in_place(layer: Any, k: Tensor) -> bool:
    return (
        k.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and k.dtype == layer.keys.dtype == layer.values.dtype
        and layer.keys.shape == (len(k), k.shape[2], layer.keys.shape[2], k.shape[3]) == layer.values.shape
    )


def _extended(layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns keys and values (B, K, H, d) of a cache's layer and a chunk, (B, T, H, d), and keeps the last of them, as
    upstream's ``update``, which copies all of them for every chunk.

    Here a chunk is written behind those before it, where nobody reads, and all move once no room is left.
    """
    frames, held = k.shape[1], layer.keys.shape[2]
    room = getattr(layer, "_fastasr_room", None)
    if (
        room is None
        or room.keys is not layer.keys
        or room.values is not layer.values
        or room.end + frames > room.memory.shape[2]
        or (room.memory.is_inference() and not torch.is_inference_mode_enabled())
    ):
        # the kernel takes frames of one stream where they lie
        more = max(frames, held) if len(k) == 1 else frames
        room = _Room(k.new_empty(2, len(k), held + more, *k.shape[2:]), layer)
    begin, middle, room.end = room.end - held, room.end, room.end + frames
    room.memory[0, :, middle : room.end], room.memory[1, :, middle : room.end] = k, v
    k, v = room.memory[:, :, begin : room.end].unbind()
    first = max(0, held + frames + 1 - layer.sliding_window)
    room.keys, room.values = k[:, first:].transpose(1, 2), v[:, first:].transpose(1, 2)
    layer.keys, layer.values, layer._fastasr_room = room.keys, room.values, room
    layer.cumulative_length += frames
    return k, v


def _is_upstreams(owner: torch.nn.Module, module: torch.nn.Module, name: str) -> bool:
    """Says whether a part, whose source the rule has read, is still as it was, so that we need not call it."""
    return is_plain_named(module, (f"NemotronAsrStreamingEncoder{name}",), owner)


def causal_convolution(
    self: Any, hidden_states: Tensor, all_masked_rows: Tensor | None = None, padding_cache: Any = None
) -> Tensor:
    """Serves NemotronAsrStreamingEncoderConvolutionModule: hidden states (B, T, width), all_masked_rows (bool (B, 1,
    T), True: the frame sees no key, and its gated frame is 0) or None -> (B, T, width)."""
    conv = self.depthwise_conv
    if not _is_upstreams(self, conv, "CausalConv1d"):
        _left.note(self, "depthwise_conv has hooks or is not upstream's")
        return type(self).forward(self, hidden_states, all_masked_rows, padding_cache)
    h = pointwise(self.pointwise_conv1, hidden_states)
    taps = conv.weight.shape[-1]
    kept = None if padding_cache is None else padding_cache.layers.get(conv.cache_key)
    if padding_cache is None or (kept is not None and not torch.is_grad_enabled()):
        found: Any = ops.gated_depthwise_conv(
            h.transpose(0, 1), conv.weight, conv.bias,
            padding_mask=None if all_masked_rows is None else all_masked_rows[:, 0],
            cache=None if kept is None else kept.cache,
            activation="identity", return_cache=kept is not None, delay=(taps - 1) // 2,
        )  # fmt: skip
        if kept is not None:
            found, cache = found
            kept.cache.copy_(cache)
        z = found.transpose(0, 1)
    else:  # Upstream makes the cache, and gradients need its old values.
        u = F.glu(h, -1).transpose(1, 2)
        u = u if all_masked_rows is None else u.masked_fill(all_masked_rows, 0.0)
        u = padding_cache.update(u, conv.cache_key, conv)  # [B, C, K - 1 + T]
        z = F.conv1d(u, conv.weight, conv.bias, groups=conv.groups).transpose(1, 2)
    return pointwise(self.pointwise_conv2, norm_activated(self.norm, self.activation, z))


def front_convolutions(self: Any) -> list[Any]:
    """Returns the convolutions over time of a NemotronAsrStreamingEncoderSubsamplingConv2D."""
    return [self.conv_in, *(getattr(layer, "depthwise_conv", layer) for layer in self.layers)]


def causal_subsampling(
    self: Any, input_features: Tensor, attention_mask: Tensor | None = None, padding_cache: Any = None
) -> Tensor:
    """Serves NemotronAsrStreamingEncoderSubsamplingConv2D: features (B, T₀, mel_bins), mask (B, T₀), 1 at valid frames,
    or None -> (B, T, width). Without a cache each of the convolutions makes ⌊n / 2⌋ + 1 frames and bins of n."""
    convs = front_convolutions(self)
    products = [getattr(layer, "pointwise_conv", layer) for layer in self.layers]
    if not (
        all(_is_upstreams(self, conv, "CausalConv2D") for conv in convs)
        and all(_is_upstreams(self, layer, "SubsamplingLayer") for layer in self.layers)
        and all(map(plumbing.is_pointwise_conv2d, products))
        and fused_name(self.act_fn) == "relu"
    ):
        _left.note(self, "one of its layers has hooks or is no plain one")
        return type(self).forward(self, input_features, attention_mask, padding_cache)
    lengths = None if attention_mask is None else attention_mask.sum(-1)
    if padding_cache is None:
        pairs = zip(convs[1:], products, strict=True)
        layers = [convs[0], self.act_fn, *(m for pair in pairs for m in (*pair, self.act_fn))]
        y = convolved(layers, input_features, lengths, left=2)
    else:
        y = _subsampled_chunk(convs, products, input_features, lengths, padding_cache)
    y = plumbing.linear(self.linear, y)
    # upstream's encoder scales it in place, which a view would not bear
    return y.clone() if y.requires_grad else y


def _subsampled_chunk(
    convs: list[Any], products: list[Any], x: Tensor, lengths: Tensor | None, cache: Any
) -> Tensor:
    """Returns the last linear layer's input (B, n, C · F) for the features that follow the cached ones."""
    h = x.unsqueeze(-1)
    for i, conv in enumerate(convs):
        h = cache.update(F.pad(h.permute(0, 3, 1, 2), (2, 1)), conv.cache_key, conv)
        if i == 0:
            h = stem(conv, h[:, 0])
        else:
            h = F.conv2d(h, conv.weight, conv.bias, stride=2, groups=conv.groups).permute(0, 2, 3, 1)
            h = ops.linear_activation(h, products[i - 1].weight[..., 0, 0], products[i - 1].bias, "relu")
        if lengths is not None:
            lengths = (lengths - 2) // 2 + 1
            frame = torch.arange(h.shape[1], device=h.device, dtype=torch.int64)
            h = h * (frame < lengths[:, None])[..., None, None]
    return h.transpose(2, 3).flatten(2)


def limited_positions(self: Any, hidden_states: Tensor, cached_frames: int | None = None) -> Tensor:
    """Serves NemotronAsrStreamingEncoderRelPositionalEncoding, which refuses sequences above its configured length."""
    cached_frames = cached_frames or 0
    if hidden_states.shape[1] + cached_frames > self.max_position_embeddings:
        return type(self).forward(self, hidden_states, cached_frames)
    return FastConformerPositions.forward(self, hidden_states, cached_frames)
