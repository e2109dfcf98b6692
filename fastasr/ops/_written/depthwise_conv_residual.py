# SPDX-License-Identifier: Apache-2.0
# `make op OP=depthwise_conv_residual` writes this file from fastasr/ops/depthwise_conv_residual.py: change that one.
"""x plus its depthwise convolution over time: the merge of E-Branchformer's branches, SANM's memory"""

from typing import NamedTuple

import torch
from torch import Tensor, is_grad_enabled, promote_types
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served, widest
from fastasr.ops._layout import dense_channels
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import refuse_double_backward
from fastasr.ops._runtime import (
    BOOL,
    COMPUTE,
    NOT_MINE,
    applied,
    back,
    back_in_shape,
    is_batched,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    operand,
    promoted,
)
from fastasr.ops.depthwise_conv_residual import _check
from fastasr.ops.depthwise_conv_residual import depthwise_conv_residual as formula

op = OPS["depthwise_conv_residual"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    padding_mask: Tensor | None = None
    delay: int = 0


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    padding_mask: Tensor | None
    delay: int


# --------------------------------------------------------------------------- the public function
def depthwise_conv_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    delay: int = 0,
) -> Tensor:
    """x plus its depthwise convolution over time: the merge of E-Branchformer's branches, SANM's memory.

    Args:
        x: (B, T, C); float32, bfloat16, float16 or float64. Contiguous channels are read where they lie, whatever the
            other strides.
        weight: (C, 1, K), that of a ``torch.nn.Conv1d`` with C groups, or (C, K): the taps, padded with zeros to the
            same length.
        bias: (C,) or None.
        padding_mask: (B, T), bool; True where a frame is padding, which counts as 0.
        delay: the convolution sees K // 2 + delay frames of the past; (K − 1) // 2 makes it causal.
    Returns:
        y (B, T, C), contiguous, in x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match; a tap would not reach the frame itself because of delay.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (x.is_contiguous() or x.stride(-1) == 1)
        and type(weight) in PLAIN
        and weight.dtype in COMPUTE
        and (bias is None or type(bias) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
        and type(delay) is int
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return apply(kernels, True, x, weight, bias, padding_mask, delay)
            return kernels.forward(x, weight, bias, padding_mask, delay)
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, weight, bias, padding_mask, delay)
            raise
    check(x, weight, bias, padding_mask, delay)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
    ):
        return traced(x, weight, bias, padding_mask, delay)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, weight, bias, padding_mask, delay))
    kernels = family.kernels(x, weight, bias)
    if kernels is None:
        return laid_out(op, formula(x, weight, bias, padding_mask=padding_mask, delay=delay))
    try:
        if is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply(kernels, False, x, weight, bias, padding_mask, delay)
        y = run_kernels(kernels, x, weight, bias, padding_mask, delay)
    except Unlaunchable as error:
        family.give_up(error, x, weight, bias)
        return formula(x, weight, bias, padding_mask=padding_mask, delay=delay)
    return y


def check(x: Tensor, weight: Tensor, bias: Tensor | None, padding_mask: Tensor | None, delay: int) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(delay) is not int:
        op.wrong_int("delay", delay)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) == 3:
        B = shape[0]
        T = shape[1]
        C = shape[2]
        right = C >= 1
    if not right:
        op.wrong_shape("x", x, f"{listed('B', 'T', 'C')}, C >= 1")
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    shape, right = weight.shape, False
    if len(shape) == 3:
        K = shape[2]
        right = shape[0] == C and shape[1] == 1 and K >= 1
    elif len(shape) == 2:
        K = shape[1]
        right = shape[0] == C and K >= 1
    if not right:
        op.wrong_shape("weight", weight, f"{listed(C, 1, 'K')} or {listed(C, 'K')}, K >= 1")
    if weight.device != x.device:
        op.wrong_device("weight", weight, "x", x)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
            op.wrong_tensor("bias", bias)
        if bias.shape != (C,):
            op.wrong_shape("bias", bias, listed(C))
        if bias.device != x.device:
            op.wrong_device("bias", bias, "x", x)
    if padding_mask is not None:
        if (
            not isinstance(padding_mask, Tensor)
            or padding_mask.dtype not in BOOL
            or padding_mask.layout is not torch.strided
        ):
            op.wrong_tensor("padding_mask", padding_mask, "a bool tensor")
        if padding_mask.shape != (B, T):
            op.wrong_shape("padding_mask", padding_mask, listed(B, T))
        if padding_mask.device != x.device:
            op.wrong_device("padding_mask", padding_mask, "x", x)
    _check(op, make(Arguments, (x, weight, bias, padding_mask, delay)))


def traced(x, weight, bias, padding_mask, delay):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("depthwise_conv_residual", x, weight, bias):
        return formula(x, weight, bias, padding_mask=padding_mask, delay=delay)
    return operator(x, weight, bias, padding_mask, delay)


def run_kernels(kernels, x, weight, bias, padding_mask, delay):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    dtype = widest(x, (weight, bias))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    y = kernels.forward(
        operand(x, dtype, dense_channels), operand(weight, work), operand(bias, work), operand(padding_mask,
        None), delay,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class DepthwiseConvResidual(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias, padding_mask, delay):
        if direct:
            y = kernels.forward(x, weight, bias, padding_mask, delay)
        else:
            y = run_kernels(kernels, x, weight, bias, padding_mask, delay)
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, bias, padding_mask)
        ctx.rest = kernels, direct, delay
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("depthwise_conv_residual")
        # once: a checkpoint gives them one time
        x, weight, bias, padding_mask = ctx.saved_tensors
        kernels, direct, delay = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, d_weight, d_bias = kernels.backward(operand(grad_y, None), x, weight, padding_mask, delay)
            return None, None, d_x, d_weight, None if bias is None else d_bias, None, None
        d_x, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, bias, padding_mask, delay))
        )
        return None, None, d_x, d_weight, d_bias, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_y,) = grads
    dtype = widest(saved.x, (saved.weight, saved.bias))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    d_x, d_weight, d_bias = kernels.backward(
        operand(grad_y, dtype), operand(saved.x, dtype, dense_channels), operand(saved.weight, work),
        operand(saved.padding_mask, None), saved.delay,
    )  # fmt: skip
    d_x = back(d_x, saved.x)
    d_weight = back_in_shape(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_weight, d_bias


apply = applied(DepthwiseConvResidual)


# --------------------------------------------------------------------------- the registered operator
def fake(x, weight, bias=None, padding_mask=None, delay=0):
    B = x.shape[0]
    T = x.shape[1]
    C = x.shape[2]
    return torch.empty((B, T, C), dtype=promoted(x), device=x.device)


op.serve(
    depthwise_conv_residual,
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
        deciding=("x", "weight", "bias"),
        differentiable=("x", "weight", "bias"),
        graded={"y": ""},
        saves=("x", "weight", "bias", "padding_mask"),
    ),
)
operator = register_op(
    op,
    "depthwise_conv_residual(Tensor x, Tensor weight, Tensor? bias=None, Tensor? padding_mask=None, "
    "SymInt delay=0) -> Tensor",
    "depthwise_conv_residual_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? "
    "padding_mask, SymInt delay) -> (Tensor, Tensor, Tensor)",
)
