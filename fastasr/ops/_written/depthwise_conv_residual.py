# SPDX-License-Identifier: Apache-2.0
# `make op OP=depthwise_conv_residual` writes this file from fastasr/ops/depthwise_conv_residual.py: change that one.
"""depthwise convolution over time plus its input: the merge of E-Branchformer's branches"""

from functools import partial
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
from fastasr.ops._register import refuse_double_backward, register
from fastasr.ops._runtime import (
    COMPUTE,
    NOT_MINE,
    applied,
    as_tuple,
    back,
    formula_gradients,
    formula_results,
    gradients_without,
    is_batched,
    listed,
    make,
    not_a_view,
    operand,
    promoted,
    transformed_backward,
    transformed_gradients,
    transformed_results,
)
from fastasr.ops.depthwise_conv_residual import depthwise_conv_residual as formula

op = OPS["depthwise_conv_residual"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None


# --------------------------------------------------------------------------- the public function
def depthwise_conv_residual(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x plus its depthwise convolution over time, of the same length.

    Args:
        x: (B, T, C); float32, bfloat16, float16 or float64. Contiguous channels are read where they lie, whatever the
            other strides.
        weight: (C, 1, K), that of a ``torch.nn.Conv1d`` with C groups, or (C, K), K odd: the taps, padded with zeros to
            the same length.
        bias: (C,) or None.
    Returns:
        y (B, T, C), contiguous, in x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
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
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return apply(kernels, True, x, weight, bias)
            return kernels.forward(x, weight, bias)
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, weight, bias)
            raise
    check(x, weight, bias)
    if is_compiling() or not (
        type(x) in PLAIN and type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)
    ):
        return traced(x, weight, bias)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, weight, bias))
    kernels = family.kernels(x, weight, bias)
    if kernels is None:
        return formula(x, weight, bias)
    try:
        if is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply(kernels, False, x, weight, bias)
        y = run_kernels(kernels, x, weight, bias)
    except Unlaunchable as error:
        family.give_up(error, x, weight, bias)
        return formula(x, weight, bias)
    return y


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) == 3:
        C = shape[2]
        right = C >= 1
    if not right:
        op.wrong_shape("x", x, f"{listed('B', 'T', 'C')}, C >= 1")
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    shape, right = weight.shape, False
    if len(shape) == 3:
        K = shape[2]
        right = shape[0] == C and shape[1] == 1 and K % 2 == 1
    elif len(shape) == 2:
        K = shape[1]
        right = shape[0] == C and K % 2 == 1
    if not right:
        op.wrong_shape("weight", weight, f"{listed(C, 1, 'K')} or {listed(C, 'K')}, K odd")
    if weight.device != x.device:
        op.wrong_device("weight", weight, "x", x)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
            op.wrong_tensor("bias", bias)
        if bias.shape != (C,):
            op.wrong_shape("bias", bias, listed(C))
        if bias.device != x.device:
            op.wrong_device("bias", bias, "x", x)


def traced(x, weight, bias):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("depthwise_conv_residual", x, weight, bias):
        return formula(x, weight, bias)
    return operator(x, weight, bias)


def run_kernels(kernels, x, weight, bias):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    dtype = widest(x, (weight, bias))
    work = promote_types(dtype, torch.float32)
    y = kernels.forward(operand(x, dtype, dense_channels), operand(weight, work), operand(bias, work))
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class DepthwiseConvResidual(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias):
        y = kernels.forward(x, weight, bias) if direct else run_kernels(kernels, x, weight, bias)
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, bias)
        ctx.rest = kernels, direct
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("depthwise_conv_residual")
        # once: a checkpoint gives them one time
        x, weight, bias = ctx.saved_tensors
        kernels, direct = ctx.rest
        if transforms_active() or forward_ad._current_level >= 0 or is_batched(grad_y):
            d_x, d_weight, d_bias = transformed_gradients(op, (grad_y,), make(Saved, (x, weight, bias)))
            return None, None, d_x, d_weight, d_bias
        if direct:
            d_x, d_weight, d_bias = kernels.backward(grad_y.contiguous(), x, weight)
            return None, None, d_x, d_weight, None if bias is None else d_bias
        try:
            d_x, d_weight, d_bias = differentiate(kernels, grad_y, x, weight, bias)
        except Unlaunchable as error:
            d_x, d_weight, d_bias = gradients_without(error, op, (grad_y,), make(Saved, (x, weight, bias)))
        return None, None, d_x, d_weight, d_bias


def differentiate(kernels, grad_y, x, weight, bias):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    dtype = widest(x, (weight, bias))
    work = promote_types(dtype, torch.float32)
    d_x, d_weight, d_bias = kernels.backward(
        operand(grad_y, dtype), operand(x, dtype, dense_channels), operand(weight, work)
    )
    if d_x is not None and d_x.dtype is not x.dtype:
        d_x = d_x.to(x.dtype)
    d_weight = back(d_weight, weight)
    if bias is None:
        d_bias = None
    elif d_bias is not None and d_bias.dtype is not bias.dtype:
        d_bias = d_bias.to(bias.dtype)
    return d_x, d_weight, d_bias


# --------------------------------------------------------------------------- the registered operator
def run(x, weight, bias=None):
    kernels = family.kernels(x, weight, bias)
    if kernels is None:
        return formula_results(op, x, weight, bias)
    try:
        y = run_kernels(kernels, x, weight, bias)
    except Unlaunchable as error:
        family.give_up(error, x, weight, bias)
        return formula_results(op, x, weight, bias)
    return y.contiguous()


def fake(x, weight, bias=None):
    B = x.shape[0]
    T = x.shape[1]
    C = x.shape[2]

    return torch.empty((B, T, C), dtype=promoted(x), device=x.device)


def set_up(ctx, inputs, output):
    x, weight, bias = inputs

    ctx.save_for_backward(x, weight, bias)


def backward(ctx, grad_y, *_):
    x, weight, bias = ctx.saved_tensors
    d_x, d_weight, d_bias = as_tuple(backward_operator(grad_y, x, weight, bias))
    return d_x, d_weight, None if bias is None else d_bias


def run_backward(grad_y, x, weight, bias):
    kernels = family.kernels(x, weight, bias)
    if kernels is None:
        d_x, d_weight, d_bias = formula_gradients(op, (grad_y,), Saved(x, weight, bias))
    else:
        try:
            d_x, d_weight, d_bias = differentiate(kernels, grad_y, x, weight, bias)
        except Unlaunchable as error:
            d_x, d_weight, d_bias = gradients_without(error, op, (grad_y,), Saved(x, weight, bias))
    return d_x.contiguous(), d_weight.contiguous(), x.new_empty(0) if bias is None else d_bias.contiguous()


def fake_backward(grad_y, x, weight, bias):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


backward_operator = register(
    "depthwise_conv_residual_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias) -> (Tensor, "
    "Tensor, Tensor)",
    run_backward,
    fake_backward,
    transformed=partial(transformed_backward, op, 1),
)
operator = register(
    "depthwise_conv_residual(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    run,
    fake,
    setup_context=set_up,
    backward=backward,
    transformed=partial(transformed_results, op),
)
apply = applied(DepthwiseConvResidual)
written = Written(
    Arguments=Arguments,
    Saved=Saved,
    check=check,
    operator=operator,
    backward_operator=backward_operator,
    apply=apply,
    result_dtypes=result_dtypes,
    deciding=("x", "weight", "bias"),
    differentiable=("x", "weight", "bias"),
    dense=True,
)
op.serve(depthwise_conv_residual, written)
