# SPDX-License-Identifier: Apache-2.0
# `make op OP=depthwise_conv2d` writes this file from fastasr/ops/depthwise_conv2d.py: change that one.
"""Convolves every channel of the maps x with taps of its own, stride 1, zeros around x; channels last"""

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
    NOT_MINE,
    applied,
    back,
    back_in_shape,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    operand,
    promoted,
)
from fastasr.ops.depthwise_conv2d import _padding, _padding_fits
from fastasr.ops.depthwise_conv2d import depthwise_conv2d as formula

op = OPS["depthwise_conv2d"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    padding: tuple[int, int] = (0, 0)


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    padding: tuple[int, int]


# --------------------------------------------------------------------------- the public function
def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Convolves every channel of the maps x with taps of its own, stride 1, zeros around x; channels last.

    Args:
        x: (B, T, F, C), contiguous best: ``map.permute(0, 2, 3, 1)`` of a map in channels_last order is. float32,
            bfloat16, float16 or float64.
        weight: (C, 1, K, L), that of a ``torch.nn.Conv2d`` with C groups, or (C, K, L); x's dtype, except under
            autocast, which casts as it does for ``torch.nn.functional.conv2d``.
        bias: (C,) or None.
        padding: (P, Q), zeros before and after the frames and the pixels of a frame; less than (K, L).
    Returns:
        (B, T + 2P − K + 1, F + 2Q − L + 1, C), x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; padding out of range; x, padded, is smaller than the kernel.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and x.is_contiguous()
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and type(padding) is tuple
        and len(padding) == 2
        and type(padding[0]) is type(padding[1]) is int
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return apply(kernels, True, x, weight, bias, padding)
            return kernels.forward(x, weight, bias, *padding)
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, weight, bias, padding)
            raise
    check(x, weight, bias, padding)
    if is_compiling() or not (
        type(x) in PLAIN and type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)
    ):
        return traced(x, weight, bias, padding)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, weight, bias, padding))
    kernels = family.kernels(x)
    if kernels is None:
        return laid_out(op, formula(x, weight, bias, padding=padding))
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        x, weight, bias = cast(cast_dtype, x, weight, bias)
        kernels = family.kernels(x)
        if kernels is None:
            return formula(x, weight, bias, padding=padding)
    try:
        if is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply(kernels, False, x, weight, bias, padding)
        y = run_kernels(kernels, x, weight, bias, padding)
    except Unlaunchable as error:
        family.give_up(error, x)
        return formula(x, weight, bias, padding=padding)
    return y


def check(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not (type(padding) is tuple and len(padding) == 2 and type(padding[0]) is type(padding[1]) is int):
        op.wrong_pair("padding", padding)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) == 4:
        C = shape[3]
        right = True
    if not right:
        op.wrong_shape("x", x, listed("B", "T", "F", "C"))
    P, Q = _padding(Arguments(x, weight, bias, padding))
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    shape, right = weight.shape, False
    if len(shape) == 4:
        K = shape[2]
        L = shape[3]
        right = shape[0] == C and shape[1] == 1 and K >= 1 and L >= 1
    elif len(shape) == 3:
        K = shape[1]
        L = shape[2]
        right = shape[0] == C and K >= 1 and L >= 1
    if not right:
        op.wrong_shape("weight", weight, f"{listed(C, 1, 'K', 'L')} or {listed(C, 'K', 'L')}, K >= 1, L >= 1")
    if weight.device != x.device:
        op.wrong_device("weight", weight, "x", x)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
            op.wrong_tensor("bias", bias)
        if bias.shape != (C,):
            op.wrong_shape("bias", bias, listed(C))
        if bias.device != x.device:
            op.wrong_device("bias", bias, "x", x)
    if weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("weight", weight, "x", x)
    if bias is not None and bias.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("bias", bias, "x", x)
    _padding_fits(op, make(Arguments, (x, weight, bias, padding)))


def traced(x, weight, bias, padding):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("depthwise_conv2d", x):
        return formula(x, weight, bias, padding=padding)
    return operator(x, weight, bias, padding)


def run_kernels(kernels, x, weight, bias, padding):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    dtype = y_dtype if kernels.backend == "cpu" else None
    y = kernels.forward(operand(x, dtype), operand(weight, dtype), operand(bias, dtype), *padding)
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class DepthwiseConv2D(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias, padding):
        y = (
            kernels.forward(x, weight, bias, *padding)
            if direct
            else run_kernels(kernels, x, weight, bias, padding)
        )
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, bias)
        ctx.rest = kernels, direct, padding
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("depthwise_conv2d")
        # once: a checkpoint gives them one time
        x, weight, bias = ctx.saved_tensors
        kernels, direct, padding = ctx.rest
        d_x, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, bias, padding)), ctx.needs_input_grad[2:]
        )
        return None, None, d_x, d_weight, d_bias, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    (grad_y,) = grads
    dtype = promoted(saved.x) if kernels.backend == "cpu" else None
    d_x, d_weight, d_bias = kernels.backward(
        operand(grad_y, dtype), operand(saved.x, dtype), operand(saved.weight, dtype), *saved.padding,
        needs.x, needs.weight, needs.bias,
    )  # fmt: skip
    if not needs.x:
        d_x = None
    if not needs.weight:
        d_weight = None
    if not needs.bias:
        d_bias = None
    d_x = back(d_x, saved.x)
    d_weight = back_in_shape(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_weight, d_bias


apply = applied(DepthwiseConv2D)


# --------------------------------------------------------------------------- the registered operator
def fake(x, weight, bias=None, padding=(0, 0)):
    B = x.shape[0]
    T = x.shape[1]
    F = x.shape[2]
    C = x.shape[3]
    P, Q = _padding(Arguments(x, weight, bias, padding))
    if len(weight.shape) == 4:
        K = weight.shape[2]
        L = weight.shape[3]
    elif len(weight.shape) == 3:
        K = weight.shape[1]
        L = weight.shape[2]
    return torch.empty((B, T + 2 * P - K + 1, F + 2 * Q - L + 1, C), dtype=promoted(x), device=x.device)


op.serve(
    depthwise_conv2d,
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
        differentiable=("x", "weight", "bias"),
        graded={"y": ""},
        saves=("x", "weight", "bias"),
        asks=True,
        autocast=("x", "weight", "bias"),
    ),
)
operator = register_op(
    op,
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias=None, SymInt[2] padding=[0, 0]) -> Tensor",
    "depthwise_conv2d_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, SymInt[2] padding, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
)
