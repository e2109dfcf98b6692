# SPDX-License-Identifier: Apache-2.0
"""A convolution of maps with channels last, on the CPU in float32: matrix products without a copy for each tap.

    y[t, v] = b + Σ_ij W_ij a[s t + i, r v + j]         a = ReLU(x) or x; frames t, frequencies v, strides s and r

The frames of a lie in s phases: frame s t + i is line t + i // s of phase i mod s. A line has a number of frequencies
that r divides. The taps j of row i of the kernel then follow each other in memory, and one output's are r frequencies
behind those of the output before, over the ends of lines too: they are the rows of a matrix, which overlap. So each row
of the kernel takes one product. Outputs at the ends of lines and behind a recording's frames are computed and left out.
Sums run in chains, see ``csrc/cpu/gemm/gemm.h``; torch adds all terms of a convolution of such maps in one.
"""

from collections.abc import Iterator
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
class _Lines:
    """Where the frames of maps lie. Pairs are over time and frequency; ``size`` is that of x, ``out`` that of y."""

    batch: int
    channels: int
    kernel: Pair
    stride: Pair
    padding: Pair
    size: Pair
    out: Pair

    @property
    def needed(self) -> Pair:
        """The frames and frequencies, with padding in front, that the outputs see."""
        (t, v), (s, r), (height, width) = self.out, self.stride, self.kernel
        return (t - 1) * s + height, (v - 1) * r + width

    @property
    def count(self) -> int:
        """Lines of a recording in each phase."""
        return self.out[0] + (self.kernel[0] - 1) // self.stride[0]

    @property
    def columns(self) -> int:
        """Outputs of a line, with those that are left out."""
        return -(-self.needed[1] // self.stride[1])

    @property
    def rows(self) -> int:
        return (self.batch * self.count - (self.kernel[0] - 1) // self.stride[0]) * self.columns

    @property
    def line(self) -> int:
        return self.columns * self.stride[1] * self.channels

    def zeros(self, like: Tensor) -> Tensor:
        """Returns memory for all phases; the last row of the last matrix may reach behind the last line."""
        lines = self.stride[0] * self.batch * self.count * self.line
        return _gemm.memory(like, lines + self.kernel[1] * self.channels).zero_()

    def pairs(self, memory: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the views of a phase and of x (batch, channels, frames, frequencies) that hold the same elements, both
        (batch, frames, frequencies, channels)."""
        maps = x.permute(0, 2, 3, 1)
        frames, left = self.padding
        last, right = (
            min(n, need - pad) for n, need, pad in zip(self.size, self.needed, self.padding, strict=True)
        )
        phases = memory[: self.stride[0] * self.batch * self.count * self.line].view(
            self.stride[0], self.batch, self.count, -1, self.channels
        )
        for phase, lines in enumerate(phases):
            skipped = max(0, -(-(frames - phase) // self.stride[0]))  # lines of padding
            of_x = maps[:, skipped * self.stride[0] + phase - frames : last : self.stride[0], :right]
            yield lines[:, skipped : skipped + of_x.shape[1], left : left + right], of_x

    def matrix(self, memory: Tensor, i: int, tap: int, taps: int) -> Tensor:
        """Returns the rows (rows, taps * channels) of taps [tap, tap + taps) of row i of the kernel."""
        line = i % self.stride[0] * self.batch * self.count + i // self.stride[0]
        begin = line * self.line + tap * self.channels
        return memory.as_strided(
            (self.rows, taps * self.channels), (self.stride[1] * self.channels, 1), begin
        )

    def outputs(self, y: Tensor) -> Tensor:
        """Returns the view (batch, frames, frequencies, outputs) of the rows (rows, outputs) that are not left out."""
        n = y.shape[1]
        strides = self.count * self.columns * n, self.columns * n, n, 1
        return y.as_strided((self.batch, *self.out, n), strides)


def _lines(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> _Lines:
    kernel, size = (weight.shape[2], weight.shape[3]), (x.shape[2], x.shape[3])
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)]
    return _Lines(x.shape[0], x.shape[1], kernel, stride, padding, size, (out[0], out[1]))


def _filled(lines: _Lines, x: Tensor, relu: bool) -> Tensor:
    memory = lines.zeros(x)
    for phase, of_x in lines.pairs(memory, x):
        torch.clamp_min(of_x, 0.0, out=phase) if relu else phase.copy_(of_x)
    return memory


def _products(lines: _Lines, memory: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns y (batch, outputs, frames, frequencies) with channels last."""
    _, _, height, width = weight.shape
    taps = weight.permute(2, 3, 1, 0)  # (i, j, channels, outputs)
    y = None
    for i in range(height):
        a, b = lines.matrix(memory, i, 0, width), taps[i].reshape(-1, len(weight))
        if y is None:
            y = _gemm.product(a, b, bias)
        else:
            _gemm.add_product(y, a, b)
    assert y is not None
    found = _gemm.memory(y, lines.batch, *lines.out, len(weight))
    return found.copy_(lines.outputs(y)).permute(0, 3, 1, 2)


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
    lines = _lines(x, weight, stride, padding)
    return _products(lines, _filled(lines, x, relu), weight, bias)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, relu: bool) -> Tensor:
    x = x.contiguous()
    return F.conv2d(x.relu() if relu else x, weight, bias, stride, padding)


_gemm.register_product("conv2d", torch=_torch, native=_native)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> bool:
    """Says whether the products can compute this call."""
    return (
        _gemm.may_choose(x, weight, bias)
        and x.shape[1] == weight.shape[1]
        and min(_lines(x, weight, stride, padding).out) > 0
    )


def is_faster(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> bool:
    """Says whether the products take less time than torch's convolution of ReLU(x) with channels first."""
    lines = _lines(x, weight, stride, padding)
    if lines.rows * weight.numel() < _gemm.SMALL:
        return False
    key = ("conv2d", lines.rows.bit_length(), len(weight), weight[0].numel(), torch.get_num_threads())
    return _gemm.beats_torch(key, x, weight, bias, stride, padding, True)


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, relu: bool
    ) -> Tensor:
        ctx.lines, ctx.relu = _lines(x, weight, stride, padding), relu
        memory = _filled(ctx.lines, x, relu)
        ctx.save_for_backward(memory, weight)
        return _gemm.owned(_products(ctx.lines, memory, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        memory, weight = ctx.saved_tensors
        lines = ctx.lines
        outputs, channels, height, width = weight.shape
        g = _gemm.memory(grad, lines.rows, outputs).zero_()
        lines.outputs(g).copy_(grad.permute(0, 2, 3, 1))
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            found, step = lines.zeros(grad), lines.stride[1]
            taps = weight.permute(2, 3, 0, 1)  # (i, j, outputs, channels)
            for i in range(height):
                for tap in range(0, width, step):  # the rows of this many taps do not overlap
                    count = min(step, width - tap)
                    b = taps[i, tap : tap + count].transpose(0, 1).reshape(outputs, -1)
                    _gemm.add_product(lines.matrix(found, i, tap, count), g, b)
            dx = _gemm.memory(grad, lines.batch, *lines.size, channels).zero_().permute(0, 3, 1, 2)
            values = lines.pairs(memory, dx)
            for (gradients, of_x), (a, _) in zip(lines.pairs(found, dx), values, strict=True):
                if ctx.relu:
                    torch.ops.aten.threshold_backward.grad_input(gradients, a, 0.0, grad_input=of_x)
                else:
                    of_x.copy_(gradients)
        if ctx.needs_input_grad[1]:
            rows = [lines.matrix(memory, i, 0, width) for i in range(height)]
            parts = [_gemm.product(a.t(), g) for a in rows]
            dw = torch.stack(parts).view(height, width, channels, outputs).permute(3, 2, 0, 1).contiguous()
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, dw, db, None, None, None


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, relu: bool
) -> Tensor:
    """Returns the convolution of ReLU(x), or of x, with channels last, for maps x (batch, channels, frames,
    frequencies) of any strides."""
    y: Tensor = _Convolution.apply(x, weight, bias, stride, padding, relu)
    return y
