# SPDX-License-Identifier: Apache-2.0
# `make op OP=linear` writes this file from fastasr/ops/linear.py: change that one.
"""x weightᵀ + bias: ``torch.nn.functional.linear``, faster where another matrix product is"""

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
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    promoted,
)
from fastasr.ops.linear import _gradients, _launch, _product
from fastasr.ops.linear import linear as formula

op = OPS["linear"]
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
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: ``torch.nn.functional.linear``, faster where another matrix product is.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); bias: (N,) or None; x's dtype, except under autocast, which casts all three.
    Returns:
        (..., N).
    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (dtype := x.dtype)
        and type(weight) in PLAIN
        and weight.is_cpu
        and weight.dtype is dtype
        and (bias is None or (type(bias) in PLAIN and bias.is_cpu and bias.dtype is dtype))
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return apply(kernels, True, x, weight, bias)
            return _product(kernels, False, x, weight, bias)
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
    kernels = family.kernels(x)
    if kernels is None:
        return laid_out(op, formula(x, weight, bias))
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        x, weight, bias = cast(cast_dtype, x, weight, bias)
        kernels = family.kernels(x)
        if kernels is None:
            return formula(x, weight, bias)
    try:
        if is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply(kernels, False, x, weight, bias)
        y = run_kernels(kernels, x, weight, bias)
    except Unlaunchable as error:
        family.give_up(error, x)
        return formula(x, weight, bias)
    return y


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) >= 1:
        K = shape[-1]
        right = True
    if not right:
        op.wrong_shape("x", x, listed("...", "K"))
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    shape, right = weight.shape, False
    if len(shape) == 2:
        N = shape[0]
        right = shape[1] == K
    if not right:
        op.wrong_shape("weight", weight, listed("N", K))
    if weight.device != x.device:
        op.wrong_device("weight", weight, "x", x)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
            op.wrong_tensor("bias", bias)
        if bias.shape != (N,):
            op.wrong_shape("bias", bias, listed(N))
        if bias.device != x.device:
            op.wrong_device("bias", bias, "x", x)
    if weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("weight", weight, "x", x)
    if bias is not None and bias.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("bias", bias, "x", x)


def traced(x, weight, bias):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("linear", x):
        return formula(x, weight, bias)
    return operator(x, weight, bias)


def run_kernels(kernels, x, weight, bias):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    y = _launch(op, kernels, make(Arguments, (x, weight, bias)), y_dtype, False)
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class Linear(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias):
        y = _product(kernels, True, x, weight, bias) if direct else run_kernels(kernels, x, weight, bias)
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, bias)
        ctx.rest = kernels, direct
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("linear")
        # once: a checkpoint gives them one time
        x, weight, bias = ctx.saved_tensors
        kernels, direct = ctx.rest
        d_x, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, bias)), ctx.needs_input_grad[2:]
        )
        return None, None, d_x, d_weight, d_bias


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    d_x, d_weight, d_bias = _gradients(op, kernels, grads, saved, needs)
    d_x = back(d_x, saved.x)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_weight, d_bias


apply = applied(Linear)


# --------------------------------------------------------------------------- the registered operator
def fake(x, weight, bias=None):
    S = x.shape[:-1]
    N = weight.shape[0]
    return torch.empty((*S, N), dtype=promoted(x), device=x.device)


op.serve(
    linear,
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
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    "linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, bool[] needs) -> (Tensor, "
    "Tensor, Tensor)",
)
