# SPDX-License-Identifier: Apache-2.0
r"""BiasNorm of Zipformer (Yao et al., 2023, section 3.4).

y = x · s, s = e^log_scale · m^(−1/2), m = mean over channels of (x − bias)². No epsilon. With G = Σ_j g_j x_j and
k = G s / Σ_j (x_j − b_j)²: dx = g s − k (x − b), db = Σ_rows k (x − b), dlog_scale = Σ_rows G s.
Upstream: ``BiasNorm`` in ``zipformer.modules.scaling``.

Memory traffic per element: read x, write y forward; read x and grad, write dx backward (the scale is recomputed).
"""

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check
from fastasr.ops._dispatch import (
    PLAIN,
    KernelFamily,
    direct,
    native_kernels,
    served,
    triton_kernels,
)
from fastasr.ops._register import NativeFunction, refuse_double_backward, register

FAMILY = KernelFamily("bias_norm", ("bias_norm",), (native_kernels("bias_norm"), triton_kernels("bias_norm")))


# --------------------------------------------------------------------------- definition
def definition(x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int = -1) -> Tensor:
    """The formula in eager PyTorch."""
    bias = bias.reshape(-1, *(1,) * ((x.dim() - 1 - channel_dim) % x.dim()))
    scale = torch.mean((x - bias) ** 2, dim=channel_dim, keepdim=True) ** -0.5 * log_scale.exp()
    return x * scale


def definition_backward(
    grad: Tensor, x: Tensor, bias: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbias, dlog_scale), channels last, computed in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32)
    g, v, b = grad.to(dtype), x.to(dtype), bias.to(dtype)
    centred = v - b
    square = (centred * centred).sum(-1, keepdim=True)
    scale = (square / x.shape[-1]) ** -0.5 * log_scale.to(dtype).exp()
    projected = (g * v).sum(-1, keepdim=True) * scale
    k = centred * (projected / square)
    rows = tuple(range(x.dim() - 1))
    dbias = k.sum(rows) if rows else k
    return (g * scale - k).to(x.dtype), dbias.to(bias.dtype), projected.sum().to(log_scale.dtype)


# --------------------------------------------------------------------------- kernels
def _operands(kernels, x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous, channels last, x and bias of one dtype where the kernels need that (Triton's do not)."""
    if kernels.backend == "cpu":
        dtype = torch.promote_types(x.dtype, bias.dtype)
        return x.to(dtype).contiguous(), bias.to(dtype).contiguous(), log_scale
    return x.contiguous(), bias.contiguous(), log_scale


def forward(x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int) -> Tensor:
    """y without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x, bias)
    if kernels is None:
        return definition(x, bias, log_scale, channel_dim)
    last = channel_dim == -1 or channel_dim == x.dim() - 1
    y = kernels.forward(*_operands(kernels, x if last else x.movedim(channel_dim, -1), bias, log_scale))
    return y if last else y.movedim(-1, channel_dim)


def backward(
    grad: Tensor, x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbias, dlog_scale) without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x, bias)
    last = channel_dim == -1 or channel_dim == x.dim() - 1
    if not last:
        x, grad = x.movedim(channel_dim, -1), grad.movedim(channel_dim, -1)
    if kernels is None:
        dx, dbias, dlog_scale = definition_backward(grad, x, bias, log_scale)
    else:
        operands = _operands(kernels, x, bias, log_scale)
        dx, dbias, dlog_scale = kernels.backward(grad.contiguous(), *operands)
    dx, dbias, dlog_scale = dx.to(x.dtype), dbias.to(bias.dtype), dlog_scale.to(log_scale.dtype)
    return (dx if last else dx.movedim(-1, channel_dim)), dbias, dlog_scale.reshape(log_scale.shape)


class _BiasNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x, bias, log_scale)
        ctx.channel_dim = channel_dim
        return forward(x, bias, log_scale, channel_dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward("bias_norm")
        return *backward(grad, *ctx.saved_tensors, ctx.channel_dim), None


# --------------------------------------------------------------------------- registration
def _fake_forward(x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, bias.dtype)
    if FAMILY.kernels(x, bias) is None:
        return torch.empty_like(x, dtype=dtype)
    moved = x.movedim(channel_dim, -1)
    return torch.empty(moved.shape, dtype=dtype, device=x.device).movedim(-1, channel_dim)


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int):
    moved = x.movedim(channel_dim, -1)
    dx = torch.empty(moved.shape, dtype=x.dtype, device=x.device).movedim(-1, channel_dim)
    return (
        dx,
        torch.empty(bias.shape, dtype=bias.dtype, device=x.device),
        log_scale.new_empty(log_scale.shape),
    )


_BACKWARD_OP = register(
    "bias_norm_backward(Tensor grad, Tensor x, Tensor bias, Tensor log_scale, int channel_dim) "
    "-> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.channel_dim = inputs
    ctx.save_for_backward(*tensors)


_OP = register(
    "bias_norm(Tensor x, Tensor bias, Tensor log_scale, int channel_dim) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=lambda ctx, grad: (*_BACKWARD_OP(grad, *ctx.saved_tensors, ctx.channel_dim), None),
)


def bias_norm(x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int = -1) -> Tensor:
    """x · mean((x − bias)², channel_dim)^(−1/2) · e^log_scale. There is no epsilon: a row equal to bias gives inf.

    Args:
        x: any shape with at least one dimension; float32, bfloat16, float16 or float64.
        bias: (C,), C = x.shape[channel_dim].
        log_scale: one element.
        channel_dim: the dimension that is normalised.
    Returns:
        A tensor of x's shape; its dtype is the promotion of x's and bias's (as the formula's), computed in float32 or
        better and rounded once.
    Raises:
        TypeError: an argument is not a floating tensor, or channel_dim not an int.
        ValueError: shapes or devices do not match.
    """
    if (
        not is_compiling()
        and FAMILY.native is not None
        and type(channel_dim) is int
        and channel_dim == -1
        and type(x) in PLAIN
        and type(bias) in PLAIN
        and type(log_scale) in PLAIN
        and x.is_cpu
        and x.dtype is bias.dtype
    ):
        try:
            if is_grad_enabled() and (x.requires_grad or bias.requires_grad or log_scale.requires_grad):
                return NativeFunction.apply("bias_norm", FAMILY.native, x, bias, log_scale)
            if x.is_contiguous():
                return FAMILY.native.forward(x, bias, log_scale)
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    op = "bias_norm"
    _check.floating_tensor(op, "x", x)
    _check.floating_tensor(op, "bias", bias)
    _check.floating_tensor(op, "log_scale", log_scale)
    _check.shape(op, "x", x, "with at least one dimension", x.dim() > 0)
    channel_dim = _check.dimension(op, "channel_dim", channel_dim, x.dim()) - x.dim()
    channels = x.shape[channel_dim]
    _check.shape(op, "bias", bias, f"({channels},)", bias.dim() == 1 and bias.shape[0] == channels)
    _check.shape(op, "log_scale", log_scale, "() or (1,)", log_scale.dim() <= 1 and log_scale.numel() == 1)
    _check.same_device(op, "bias", bias, x, "x")
    _check.same_device(op, "log_scale", log_scale, x, "x")
    log_scale = log_scale.reshape(()) if log_scale.dim() else log_scale
    if not direct(x, bias, log_scale):
        return (_OP if served("bias_norm", x, bias) else definition)(x, bias, log_scale, channel_dim)
    if FAMILY.kernels(x, bias) is None:
        return definition(x, bias, log_scale, channel_dim)
    if is_grad_enabled() and (x.requires_grad or bias.requires_grad or log_scale.requires_grad):
        return _BiasNorm.apply(x, bias, log_scale, channel_dim)
    return forward(x, bias, log_scale, channel_dim)
