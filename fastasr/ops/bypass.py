# SPDX-License-Identifier: Apache-2.0
r"""Bypass of Zipformer (Yao et al., 2023, section 3.3): y = x_orig + (x − x_orig) · scale.

With gradient g: dx = g · scale, dx_orig = g · (1 − scale), dscale = Σ_rows g · (x − x_orig).
Upstream: ``BypassModule`` in ``zipformer.modules.zipformer``.

Memory traffic per element: read x_orig and x, write y forward; read grad, x_orig, x, write dx_orig, dx backward.
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

FAMILY = KernelFamily("bypass", ("bypass",), (native_kernels("bypass"), triton_kernels("bypass")))


# --------------------------------------------------------------------------- definition
def definition(x_orig: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """The formula in eager PyTorch."""
    return x_orig + (x - x_orig) * scale


def definition_backward(
    grad: Tensor, x_orig: Tensor, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx_orig, dx, dscale), computed in float32 or better."""
    dtype = torch.promote_types(_result_dtype(x_orig, x, scale), torch.float32)
    g, s = grad.to(dtype), scale.to(dtype)
    dx = g * s
    dscale = (g * (x.to(dtype) - x_orig.to(dtype))).sum(tuple(range(x.dim() - scale.dim())))
    return (g - dx).to(x_orig.dtype), dx.to(x.dtype), dscale.reshape(scale.shape).to(scale.dtype)


def _result_dtype(x_orig: Tensor, x: Tensor, scale: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x_orig.dtype, x.dtype), scale.dtype)


# --------------------------------------------------------------------------- kernels
def _operands(kernels, x_orig: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if kernels.backend == "cpu":
        dtype = _result_dtype(x_orig, x, scale)
        return x_orig.to(dtype).contiguous(), x.to(dtype).contiguous(), scale.to(dtype).contiguous()
    return x_orig.contiguous(), x.contiguous(), scale.contiguous()


def forward(x_orig: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """y without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x, x_orig, scale)
    if kernels is None:
        return definition(x_orig, x, scale)
    return kernels.forward(*_operands(kernels, x_orig, x, scale))


def backward(grad: Tensor, x_orig: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx_orig, dx, dscale) without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x, x_orig, scale)
    if kernels is None:
        return definition_backward(grad, x_orig, x, scale)
    dx_orig, dx, dscale = kernels.backward(grad.contiguous(), *_operands(kernels, x_orig, x, scale))
    return dx_orig.to(x_orig.dtype), dx.to(x.dtype), dscale.to(scale.dtype)


class _Bypass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_orig: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x_orig, x, scale)
        return forward(x_orig, x, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward("bypass")
        return backward(grad, *ctx.saved_tensors)


# --------------------------------------------------------------------------- registration
def _fake_forward(x_orig: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    if FAMILY.kernels(x, x_orig, scale) is None:
        return definition(x_orig, x, scale)
    return torch.empty(x.shape, dtype=_result_dtype(x_orig, x, scale), device=x.device)


def _fake_backward(grad: Tensor, x_orig: Tensor, x: Tensor, scale: Tensor):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x_orig, x, scale))


_BACKWARD_OP = register(
    "bypass_backward(Tensor grad, Tensor x_orig, Tensor x, Tensor scale) -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)

_OP = register(
    "bypass(Tensor x_orig, Tensor x, Tensor scale) -> Tensor",
    forward,
    _fake_forward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, grad: _BACKWARD_OP(grad, *ctx.saved_tensors),
)


def bypass(x_orig: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """x_orig + (x − x_orig) · scale.

    Args:
        x_orig, x: the same shape; in a Zipformer (T, B, C). float32, bfloat16, float16 or float64.
        scale: (C,), or (B, C) for a scale per sequence: the trailing dimensions of x.
    Returns:
        A tensor of x's shape; its dtype is the promotion of the three, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not match.
    """
    if (
        not is_compiling()
        and FAMILY.native is not None
        and type(x_orig) in PLAIN
        and type(x) in PLAIN
        and type(scale) in PLAIN
        and x.is_cpu
        and x.dtype is x_orig.dtype
        and x.dtype is scale.dtype
    ):
        try:
            if is_grad_enabled() and (x_orig.requires_grad or x.requires_grad or scale.requires_grad):
                return NativeFunction.apply("bypass", FAMILY.native, x_orig, x, scale)
            if x.is_contiguous() and x_orig.is_contiguous():
                return FAMILY.native.forward(x_orig, x, scale)
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    op = "bypass"
    _check.floating_tensor(op, "x_orig", x_orig)
    _check.floating_tensor(op, "x", x)
    _check.floating_tensor(op, "scale", scale)
    _check.shape(op, "x", x, f"{tuple(x_orig.shape)} (that of x_orig)", x.shape == x_orig.shape)
    _check.shape(
        op,
        "scale",
        scale,
        f"the trailing dimensions of x, {tuple(x.shape)}",
        1 <= scale.dim() <= x.dim() and scale.shape == x.shape[x.dim() - scale.dim() :],
    )
    _check.same_device(op, "x", x, x_orig, "x_orig")
    _check.same_device(op, "scale", scale, x_orig, "x_orig")
    if not direct(x_orig, x, scale):
        return (_OP if served("bypass", x, x_orig, scale) else definition)(x_orig, x, scale)
    if FAMILY.kernels(x, x_orig, scale) is None:
        return definition(x_orig, x, scale)
    if is_grad_enabled() and (x_orig.requires_grad or x.requires_grad or scale.requires_grad):
        return _Bypass.apply(x_orig, x, scale)
    return forward(x_orig, x, scale)
