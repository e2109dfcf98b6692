# SPDX-License-Identifier: Apache-2.0
r"""Swoosh activations of Zipformer (Yao et al., "Zipformer", 2023, section 3.5).

SwooshL(x) = log(1 + e^(x-4)) − 0.08 x − 0.035, SwooshR(x) = log(1 + e^(x-1)) − 0.08 x − 0.313261687,
derivative sigmoid(x − a) − 0.08 with a = 4, 1. Upstream: ``SwooshL``, ``SwooshR`` in ``zipformer.modules.scaling``.

Memory traffic per element: read x, write y forward; read x and grad, write dx backward.
"""

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check, _layout
from fastasr.ops._dispatch import (
    PLAIN,
    KernelFamily,
    Kernels,
    direct,
    native_kernels,
    served,
    triton_kernels,
)
from fastasr.ops._register import refuse_double_backward, register

FAMILY = KernelFamily(
    "swoosh", ("swoosh_l", "swoosh_r", "swoosh_linear"), (native_kernels("swoosh"), triton_kernels("swoosh"))
)

SHIFT = {False: 4.0, True: 1.0}
OFFSET = {False: 0.035, True: 0.313261687}


# --------------------------------------------------------------------------- definition
def definition(x: Tensor, right: bool) -> Tensor:
    """The formula in eager PyTorch; ``right`` selects SwooshR."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.logaddexp(zero, x - SHIFT[right]) - 0.08 * x - OFFSET[right]


def definition_backward(
    grad: Tensor, x: Tensor, right: bool, mask: Tensor | None, need_output: bool
) -> tuple[Tensor, Tensor]:
    """(dx, y): gradient through ``swoosh(x) * mask``, and that product itself where asked for. Computed in float32 or
    better, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.sigmoid(wide - SHIFT[right]) - 0.08
    y = definition(wide, right) if need_output else None
    if mask is not None:
        scale = scale * mask
        y = y * mask if need_output else None
    return (grad * scale).to(x.dtype), y.to(x.dtype) if need_output else x.new_empty(0)


def definition_l(x: Tensor) -> Tensor:
    """SwooshL in eager PyTorch."""
    return definition(x, False)


def definition_r(x: Tensor) -> Tensor:
    """SwooshR in eager PyTorch."""
    return definition(x, True)


# --------------------------------------------------------------------------- kernels
def forward(kernels: Kernels | None, x: Tensor, right: bool) -> Tensor:
    """y without autograd."""
    if kernels is None:
        return definition(x, right)
    if x.is_contiguous():
        return kernels.forward(x, right, None, -1)
    return _layout.elementwise(lambda t: kernels.forward(t, right, None, -1), x)


def backward(kernels: Kernels | None, grad: Tensor, x: Tensor, right: bool) -> Tensor:
    """dx without autograd."""
    if kernels is None:
        return definition_backward(grad, x, right, None, False)[0]
    if x.is_contiguous() and grad.is_contiguous():
        return kernels.backward(grad, x, right, None, -1, False)[0]
    return _layout.elementwise(lambda t, g: kernels.backward(g, t, right, None, -1, False)[0], x, grad)


class _Swoosh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, right: bool, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = right, kernels
        return kernels.forward(x, right, None, -1) if x.is_contiguous() else forward(kernels, x, right)

    @staticmethod
    def backward(ctx, grad: Tensor):
        right, kernels = ctx.call
        if is_grad_enabled():
            refuse_double_backward("swoosh_r" if right else "swoosh_l")
        return backward(kernels, grad, *ctx.saved_tensors, right), None, None


def _swoosh(x: Tensor, right: bool, op) -> Tensor:
    if not is_compiling() and FAMILY.native is not None and type(x) in PLAIN and x.is_cpu:
        try:
            if x.requires_grad and is_grad_enabled():
                return _Swoosh.apply(x, right, FAMILY.native)
            if x.is_contiguous():
                return FAMILY.native.forward(x, right, None, -1)
        except RuntimeError:
            pass  # the checked path tells why
    _check.floating_tensor("swoosh_r" if right else "swoosh_l", "x", x)
    if not direct(x):
        return op(x) if served("swoosh", x) else definition(x, right)
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return definition(x, right)
    if x.requires_grad and is_grad_enabled():
        return _Swoosh.apply(x, right, kernels)
    return forward(kernels, x, right)


# --------------------------------------------------------------------------- registration
def _register(name: str, right: bool):
    backward_op = register(
        f"{name}_backward(Tensor grad, Tensor x) -> Tensor",
        lambda grad, x: backward(FAMILY.kernels(x), grad, x, right),
        lambda grad, x: torch.empty_like(x),
    )

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    return register(
        f"{name}(Tensor x) -> Tensor",
        lambda x: forward(FAMILY.kernels(x), x, right),
        lambda x: torch.empty_like(x),
        setup_context=setup_context,
        backward=lambda ctx, grad: backward_op(grad, *ctx.saved_tensors),
    )


_OP_L, _OP_R = _register("swoosh_l", False), _register("swoosh_r", True)


def swoosh_l(x: Tensor) -> Tensor:
    """SwooshL(x) = log(1 + e^(x-4)) − 0.08 x − 0.035, elementwise.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
    Returns:
        A tensor of x's shape and dtype; computed in float32 (float64 for float64) and rounded once. SwooshL(+inf) is
        NaN, as in the formula.
    Raises:
        TypeError: x is not a floating tensor.
    """
    return _swoosh(x, False, _OP_L)


def swoosh_r(x: Tensor) -> Tensor:
    """SwooshR(x) = log(1 + e^(x-1)) − 0.08 x − 0.313261687, elementwise. See :func:`swoosh_l`."""
    return _swoosh(x, True, _OP_R)
