# SPDX-License-Identifier: Apache-2.0
# `make op OP=conv_subsampling` writes this file from fastasr/ops/conv_subsampling.py: change that one.
"""The first two convolutions of FastConformer's front end, without their intermediate map"""

from typing import NamedTuple

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward
from fastasr.ops._runtime import (
    BOOL,
    NOT_MINE,
    applied,
    back,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    operand,
    promoted,
)
from fastasr.ops.conv_subsampling import conv_subsampling as formula

op = OPS["conv_subsampling"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    depthwise_weight: Tensor
    depthwise_bias: Tensor | None = None
    mask: Tensor | None = None
    left: int = 1


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    depthwise_weight: Tensor
    depthwise_bias: Tensor | None
    mask: Tensor | None
    left: int


# --------------------------------------------------------------------------- the public function
def conv_subsampling(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    left: int = 1,
) -> Tensor:
    """The first two convolutions of FastConformer's front end, without their intermediate map.

    They are a convolution with stride 2, ReLU, mask, and a depthwise convolution with stride 2, both of 3 × 3 taps.

    Args:
        x: (B, T, F), frames of features, padded as the first convolution needs them; float32, bfloat16, float16 or
            float64.
        weight: (C, 1, 3, 3), that of a ``torch.nn.Conv2d(1, C, 3, 2)``; x's dtype, except under autocast, which casts
            as it does for ``torch.nn.functional.conv2d``.
        bias: (C,) or None.
        depthwise_weight: (C, 1, 3, 3), that of a ``torch.nn.Conv2d(C, C, 3, 2, groups=C)``.
        depthwise_bias: (C,) or None.
        mask: (B, H) with H = (T − 1) // 2, bool; False: the frame of the first convolution counts as 0. Padding in time
            of the second convolution is frames of x that the mask excludes.
        left: columns of zeros before those of the first convolution, 1 or 2; behind them there is always one.
    Returns:
        (B, (H − 1) // 2, (W + left) // 2, C) with W = (F − 1) // 2, x's dtype, computed in float32 or better and
        rounded once.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; ``left`` is neither 1 nor 2.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and x.is_contiguous()
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and type(depthwise_weight) in PLAIN
        and (depthwise_bias is None or type(depthwise_bias) in PLAIN)
        and (mask is None or type(mask) in PLAIN)
        and type(left) is int
        and (left == 1 or left == 2)
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad
                or weight.requires_grad
                or (bias is not None and bias.requires_grad)
                or depthwise_weight.requires_grad
                or (depthwise_bias is not None and depthwise_bias.requires_grad)
            ):
                return apply(kernels, True, x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
            return kernels.forward(x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
            raise
    check(x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and type(depthwise_weight) in PLAIN
        and (depthwise_bias is None or type(depthwise_bias) in PLAIN)
        and (mask is None or type(mask) in PLAIN)
    ):
        return traced(x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, weight, bias, depthwise_weight, depthwise_bias, mask, left))
    kernels = family.kernels(x)
    if kernels is None:
        return laid_out(op, formula(x, weight, bias, depthwise_weight, depthwise_bias, mask, left=left))
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        x, weight, bias, depthwise_weight, depthwise_bias = cast(
            cast_dtype, x, weight, bias, depthwise_weight, depthwise_bias
        )
        kernels = family.kernels(x)
        if kernels is None:
            return formula(x, weight, bias, depthwise_weight, depthwise_bias, mask, left=left)
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or depthwise_weight.requires_grad
            or (depthwise_bias is not None and depthwise_bias.requires_grad)
        ):
            return apply(kernels, False, x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
        y = run_kernels(kernels, x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
    except Unlaunchable as error:
        family.give_up(error, x)
        return formula(x, weight, bias, depthwise_weight, depthwise_bias, mask, left=left)
    return y


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    mask: Tensor | None,
    left: int,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(left) is not int:
        op.wrong_int("left", left)
    if not (left == 1 or left == 2):
        op.fail("left", "1 or 2", left)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) == 3:
        B = shape[0]
        T = shape[1]
        F = shape[2]
        right = T >= 7 and F >= 3
    if not right:
        op.wrong_shape("x", x, f"{listed('B', 'T', 'F')}, T >= 7, F >= 3")
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    shape, right = weight.shape, False
    if len(shape) == 4:
        C = shape[0]
        right = shape[1] == 1 and shape[2] == 3 and shape[3] == 3 and C >= 1
    if not right:
        op.wrong_shape("weight", weight, f"{listed('C', 1, 3, 3)}, C >= 1")
    if weight.device != x.device:
        op.wrong_device("weight", weight, "x", x)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
            op.wrong_tensor("bias", bias)
        if bias.shape != (C,):
            op.wrong_shape("bias", bias, listed(C))
        if bias.device != x.device:
            op.wrong_device("bias", bias, "x", x)
    if (
        not isinstance(depthwise_weight, Tensor)
        or depthwise_weight.dtype not in FLOATING
        or depthwise_weight.layout is not torch.strided
    ):
        op.wrong_tensor("depthwise_weight", depthwise_weight)
    if depthwise_weight.shape != (C, 1, 3, 3):
        op.wrong_shape("depthwise_weight", depthwise_weight, listed(C, 1, 3, 3))
    if depthwise_weight.device != x.device:
        op.wrong_device("depthwise_weight", depthwise_weight, "x", x)
    if depthwise_bias is not None:
        if (
            not isinstance(depthwise_bias, Tensor)
            or depthwise_bias.dtype not in FLOATING
            or depthwise_bias.layout is not torch.strided
        ):
            op.wrong_tensor("depthwise_bias", depthwise_bias)
        if depthwise_bias.shape != (C,):
            op.wrong_shape("depthwise_bias", depthwise_bias, listed(C))
        if depthwise_bias.device != x.device:
            op.wrong_device("depthwise_bias", depthwise_bias, "x", x)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype not in BOOL or mask.layout is not torch.strided:
            op.wrong_tensor("mask", mask, "a bool tensor")
        if mask.shape != (B, (T - 1) // 2):
            op.wrong_shape("mask", mask, listed(B, (T - 1) // 2))
        if mask.device != x.device:
            op.wrong_device("mask", mask, "x", x)
    if weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("weight", weight, "x", x)
    if bias is not None and bias.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("bias", bias, "x", x)
    if depthwise_weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("depthwise_weight", depthwise_weight, "x", x)
    if depthwise_bias is not None and depthwise_bias.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("depthwise_bias", depthwise_bias, "x", x)


def traced(x, weight, bias, depthwise_weight, depthwise_bias, mask, left):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("conv_subsampling", x):
        return formula(x, weight, bias, depthwise_weight, depthwise_bias, mask, left=left)
    return operator(x, weight, bias, depthwise_weight, depthwise_bias, mask, left)


def run_kernels(kernels, x, weight, bias, depthwise_weight, depthwise_bias, mask, left):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    dtype = y_dtype if kernels.backend == "cpu" else None
    y = kernels.forward(
        operand(x, dtype), operand(weight, dtype), operand(bias, dtype), operand(depthwise_weight, dtype),
        operand(depthwise_bias, dtype), operand(mask, None), left,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class ConvSubsampling(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias, depthwise_weight, depthwise_bias, mask, left):
        if direct:
            y = kernels.forward(x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
        else:
            y = run_kernels(kernels, x, weight, bias, depthwise_weight, depthwise_bias, mask, left)
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, bias, depthwise_weight, depthwise_bias, mask)
        ctx.rest = kernels, direct, left
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("conv_subsampling")
        # once: a checkpoint gives them one time
        x, weight, bias, depthwise_weight, depthwise_bias, mask = ctx.saved_tensors
        kernels, direct, left = ctx.rest
        d_x, d_weight, d_bias, d_depthwise_weight, d_depthwise_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, bias, depthwise_weight, depthwise_bias, mask,
            left,)), ctx.needs_input_grad[2:],
        )  # fmt: skip
        return None, None, d_x, d_weight, d_bias, d_depthwise_weight, d_depthwise_bias, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    (grad_y,) = grads
    dtype = promoted(saved.x) if kernels.backend == "cpu" else None
    d_x, d_weight, d_bias, d_depthwise_weight, d_depthwise_bias = kernels.backward(
        operand(grad_y, dtype), operand(saved.x, dtype), operand(saved.weight, dtype), operand(saved.bias,
        dtype), operand(saved.depthwise_weight, dtype), operand(saved.mask, None), saved.left, needs.x,
    )  # fmt: skip
    if not needs.x:
        d_x = None
    if not needs.weight:
        d_weight = None
    if not needs.bias:
        d_bias = None
    if not needs.depthwise_weight:
        d_depthwise_weight = None
    if not needs.depthwise_bias:
        d_depthwise_bias = None
    d_x = back(d_x, saved.x)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    d_depthwise_weight = back(d_depthwise_weight, saved.depthwise_weight)
    d_depthwise_bias = back(d_depthwise_bias, saved.depthwise_bias)
    return d_x, d_weight, d_bias, d_depthwise_weight, d_depthwise_bias


apply = applied(ConvSubsampling)


# --------------------------------------------------------------------------- the registered operator
def fake(x, weight, bias, depthwise_weight, depthwise_bias=None, mask=None, left=1):
    B = x.shape[0]
    T = x.shape[1]
    F = x.shape[2]
    C = weight.shape[0]
    return torch.empty(
        (B, ((T - 1) // 2 - 1) // 2, ((F - 1) // 2 + left) // 2, C), dtype=promoted(x), device=x.device
    )


op.serve(
    conv_subsampling,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y",),
        deciding=("x",),
        differentiable=("x", "weight", "bias", "depthwise_weight", "depthwise_bias"),
        graded={"y": ""},
        saves=("x", "weight", "bias", "depthwise_weight", "depthwise_bias", "mask"),
        asks=True,
        autocast=("x", "weight", "bias", "depthwise_weight", "depthwise_bias"),
    ),
)
operator = register_op(
    op,
    "conv_subsampling(Tensor x, Tensor weight, Tensor? bias, Tensor depthwise_weight, Tensor? "
    "depthwise_bias=None, Tensor? mask=None, SymInt left=1) -> Tensor",
    "conv_subsampling_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor "
    "depthwise_weight, Tensor? depthwise_bias, Tensor? mask, SymInt left, bool[] needs) -> (Tensor, "
    "Tensor, Tensor, Tensor, Tensor)",
)
