# SPDX-License-Identifier: Apache-2.0
"""Inference of our front end and encoder in plain PyTorch, for exporters.

It computes the same as the modules' forwards from the modules' parameters, but without kernels of fastasr, loops over
blocks and branches on shapes, so that a traced graph works for every batch size and number of frames. It is slower than
the modules and only works for the unchanged classes of this package.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common.linear import Linear
from fastasr.models.zipformer.activations import SwooshR
from fastasr.models.zipformer.encoder import Zipformer, convert_num_channels
from fastasr.models.zipformer.stack import STATES_PER_LAYER, DownsampledZipformerEncoder
from fastasr.models.zipformer.subsampling import Conv2dSubsampling

MASKED = -1000.0


def is_exporting() -> bool:
    """Says whether a tracer or an exporter runs."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def serves(encoder_embed: Any, encoder: Any) -> bool:
    """Says whether both modules have the classes that this file defines in plain PyTorch."""
    return type(encoder_embed) is Conv2dSubsampling and type(encoder) is Zipformer


# --------------------------------------------------------------------------- whole utterances
def encode(encoder_embed: Any, encoder: Any, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Features (batch, time, channels), lengths -> encoder_out (batch, frames, channels), lengths."""
    x, x_lens = front_end(encoder_embed, x), (x_lens - 7) // 2
    padding = torch.arange(x.shape[1], device=x.device, dtype=torch.int64) >= x_lens.unsqueeze(1)  # [N, T]
    x = x.transpose(0, 1)
    outputs = []
    for i, stack in enumerate(encoder.encoders):
        x, _ = _stack(stack, convert_num_channels(x, encoder.encoder_dim[i]), padding, None, 0)
        outputs.append(x)
    y = _downsample(encoder.downsample_output, encoder._get_full_dim_output(outputs))
    return y.transpose(0, 1), (x_lens + 1) // 2


def front_end(embed: Any, x: Tensor) -> Tensor:
    """(batch, time, features) -> (batch, (time - 7) // 2, channels)"""
    x = _convolutions(embed.conv, x.unsqueeze(1))
    layer = embed.convnext
    conv = layer.depthwise_conv
    h = F.conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
    return _projected(embed, x + _convnext_hidden(layer, h))


def front_end_chunk(embed: Any, x: Tensor, cached_left_pad: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, time, features), the cache -> (batch, (time - 7) // 2 - 3, channels), the next cache."""
    x = _convolutions(embed.conv, x.unsqueeze(1))
    layer = embed.convnext
    pad, conv = layer.padding[0], layer.depthwise_conv
    extended = torch.cat([cached_left_pad, x], dim=2)
    h = F.conv2d(extended, conv.weight, conv.bias, padding=(0, layer.padding[1]), groups=conv.groups)
    frames = x.shape[2] - pad
    y = _projected(embed, x[:, :, :frames] + _convnext_hidden(layer, h))
    return y, extended[:, :, frames : frames + pad]


def _convolutions(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        elif isinstance(layer, SwooshR):
            x = _swoosh(x, "SwooshR")
    return x


def _convnext_hidden(layer: Any, h: Tensor) -> Tensor:
    expand, contract = layer.pointwise_conv1, layer.pointwise_conv2
    h = _swoosh(F.conv2d(h, expand.weight, expand.bias), "SwooshL")
    return F.conv2d(h, contract.weight, contract.bias)


def _projected(embed: Any, x: Tensor) -> Tensor:
    return _bias_norm(embed.out_norm, linear(embed.out, x.transpose(1, 2).flatten(2)))


# --------------------------------------------------------------------------- chunks
def encode_chunk(
    encoder_embed: Any, encoder: Any, x: Tensor, states: Any, unseen: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """A chunk of features (batch, time, channels), states, ``unseen`` (batch, left context) -> encoder_out (batch,
    frames, channels), the new states except the last. ``unseen`` is True at frames before the stream's beginning.
    """
    x, left_pad = front_end_chunk(encoder_embed, x, states[-2])
    seen = torch.zeros_like(x[:, :, 0]).to(torch.bool)  # [N, T]: a chunk has no padding
    padding = torch.cat([unseen, seen], dim=1)
    x = x.transpose(0, 1)
    outputs, new_states, first = [], [], 0
    for i, stack in enumerate(encoder.encoders):
        last = first + stack.num_layers * STATES_PER_LAYER
        left = encoder.left_context_frames[0] // encoder.downsampling_factor[i]
        x = convert_num_channels(x, encoder.encoder_dim[i])
        x, caches = _stack(stack, x, padding, states[first:last], left)
        new_states += caches
        outputs.append(x)
        first = last
    y = _downsample(encoder.downsample_output, encoder._get_full_dim_output(outputs))
    return y.transpose(0, 1), [*new_states, left_pad]


# --------------------------------------------------------------------------- stacks and layers
def _stack(stack: Any, x: Tensor, padding: Tensor, states: Any, left: int) -> tuple[Tensor, list]:
    """x (T, N, C), padding (N, left context at the outer rate + T); states of the stack or None -> y, new states."""
    if not isinstance(stack, DownsampledZipformerEncoder):
        return _layers(stack, x, padding, states, left)
    y = _downsample(stack.downsample, x)
    y, states = _layers(stack.encoder, y, padding[:, :: stack.downsample_factor], states, left)
    y = y.repeat_interleave(stack.downsample_factor, dim=0)[: x.shape[0]]
    return _bypass(stack.out_combiner, x, y), states


def _layers(stack: Any, x: Tensor, padding: Tensor, states: Any, left: int) -> tuple[Tensor, list]:
    positions = _positions(stack.encoder_pos, x, left)  # [T + S - 1, D]
    new_states = []
    for i, layer in enumerate(stack.layers):
        caches = None if states is None else states[i * STATES_PER_LAYER : (i + 1) * STATES_PER_LAYER]
        x, caches = _layer(layer, x, positions, padding, caches)
        new_states += caches
    return x, new_states


def _layer(layer: Any, x: Tensor, positions: Tensor, padding: Tensor, caches: Any) -> tuple[Tensor, list]:
    caches = (None,) * STATES_PER_LAYER if caches is None else caches
    key, nonlin, val1, val2, conv1, conv2 = caches
    frame_padding = padding if key is None else padding[:, key.shape[0] :]
    origin, heads = x, layer.self_attn_weights.num_heads
    weights, key = _attention_weights(layer.self_attn_weights, x, positions, padding, key)
    x = x + _feed_forward(layer.feed_forward1, x)
    y, nonlin = _nonlin_attention(layer.nonlin_attention, x, weights[0:1], nonlin)
    x = x + y
    y, val1 = _self_attention(layer.self_attn1, x, weights, heads, val1)
    x = x + y
    y, conv1 = _convolution(layer.conv_module1, x, frame_padding, conv1)
    x = x + y
    x = x + _feed_forward(layer.feed_forward2, x)
    x = _bypass(layer.bypass_mid, origin, x)
    y, val2 = _self_attention(layer.self_attn2, x, weights, heads, val2)
    x = x + y
    y, conv2 = _convolution(layer.conv_module2, x, frame_padding, conv2)
    x = x + y
    x = x + _feed_forward(layer.feed_forward3, x)
    x = _bypass(layer.bypass, origin, _bias_norm(layer.norm, x))
    return x, [key, nonlin, val1, val2, conv1, conv2]


def _positions(encoding: Any, x: Tensor, left: int) -> Tensor:
    """Returns the encodings (T + S - 1, D) of the offsets from -(S - 1) to T - 1, for S = left + T sources."""
    frames = x.shape[0]
    offset = (
        torch.arange(1 - frames - left, frames, device=x.device, dtype=torch.int64).to(x.dtype).unsqueeze(1)
    )
    width = encoding.embed_dim
    harmonic = torch.arange(1, width // 2 + 1, device=x.device, dtype=torch.int64).to(x.dtype)
    c = width**0.5
    compressed = c * offset.sign() * ((offset.abs() + c).log() - math.log(c))
    angle = (compressed / (encoding.length_factor * width / (2.0 * math.pi))).atan() * harmonic
    pe = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)
    return torch.cat([pe[:, :-1], torch.ones_like(pe[:, -1:])], dim=1)


def _attention_weights(
    module: Any, x: Tensor, positions: Tensor, padding: Tensor, cached_key: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    heads, width = module.num_heads, module.num_heads * module.query_head_dim
    q, k, p = linear(module.in_proj, x).split([width, width, heads * module.pos_head_dim], dim=-1)
    if cached_key is not None:
        left = cached_key.shape[0]
        k = torch.cat([cached_key, k])
        cached_key = k[k.shape[0] - left :]
    frames, batch, _ = x.shape
    sources = k.shape[0]
    q, k, p = (_by_head(t, heads) for t in (q, k, p))  # [H, N, T, d]
    relative = linear(module.linear_pos, positions).reshape(-1, heads, module.pos_head_dim)
    relative = relative.permute(1, 2, 0)  # [H, d, T + S - 1]
    by_offset = p @ relative.unsqueeze(1)  # [H, N, T, T + S - 1]
    row = torch.arange(frames, device=x.device, dtype=torch.int64).unsqueeze(1)
    column = torch.arange(sources, device=x.device, dtype=torch.int64)
    index = (frames - 1 - row + column).expand(heads, batch, frames, sources)
    scores = q @ k.transpose(-1, -2) + by_offset.gather(-1, index)
    scores = scores.masked_fill(padding[:, None], MASKED)
    return scores.softmax(dim=-1), cached_key


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(time, batch, heads * d) -> (heads, batch, time, d)"""
    frames, batch, channels = x.shape
    return x.reshape(frames, batch, heads, channels // heads).permute(2, 1, 0, 3)


def _nonlin_attention(
    module: Any, x: Tensor, weights: Tensor, cached: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    s, v, y = linear(module.in_proj, x).chunk(3, dim=2)
    v = (v * s.tanh()).transpose(0, 1).unsqueeze(0)  # [1, N, T, C]
    if cached is not None:
        left = cached.shape[2]
        v = torch.cat([cached, v], dim=2)
        cached = v[:, :, v.shape[2] - left :]
    v = (weights @ v).squeeze(0).transpose(0, 1)
    return linear(module.out_proj, v * y), cached


def _self_attention(
    module: Any, x: Tensor, weights: Tensor, heads: int, cached: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    v = linear(module.in_proj, x)
    if cached is not None:
        left = cached.shape[0]
        v = torch.cat([cached, v])
        cached = v[v.shape[0] - left :]
    y = (weights @ _by_head(v, heads)).permute(2, 1, 0, 3).flatten(2)
    return linear(module.out_proj, y), cached


def _convolution(
    module: Any, x: Tensor, padding: Tensor, cached: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    x, s = linear(module.in_proj, x).chunk(2, dim=2)
    h = (x * s.sigmoid()).permute(1, 2, 0)  # [N, C, T]
    h = h.masked_fill(padding.unsqueeze(1), 0.0)
    conv = module.depthwise_conv
    if isinstance(conv, torch.nn.Conv1d):
        y = F.conv1d(h, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
    else:
        y, cached = _chunk_causal(conv, h, cached)
    out = module.out_proj
    return F.linear(_swoosh(y.permute(2, 0, 1), out.activation), out.weight, out.bias), cached


def _chunk_causal(conv: Any, h: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor | None]:
    left = conv.kernel_size // 2
    inner, causal = conv.chunkwise_conv, conv.causal_conv
    within = F.conv1d(h, inner.weight, inner.bias, padding=inner.padding, groups=inner.groups)
    extended = F.pad(h, (left, 0)) if cached is None else torch.cat([cached, h], dim=2)
    before = F.conv1d(extended, causal.weight, causal.bias, groups=causal.groups)
    if cached is not None:
        cached = extended[..., extended.shape[2] - left :]
    return within * conv._get_chunk_scale(h.shape[2]) + before, cached


# --------------------------------------------------------------------------- small parts
def linear(layer: Any, x: Tensor) -> Tensor:
    """Calls a linear layer of fastasr with torch's own kernels, and any other layer normally."""
    return F.linear(x, layer.weight, layer.bias) if isinstance(layer, Linear) else layer(x)


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    out = module.out_proj
    return F.linear(_swoosh(linear(module.in_proj, x), out.activation), out.weight, out.bias)


def _swoosh(x: Tensor, kind: str) -> Tensor:
    if kind == "SwooshL":
        return F.softplus(x - 4.0) - 0.08 * x - 0.035
    return F.softplus(x - 1.0) - 0.08 * x - 0.313261687


def _bias_norm(module: Any, x: Tensor) -> Tensor:
    return x * (x - module.bias).square().mean(dim=-1, keepdim=True).rsqrt() * module.log_scale.exp()


def _bypass(module: Any, origin: Tensor, x: Tensor) -> Tensor:
    return origin + (x - origin) * module.bypass_scale


def _downsample(module: Any, x: Tensor) -> Tensor:
    """Repeats the last frame up to a multiple of the factor, without a branch on the number of frames."""
    factor = module.downsample
    frames, batch, channels = x.shape
    rows = (frames + factor - 1) // factor
    index = torch.arange(rows * factor, device=x.device, dtype=torch.int64)
    index = torch.minimum(index, torch.ones_like(index) * (frames - 1))  # clamp would keep the traced length
    x = x[index].reshape(-1, factor, batch, channels)
    return (x * module.bias.softmax(dim=0).view(factor, 1, 1)).sum(dim=1)
