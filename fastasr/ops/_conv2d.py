# SPDX-License-Identifier: Apache-2.0
"""A convolution of maps with channels last, on the CPU in float32: matrix products without a copy for each tap.

    y[t, v] = b + Σ_ij W_ij a[s t + i, r v + j]         a = ReLU(x) or x; frames t, frequencies v, strides s and r

The numbers that an output sees through row i of the kernel follow each other in memory. With those of the other rows
they are a row of a matrix, and the rows of neighbouring outputs overlap: the product takes them as lines, see
``csrc/cpu/gemm/gemm.h``. So a convolution is one product, the weight's gradient one for each row of the kernel, and
that of x one for each row and as many taps as do not overlap. Sums run in chains; torch adds all terms of a convolution
of such maps in one.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.ops import _gemm

Pair = tuple[int, int]


@dataclass(frozen=True)
class _Maps:
    """Maps (batch, frames, frequencies, channels) with padding. Pairs are over time and frequency; ``size`` is x's
    without padding, ``out`` is y's."""

    batch: int
    channels: int
    kernel: Pair
    stride: Pair
    padding: Pair
    size: Pair
    out: Pair

    def memory(self, like: Tensor) -> Tensor:
        """Returns memory for the frames and frequencies that the outputs see."""
        needed = ((n - 1) * s + k for n, s, k in zip(self.out, self.stride, self.kernel, strict=True))
        return _gemm.memory(like, self.batch, *needed, self.channels)

    def pair(self, maps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the views of maps and of x (batch, channels, frames, frequencies) that hold the same elements, both
        (batch, frames, frequencies, channels)."""
        frames, left = self.padding
        inner = maps[:, frames : frames + self.size[0], left : left + self.size[1]]
        return inner, x.permute(0, 2, 3, 1)[:, : inner.shape[1], : inner.shape[2]]

    def seen(self, maps: Tensor, i: int, j: int, taps: int) -> Tensor:
        """Returns what the outputs see of ``taps`` taps of row i of the kernel from tap j on, (batch, frames,
        frequencies, taps * channels)."""
        of_batch, of_frame, channels, _ = maps.stride()
        strides = of_batch, self.stride[0] * of_frame, self.stride[1] * channels, 1
        return maps.as_strided((self.batch, *self.out, taps * channels), strides, i * of_frame + j * channels)

    def all_seen(self, maps: Tensor) -> Tensor:
        """Returns what they see of all rows, (batch, frames, frequencies, rows, taps * channels)."""
        row = self.seen(maps, 0, 0, self.kernel[1])
        strides = *row.stride()[:3], maps.stride(1), 1
        return row.as_strided((*row.shape[:3], self.kernel[0], row.shape[3]), strides)


def _maps(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> _Maps:
    kernel, size = (weight.shape[2], weight.shape[3]), (x.shape[2], x.shape[3])
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)]
    return _Maps(x.shape[0], x.shape[1], kernel, stride, padding, size, (out[0], out[1]))


def _filled(maps: _Maps, x: Tensor, relu: bool) -> Tensor:
    memory = maps.memory(x)
    inner, of_x = maps.pair(memory, x)
    (top, left), (frames, width) = maps.padding, inner.shape[1:3]
    for around in (
        memory[:, :top],
        memory[:, top + frames :],
        memory[:, :, :left],
        memory[:, :, left + width :],
    ):
        around.zero_()
    torch.clamp_min(of_x, 0.0, out=inner) if relu else inner.copy_(of_x)
    return memory


def _product(maps: _Maps, memory: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns y (batch, outputs, frames, frequencies) with channels last."""
    taps = weight.permute(2, 3, 1, 0).reshape(-1, len(weight))  # (rows, taps and channels, outputs)
    y = _gemm.product(maps.all_seen(memory), taps, bias)
    return y.view(maps.batch, *maps.out, -1).permute(0, 3, 1, 2)


def seen(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Returns what each output sees of maps x of one channel, copied together: (batch, frames, frequencies, taps), few
    numbers beside its channels."""
    padded = F.pad(x[:, 0], (padding[1], padding[1], padding[0], padding[0]))
    (s, r), (height, width) = stride, weight.shape[2:]
    return padded.unfold(1, height, s).unfold(2, width, r).flatten(3)


def _native(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, relu: bool
) -> Tensor:
    if x.shape[1] == 1:
        return _gemm.forward(seen(x, weight, stride, padding), weight.flatten(1), bias).permute(0, 3, 1, 2)
    maps = _maps(x, weight, stride, padding)
    return _product(maps, _filled(maps, x, relu), weight, bias)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, relu: bool) -> Tensor:
    x = x.contiguous()
    return F.conv2d(x.relu() if relu else x, weight, bias, stride, padding)


_gemm.register_product("conv2d", torch=_torch, native=_native)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> bool:
    """Says whether the products can compute this call."""
    return (
        _gemm.may_choose(x, weight, bias)
        and x.shape[1] == weight.shape[1]
        and min(_maps(x, weight, stride, padding).out) > 0
    )


def is_faster(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> bool:
    """Says whether the products take less time than torch's convolution of ReLU(x) with channels first."""
    rows = len(x) * math.prod(_maps(x, weight, stride, padding).out)
    if rows * weight.numel() < _gemm.SMALL:
        return False
    key = ("conv2d", rows.bit_length(), len(weight), weight[0].numel(), torch.get_num_threads())
    return _gemm.beats_torch(key, x, weight, bias, stride, padding, True)


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, relu: bool
    ) -> Tensor:
        ctx.maps, ctx.relu = _maps(x, weight, stride, padding), relu
        memory = _filled(ctx.maps, x, relu)
        ctx.save_for_backward(memory, weight)
        return _gemm.owned(_product(ctx.maps, memory, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        memory, weight = ctx.saved_tensors
        maps = ctx.maps
        outputs, channels, height, width = weight.shape
        g = grad.permute(0, 2, 3, 1).reshape(-1, outputs)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            found, step = maps.memory(grad).zero_(), maps.stride[1]
            taps = weight.permute(2, 3, 0, 1)  # (i, j, outputs, channels)
            for i in range(height):
                for j in range(0, width, step):  # what the outputs see of this many taps does not overlap
                    count = min(step, width - j)
                    b = taps[i, j : j + count].transpose(0, 1).reshape(outputs, -1)
                    _gemm.add_product(maps.seen(found, i, j, count), g, b)
            dx = _gemm.memory(grad, maps.batch, *maps.size, channels).zero_().permute(0, 3, 1, 2)
            (gradients, of_x), (a, _) = maps.pair(found, dx), maps.pair(memory, dx)
            if ctx.relu:
                torch.ops.aten.threshold_backward.grad_input(gradients, a, 0.0, grad_input=of_x)
            else:
                of_x.copy_(gradients)
        if ctx.needs_input_grad[1]:
            parts = [_gemm.product_of_rows(maps.seen(memory, i, 0, width), g) for i in range(height)]
            dw = torch.stack(parts).view(height, width, channels, outputs).permute(3, 2, 0, 1).contiguous()
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, dw, db, None, None, None


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, relu: bool
) -> Tensor:
    """Returns the convolution of ReLU(x), or of x, with channels last, for maps x (batch, channels, frames,
    frequencies) of any strides."""
    return _Convolution.apply(x, weight, bias, stride, padding, relu)
