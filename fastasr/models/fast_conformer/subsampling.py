# SPDX-License-Identifier: Apache-2.0
r"""The front end: three convolutions of stride 2, the second and third depthwise and followed by a product, and ReLU.

Frames behind a sequence's end are 0 after every convolution. Everything is computed channels last.
``ops.conv_subsampling`` computes the first two convolutions without the map between them, which would be most of the
memory of a training step. Inference on the CPU computes one strip of frames after the other: an output frame sees 15
frames of the input (with a factor of 8), so the maps between need little memory however long the recording.

Upstream: ``ParakeetEncoderSubsamplingConv2D``.
"""

import math
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr._recording import on_host
from fastasr.models.common import plumbing
from fastasr.models.common.plain import is_plain
from fastasr.models.common.ragged import Packing, with_zeros
from fastasr.models.common.row import Spans

STRIP_BYTES = 32 << 20  # A strip of the second convolution's output; 8 MB to 128 MB cost the same.


# A front end's convolutions and ReLUs come as a ModuleList, a Sequential or a list.
Layers: TypeAlias = Any


class FastConformerSubsampling(torch.nn.Module):
    """features (B, T₀, mel_bins), mask (B, T₀), True or 1 at valid frames, or None -> (B, ⌈T₀ / factor⌉, width)."""

    layers: Any  # a ModuleList of convolutions and ReLUs

    def __init__(self, mel_bins: int, width: int, channels: int = 256, factor: int = 8) -> None:
        super().__init__()
        self.num_layers, self.channels = int(math.log2(factor)), channels
        layers: list[torch.nn.Module] = [torch.nn.Conv2d(1, channels, 3, 2, 1), torch.nn.ReLU()]
        for _ in range(self.num_layers - 1):
            layers += [torch.nn.Conv2d(channels, channels, 3, 2, 1, groups=channels)]
            layers += [torch.nn.Conv2d(channels, channels, 1), torch.nn.ReLU()]
        self.layers = torch.nn.ModuleList(layers)
        self.linear = torch.nn.Linear(channels * (mel_bins // 2**self.num_layers), width)

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if not are_plain(self.layers):
            _left.note(self, "one of its layers has hooks or is no plain one")
            return _as_upstream(self, input_features, attention_mask)
        lengths = None if attention_mask is None else attention_mask.sum(-1)
        return plumbing.linear(self.linear, convolved(self.layers, input_features, lengths))


def are_plain(layers: Layers) -> bool:
    """Says whether these are torch's convolutions and ReLUs in the order of this front end, without hooks, so that
    weights suffice.
    """
    kinds = _is_strided, plumbing.is_pointwise_conv2d, _is_relu
    expected = (_is_strided, _is_relu, *kinds * (_stages(layers) - 1))
    return len(layers) == len(expected) and all(
        fits(layer) for fits, layer in zip(expected, layers, strict=True)
    )


# Lengths of recordings are numbers on the host or a tensor (B,); ``Spans`` are for recordings in a row.
Lengths = list[int] | Spans | Tensor
N = TypeVar("N", int, list[int], Tensor, Spans)


def in_a_row(module: FastConformerSubsampling, recordings: list[Tensor]) -> Tensor:
    """Returns the output (N, width) of the front end ``module``, whose layers are plain, for features of recordings, a
    list of (T₀, mel_bins): all go through its convolutions in one row, with a frame or more of zeros between."""
    layers, lengths = module.layers, [len(x) for x in recordings]
    slots = [n // 2 + 1 for n in subsampled(layers, lengths, stages=_stages(layers) - 1)]
    factor = frames_per_output(layers)
    begins = (
        torch.tensor([0, *accumulate(slots[:-1])], device=recordings[0].device, dtype=torch.int64) * factor
    )
    spans = Spans(begins, begins + torch.tensor(lengths, device=begins.device, dtype=torch.int64))
    x = with_zeros(recordings, [factor * slot for slot in slots]).unsqueeze(0)
    y = plumbing.linear(module.linear, convolved(layers, x, spans))[0]
    return Packing(subsampled(layers, lengths), y.device).gathered(y, slots)


def convolved(layers: Layers, x: Tensor, lengths: Tensor | Spans | None, left: int = 1) -> Tensor:
    """Returns the last linear layer's input (B, T, C · F) for features (B, T₀, mel_bins), of which ``lengths`` (B),
    or None for all, are valid, or ``Spans`` where B is 1. ``layers`` are those of the front end above, whose
    convolutions are padded by ``left`` on the left of both axes and by 1 on the right: T is ⌈T₀ / factor⌉ with 1."""
    batch, frames, bins = x.shape
    count, bins_left, stages = (
        subsampled(layers, frames, left),
        subsampled(layers, bins, left),
        _stages(layers),
    )
    differentiated = x.requires_grad or any(p.requires_grad for layer in layers for p in layer.parameters())
    differentiated = torch.is_grad_enabled() and differentiated
    eager_cpu = on_host(x)
    strip = count
    if eager_cpu and not differentiated:
        first = 2 ** max(0, stages - 2)  # frames of the first map in memory for one of the output
        per_frame = batch * first * (bins // 4 + 1) * layers[0].out_channels * x.element_size()
        strip = max(1, STRIP_BYTES // max(1, per_frame))
    valid: Lengths
    if isinstance(lengths, Spans):
        valid = lengths
    elif eager_cpu:  # It uses lists of lengths, for which another device would have to wait.
        valid = [frames] * batch if lengths is None else lengths.tolist()
    elif lengths is None:
        valid = torch.full((batch,), frames, device=x.device, dtype=torch.int64)
    else:
        valid = lengths
    if count == 0:
        return x.new_zeros(batch, 0, layers[0].out_channels * bins_left)
    if strip >= count:  # A range would make an exported program's number of frames a constant.
        return _strip(layers, x, valid, 0, count, left)
    strips = [
        _strip(layers, x, valid, begin, min(strip, count - begin), left) for begin in range(0, count, strip)
    ]
    return torch.cat(strips, 1)


def subsampled(layers: Layers, frames: N, left: int = 1, stages: int | None = None) -> N:
    """Returns the front end's length of output for ``frames``, a number, or a list or tensor of numbers, or the spans
    of its output; or that of its first ``stages``."""
    found: N = _after(_stages(layers) if stages is None else stages, frames, left)
    return found


def frames_per_output(layers: Layers) -> int:
    return 2 ** _stages(layers)


def _stages(layers: Layers) -> int:
    """Returns how many convolutions of stride 2 the front end has."""
    return (len(layers) + 1) // 3


def _strip(layers: Layers, x: Tensor, lengths: Lengths, begin: int, count: int, left: int) -> Tensor:
    """Returns frames begin … begin + count − 1 of the input of ``linear``, (B, count, C · F)."""
    levels = [(begin, count)]
    for _ in range(_stages(layers)):  # the frames that these need, level by level, down to those of x
        begin, count = 2 * begin - left, 2 * count + 1
        levels.insert(0, (begin, count))
    first, second = layers[0], layers[2] if len(layers) > 2 else None
    x = _part(x, *levels[0], left)
    if second is None:
        return _within(stem(first, x), levels[1][0], _after(1, lengths, left)).transpose(2, 3).flatten(2)
    outside = _outside(_after(1, lengths, left), *levels[1], x)
    mask = None if outside is None else ~outside
    h = ops.conv_subsampling(x, first.weight, first.bias, second.weight, second.bias, mask, left=left)
    for i, (begin, _) in enumerate(levels[2:]):
        depthwise, pointwise = layers[2 + 3 * i], layers[3 + 3 * i]
        if i > 0:
            h = h.permute(0, 3, 1, 2)
            h, padding = (h, (0, 1)) if left == 1 else (F.pad(h, (left, 1)), 0)
            weight, bias, groups = depthwise.weight, depthwise.bias, depthwise.groups
            h = F.conv2d(h, weight, bias, stride=2, padding=padding, groups=groups).permute(0, 2, 3, 1)
        h = ops.linear_activation(h, pointwise.weight.flatten(1), pointwise.bias, "relu")
        # No other frame sees the depthwise convolution's output outside.
        h = _within(h, begin, _after(i + 2, lengths, left))
    return h.transpose(2, 3).flatten(2)  # [B, count, C * F]


def _part(x: Tensor, begin: int, count: int, left: int) -> Tensor:
    """Returns frames ``begin`` … of x (B, T₀, mel_bins) with the padding of its bins, 0 outside."""
    return F.pad(x, (left, 1, -begin, begin + count - x.shape[1]))  # Negative numbers cut frames off.


def stem(conv: Any, x: Tensor) -> Tensor:
    """Returns (B, n, F, C): the ReLU of the first convolution of padded x, as a product."""
    return ops.linear_activation(plumbing.patches(conv, x), conv.weight.flatten(1), conv.bias, "relu")


def _after(stages: int, lengths: Any, left: int = 1) -> Any:
    """Returns the length, or the list or tensor of them, after convolutions of 3 taps and stride 2, each with 1 of
    padding on the right. Spans begin at multiples of the factor."""
    factor, more = 2**stages, left * (2**stages - 1)
    if isinstance(lengths, Spans):
        return Spans(lengths.begins // factor, (lengths.ends + more) // factor)
    return (
        [(n + more) // factor for n in lengths] if isinstance(lengths, list) else (lengths + more) // factor
    )


def _outside(lengths: Lengths, begin: int, count: int, x: Tensor) -> Tensor | None:
    """Returns which of the frames begin … begin + count − 1 of a map of x lie outside their sequence, (B, count), or
    None where none of a list of lengths do."""
    if isinstance(lengths, Spans):
        return lengths.outside(begin, count, x)
    if isinstance(lengths, list):
        if begin >= 0 and begin + count <= min(lengths, default=0):
            return None
        lengths = torch.tensor(lengths, device=x.device, dtype=torch.int64)
    frame = torch.arange(begin, begin + count, device=x.device, dtype=torch.int64)
    outside = frame >= lengths.unsqueeze(1)
    return outside if begin >= 0 else outside | (frame < 0)


def _within(h: Tensor, begin: int, lengths: Lengths) -> Tensor:
    """Returns h (B, n, F, C), which begins at frame ``begin``, with 0 at frames outside their sequence. On CPU h itself
    changes while no gradient is wanted."""
    outside = _outside(lengths, begin, h.shape[1], h)
    if outside is None:
        return h  # Most strips save a pass over memory here.
    if not on_host(h):  # Another device would wait for the numbers of these frames.
        return h.masked_fill(outside[..., None, None], 0.0)
    behind = outside.flatten().nonzero()[:, 0]
    rows = h.flatten(0, 1)
    rows = rows.index_fill(0, behind, 0.0) if h.requires_grad else rows.index_fill_(0, behind, 0.0)
    return rows.view(h.shape)


def _is_relu(layer: torch.nn.Module) -> bool:
    return is_plain(layer, torch.nn.ReLU)


def _is_strided(layer: torch.nn.Module) -> bool:
    """Says whether this is a convolution of this front end that halves both axes, without hooks."""
    return (
        is_plain(layer, torch.nn.Conv2d)
        and (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (2, 2), (1, 1))
        and layer.groups == layer.in_channels
        and (layer.dilation, layer.padding_mode) == ((1, 1), "zeros")
    )


def _as_upstream(module: FastConformerSubsampling, x: Tensor, mask: Tensor | None) -> Tensor:
    """Computes the front end layer by layer, channels first, so that hooks and replaced layers see what they expect."""
    h, lengths = x.unsqueeze(1), None if mask is None else mask.sum(-1)
    for layer in module.layers:
        h = layer(h)
        if isinstance(layer, torch.nn.Conv2d) and lengths is not None:
            padding: Any = layer.padding
            if layer.stride != (1, 1):
                lengths = (lengths + sum(padding) - layer.kernel_size[0]) // layer.stride[0] + 1
            frame = torch.arange(h.shape[2], device=h.device, dtype=torch.int64)
            h = h * (frame < lengths.unsqueeze(1))[:, None, :, None]
    return module.linear(h.transpose(1, 2).flatten(2))
