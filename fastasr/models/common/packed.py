# SPDX-License-Identifier: Apache-2.0
"""Operations over time on packed frames (see ``ragged``), each in one call for all recordings: native kernels know the
lengths, so that nothing is copied and autograd has one node. Other tensors are copied by ``ragged``.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr import ops
from fastasr._transforms import Function
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import RowFrames
from fastasr.ops import _dispatch, _gemm
from fastasr.ops._depthwise_conv import ACTIVATIONS
from fastasr.ops._linear import bias_grad
from fastasr.ops._swoosh import KINDS
from fastasr.ops._wrapped.swoosh_linear import with_mask

Activation = Literal["swoosh_r", "silu", "identity"]
Kind = Literal["SwooshL", "SwooshR"]


def is_native(first: Tensor, *more: Tensor | None) -> bool:
    """Says whether the native kernels serve these tensors, of one dtype, as they lie in memory."""
    return (
        _dispatch.direct(first, *more)
        and all(
            t is None or (t.is_cpu and t.is_contiguous() and t.dtype is first.dtype) for t in (first, *more)
        )
        and not torch.is_autocast_enabled("cpu")
        and _dispatch.forced_backend() in ("auto", "cpu")
        and not _dispatch.why_not_cpu("bypass_packed_forward")
    )


def convolved(
    packing: Packing, h: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, delay: int = 0
) -> Tensor:
    """h (N, 1, 2C) -> (N, 1, C): ``ops.gated_depthwise_conv`` in plain form for each recording."""
    if is_native(h, weight, bias):
        return _Convolution.apply(h, weight, bias, packing.lengths, ACTIVATIONS[activation], delay)
    slots = packing.with_gaps(weight.shape[-1] // 2 + abs(delay))
    y = ops.gated_depthwise_conv(packing.spread(h, slots), weight, bias, activation=activation, delay=delay)
    return packing.gathered(y, slots)


def swoosh_linear(
    packing: Packing | RowFrames,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: Kind,
    mask: Tensor,
) -> Tensor:
    """x (N, 1, K), mask (B, K) of the recordings -> (N, 1, M): (swoosh(x) ⊙ mask) weightᵀ + bias."""
    if is_native(x, weight, bias, mask):
        return _SwooshLinear.apply(x, weight, bias, KINDS[kind], mask, packing.recording)
    return with_mask(x, weight, bias, kind, packing.repeated(mask).unsqueeze(1))


def bypass(packing: Packing, x_orig: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """x_orig, x (N, 1, C), scale (B, C) of the recordings -> (N, 1, C): ``ops.bypass``."""
    if is_native(x_orig, x, scale):
        return _Bypass.apply(x_orig, x, scale, packing.lengths)
    return ops.bypass(x_orig.transpose(0, 1), x.transpose(0, 1), packing.repeated(scale)).transpose(0, 1)


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(h, weight, bias)
        ctx.options = options
        return torch.ops.fastasr_cpu.gated_depthwise_conv_packed_forward.default(h, weight, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.fastasr_cpu.gated_depthwise_conv_packed_backward.default
        dh, dweight, dbias = backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options)
        return dh, dweight, dbias if ctx.needs_input_grad[2] else None, None, None, None


class _SwooshLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return _gemm.forward(torch.ops.fastasr_cpu.swoosh_packed_forward.default(x, *options), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dy = _gemm.input_grad(grad, weight)
        dx, y = torch.ops.fastasr_cpu.swoosh_packed_backward.default(dy, x, *ctx.options)
        dbias = bias_grad(grad) if ctx.needs_input_grad[2] else None
        return dx, _gemm.weight_grad(grad, y), dbias, None, None, None


class _Bypass(Function):
    @staticmethod
    def forward(ctx: Any, x_orig: Tensor, x: Tensor, scale: Tensor, lengths: list[int]) -> Tensor:
        ctx.save_for_backward(x_orig, x, scale)
        ctx.lengths = lengths
        return torch.ops.fastasr_cpu.bypass_packed_forward.default(x_orig, x, scale, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.fastasr_cpu.bypass_packed_backward.default
        return *backward(grad.contiguous(), *ctx.saved_tensors, ctx.lengths), None
