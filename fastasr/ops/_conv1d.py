# SPDX-License-Identifier: Apache-2.0
"""A convolution over time of frames with channels last, on the CPU in float32: matrix products without a copy per tap.

    y[t] = b + Σ_i W_i x[s t + i]           frames t, stride s, in groups of channels

A frame's channels follow each other in memory, and so do the frames that one output sees: they are a row of a matrix,
and the rows of neighbouring outputs overlap. So each recording and each group takes one product, on x where it lies if
there are no padding and one group. Sums run in chains, see ``csrc/cpu/gemm/gemm.h``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.ops import _gemm

_SHORTEST = 56  # A sum is most exact in as many chains as each has terms. Shorter ones than this take longer.


def _length(x: Tensor, taps: int, stride: int, padding: int) -> int:
    """Counts the frames of the result."""
    return (x.shape[2] + 2 * padding - taps) // stride + 1


def _by_group(x: Tensor, padding: int, groups: int) -> Tensor:
    """Returns x (B, C, T) as contiguous (B, G, T + 2 padding, C / G), with zeros around."""
    frames = x.transpose(1, 2).unflatten(2, (groups, -1)).transpose(1, 2)
    if not padding:
        return frames.contiguous()
    batch, _, length, channels = frames.shape
    found = _gemm.memory(x, batch, groups, length + 2 * padding, channels)
    found[:, :, :padding].zero_()
    found[:, :, padding : padding + length].copy_(frames)
    found[:, :, padding + length :].zero_()
    return found


def _rows(frames: Tensor, length: int, stride: int, tap: int, taps: int) -> Tensor:
    """Returns the matrix (length, taps * channels) of taps [tap, tap + taps), of frames (T, channels)."""
    channels = frames.shape[1]
    begin = frames.storage_offset() + tap * channels
    return frames.as_strided((length, taps * channels), (stride * channels, 1), begin)


def _taps(weight: Tensor, groups: int) -> Tensor:
    """Returns weight (outputs, C / G, taps) as contiguous (G, outputs / G, taps, C / G)."""
    outputs, channels, taps = weight.shape
    found = _gemm.memory(weight, groups, outputs // groups, taps, channels)
    return found.copy_(weight.transpose(1, 2).view(found.shape))


def _products(frames: Tensor, weights: Tensor, bias: Tensor | None, length: int, stride: int) -> Tensor:
    """Returns (B, length, outputs) for ``weights`` (G, taps * C / G, outputs / G)."""
    (batch, groups, _, channels), (_, terms, outputs) = frames.shape, weights.shape
    chain, strides = max(_SHORTEST, math.isqrt(terms)), (0, frames.stride(0), stride * channels, 0, 1)
    # The rows of all recordings lie in lines, see csrc/cpu/gemm/gemm.h. A single line may be packed.
    seen = [
        _rows(line[0], length, stride, 0, terms // channels)
        if batch == 1
        else line.as_strided((1, batch, length, 1, terms), strides, line.storage_offset())
        for line in frames.unbind(1)
    ]
    if groups == 1:
        return _gemm.product(seen[0], weights[0], bias, chain).view(batch, length, outputs)
    y = _gemm.memory(frames, batch * length, groups * outputs)
    y.zero_() if bias is None else y.copy_(bias)
    for a, weight, result in zip(seen, weights, y.split(outputs, 1), strict=True):
        _gemm.add_product(result, a, weight, chain)
    return y.view(batch, length, -1)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> Tensor:
    """Returns (B, outputs, T'), with channels last in memory."""
    weights = _taps(weight, groups).flatten(2).mT
    length = _length(x, weight.shape[2], stride, padding)
    return _products(_by_group(x, padding, groups), weights, bias, length, stride).transpose(1, 2)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> Tensor:
    return F.conv1d(x.contiguous(), weight, bias, stride, padding, 1, groups)


_gemm.register_product("conv1d", torch=_torch, native=_native)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> bool:
    """Says whether the products can compute this call."""
    return (
        _gemm.may_choose(x, weight, bias)
        and x.dim() == 3
        and x.shape[1] == weight.shape[1] * groups
        and _length(x, weight.shape[2], stride, padding) > 0
    )


def is_faster(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> bool:
    """Says whether the products take less time than torch's convolution with channels first."""
    frames = x.shape[0] * _length(x, weight.shape[2], stride, padding)
    if frames * weight.numel() < _gemm.SMALL:
        return False
    key = "conv1d", frames.bit_length(), len(weight), weight[0].numel(), groups, torch.get_num_threads()
    return _gemm.beats_torch(key, x, weight, bias, stride, padding, groups)


def _input_gradient(g: Tensor, taps: Tensor, frames: int, stride: int) -> Tensor:
    """Returns the gradient (B, G, frames, C / G) for g (B, length, outputs)."""
    groups, outputs, count, channels = taps.shape
    if stride == 1:  # the convolution of g with the taps from last to first
        weights = taps.flip(2).transpose(1, 2).flatten(1, 2)
        dx = _products(_by_group(g.transpose(1, 2), count - 1, groups), weights, None, frames, 1)
        return dx.unflatten(2, (groups, channels)).transpose(1, 2)
    found = _gemm.memory(g, len(g), groups, frames, channels).zero_()
    for lines, row in zip(found, g, strict=True):
        for line, part, weight in zip(lines, row.split(outputs, 1), taps, strict=True):
            for tap in range(0, count, stride):  # the rows of this many taps do not overlap
                some = weight[:, tap : tap + stride]
                a = _rows(line, g.shape[1], stride, tap, some.shape[1])
                _gemm.add_product(a, part, some.flatten(1))
    return found


def _weight_gradient(g: Tensor, frames: Tensor, taps: int, stride: int) -> Tensor:
    """Returns the gradient (outputs, C / G, taps) for g (B, length, outputs)."""
    _, groups, _, channels = frames.shape
    outputs = g.shape[2] // groups
    found = g.new_zeros(groups, outputs, taps * channels)
    for lines, row in zip(frames, g, strict=True):
        for line, part, gradient in zip(lines, row.split(outputs, 1), found, strict=True):
            a = _rows(line, g.shape[1], stride, 0, taps)
            _gemm.add_product(gradient, part.t(), a)
    return found.view(-1, taps, channels).transpose(1, 2).contiguous()


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int
    ) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.frames, ctx.taps = x.shape[2], weight.shape[2]
        ctx.stride, ctx.padding, ctx.groups = stride, padding, groups
        return _gemm.owned(_native(x, weight, bias, stride, padding, groups))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        padding, stride = ctx.padding, ctx.stride
        g = grad.transpose(1, 2).contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            taps, size = _taps(weight, ctx.groups), ctx.frames + 2 * padding
            found = _input_gradient(g, taps, size, stride)[:, :, padding : size - padding]
            dx = found.transpose(1, 2).flatten(2).transpose(1, 2)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(g, _by_group(x, padding, ctx.groups), ctx.taps, stride)
        if ctx.needs_input_grad[2]:
            db = g.sum((0, 1))
        return dx, dw, db, None, None, None


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int
) -> Tensor:
    """Returns the convolution of x (B, C, T), of any strides, as (B, outputs, T') with channels last in memory."""
    return _Convolution.apply(x, weight, bias, stride, padding, groups)
