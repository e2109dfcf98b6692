# SPDX-License-Identifier: Apache-2.0
# `make op OP=add_two_norms` writes this file from fastasr/ops/add_two_norms.py: change that one.
"""the LayerNorm of x + scale · update over the last dimension, and the LayerNorm of this result"""

from typing import NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import refuse_double_backward
from fastasr.ops._runtime import (
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
from fastasr.ops.add_two_norms import _gradients
from fastasr.ops.add_two_norms import add_two_norms as formula

op = OPS["add_two_norms"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    update: Tensor
    weight: Tensor
    bias: Tensor
    next_weight: Tensor
    next_bias: Tensor
    eps: float = 1e-05
    next_eps: float = 1e-05
    scale: float = 1.0


class Saved(NamedTuple):
    x: Tensor
    update: Tensor
    weight: Tensor
    bias: Tensor
    next_weight: Tensor
    next_bias: Tensor
    eps: float
    next_eps: float
    scale: float


# --------------------------------------------------------------------------- the public function
def add_two_norms(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor,
    next_bias: Tensor,
    eps: float = 1e-05,
    next_eps: float = 1e-05,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns the LayerNorm of x + scale · update over the last dimension, and the LayerNorm of this result.

    Args:
        x, update: (..., C), one shape. float32, bfloat16, float16 or float64.
        weight, bias: (C,), of the first norm; next_weight, next_bias: (C,), of the second.
        eps, next_eps: added to the variances.
        scale: the factor of the update.
    Returns:
        The first norm, in the promoted dtype of x and update, and the norm of this norm as it is rounded, in update's
        dtype. Both have x's shape, are computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (dtype := x.dtype)
        and x.is_contiguous()
        and type(update) in PLAIN
        and update.dtype is dtype
        and type(weight) in PLAIN
        and weight.dtype is dtype
        and type(bias) in PLAIN
        and bias.dtype is dtype
        and type(next_weight) in PLAIN
        and next_weight.dtype is dtype
        and type(next_bias) in PLAIN
        and next_bias.dtype is dtype
        and type(eps) is float
        and (eps >= 0)
        and type(next_eps) is float
        and (next_eps >= 0)
        and type(scale) is float
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad
                or update.requires_grad
                or weight.requires_grad
                or bias.requires_grad
                or next_weight.requires_grad
                or next_bias.requires_grad
            ):
                return apply(
                    kernels, True, x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale
                )
            t, y = kernels.forward(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
            return t, y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
            raise
    check(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(update) in PLAIN
        and type(weight) in PLAIN
        and type(bias) in PLAIN
        and type(next_weight) in PLAIN
        and type(next_bias) in PLAIN
    ):
        return traced(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
        )
    kernels = family.kernels(x, update, weight, bias, next_weight, next_bias)
    if kernels is None:
        return laid_out(op, formula(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale))
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or update.requires_grad
            or weight.requires_grad
            or bias.requires_grad
            or next_weight.requires_grad
            or next_bias.requires_grad
        ):
            return apply(
                kernels, False, x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale
            )
        t, y = run_kernels(kernels, x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
    except Unlaunchable as error:
        family.give_up(error, x, update, weight, bias, next_weight, next_bias)
        return formula(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
    return t, y


def check(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor,
    next_bias: Tensor,
    eps: float,
    next_eps: float,
    scale: float,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(eps) is not float:
        op.wrong_float("eps", eps)
    if not (eps >= 0):
        op.fail("eps", "at least 0", eps)
    if type(next_eps) is not float:
        op.wrong_float("next_eps", next_eps)
    if not (next_eps >= 0):
        op.fail("next_eps", "at least 0", next_eps)
    if type(scale) is not float:
        op.wrong_float("scale", scale)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) >= 1:
        S = shape[:-1]
        C = shape[-1]
        right = C >= 1
    if not right:
        op.wrong_shape("x", x, f"{listed('...', 'C')}, C >= 1")
    if not isinstance(update, Tensor) or update.dtype not in FLOATING or update.layout is not torch.strided:
        op.wrong_tensor("update", update)
    if update.shape != (*S, C):
        op.wrong_shape("update", update, listed(*S, C))
    if update.device != x.device:
        op.wrong_device("update", update, "x", x)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    if weight.shape != (C,):
        op.wrong_shape("weight", weight, listed(C))
    if weight.device != x.device:
        op.wrong_device("weight", weight, "x", x)
    if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
        op.wrong_tensor("bias", bias)
    if bias.shape != (C,):
        op.wrong_shape("bias", bias, listed(C))
    if bias.device != x.device:
        op.wrong_device("bias", bias, "x", x)
    if (
        not isinstance(next_weight, Tensor)
        or next_weight.dtype not in FLOATING
        or next_weight.layout is not torch.strided
    ):
        op.wrong_tensor("next_weight", next_weight)
    if next_weight.shape != (C,):
        op.wrong_shape("next_weight", next_weight, listed(C))
    if next_weight.device != x.device:
        op.wrong_device("next_weight", next_weight, "x", x)
    if (
        not isinstance(next_bias, Tensor)
        or next_bias.dtype not in FLOATING
        or next_bias.layout is not torch.strided
    ):
        op.wrong_tensor("next_bias", next_bias)
    if next_bias.shape != (C,):
        op.wrong_shape("next_bias", next_bias, listed(C))
    if next_bias.device != x.device:
        op.wrong_device("next_bias", next_bias, "x", x)


def traced(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("add_two_norms", x, update, weight, bias, next_weight, next_bias):
        return formula(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
    t, y = operator(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
    return t, y


def run_kernels(kernels, x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    t_dtype = promoted(x, update)
    y_dtype = promoted(update)
    dtype = t_dtype if kernels.backend == "cpu" else None
    t, y = kernels.forward(
        operand(x, dtype), operand(update, dtype), operand(weight, dtype), operand(bias, dtype),
        operand(next_weight, dtype), operand(next_bias, dtype), eps, next_eps, scale,
    )  # fmt: skip
    if t.dtype is not t_dtype:
        t = t.to(t_dtype)
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return t, y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x, a.update), promoted(a.update))


# --------------------------------------------------------------------------- gradients without the dispatcher
class AddTwoNorms(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale):
        if direct:
            t, y = kernels.forward(x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
        else:
            t, y = run_kernels(kernels, x, update, weight, bias, next_weight, next_bias, eps, next_eps, scale)
        t = not_a_view(t)
        y = not_a_view(y)
        ctx.save_for_backward(x, update, weight, bias, next_weight, next_bias)
        ctx.rest = kernels, direct, eps, next_eps, scale
        return t, y

    @staticmethod
    def backward(ctx, grad_t, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("add_two_norms")
        # once: a checkpoint gives them one time
        x, update, weight, bias, next_weight, next_bias = ctx.saved_tensors
        kernels, direct, eps, next_eps, scale = ctx.rest
        d_x, d_update, d_weight, d_bias, d_next_weight, d_next_bias = node_gradients(
            op, kernels, (grad_t, grad_y,), make(Saved, (x, update, weight, bias, next_weight, next_bias, eps,
            next_eps, scale,)), ctx.needs_input_grad[2:],
        )  # fmt: skip
        return None, None, d_x, d_update, d_weight, d_bias, d_next_weight, d_next_bias, None, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    d_x, d_update, d_weight, d_bias, d_next_weight, d_next_bias = _gradients(op, kernels, grads, saved, needs)
    d_x = back(d_x, saved.x)
    d_update = back(d_update, saved.update)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    d_next_weight = back(d_next_weight, saved.next_weight)
    d_next_bias = back(d_next_bias, saved.next_bias)
    return d_x, d_update, d_weight, d_bias, d_next_weight, d_next_bias


apply = applied(AddTwoNorms)


# --------------------------------------------------------------------------- the registered operator
def fake(x, update, weight, bias, next_weight, next_bias, eps=1e-05, next_eps=1e-05, scale=1.0):
    S = x.shape[:-1]
    C = x.shape[-1]
    return torch.empty((*S, C), dtype=promoted(x, update), device=x.device), torch.empty(
        (*S, C), dtype=promoted(update), device=x.device
    )


op.serve(
    add_two_norms,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("t", "y"),
        deciding=("x", "update", "weight", "bias", "next_weight", "next_bias"),
        differentiable=("x", "update", "weight", "bias", "next_weight", "next_bias"),
        graded={"t": "", "y": ""},
        saves=("x", "update", "weight", "bias", "next_weight", "next_bias"),
        asks=True,
    ),
)
operator = register_op(
    op,
    "add_two_norms(Tensor x, Tensor update, Tensor weight, Tensor bias, Tensor next_weight, Tensor "
    "next_bias, float eps=1e-05, float next_eps=1e-05, float scale=1.0) -> (Tensor, Tensor)",
    "add_two_norms_backward(Tensor? grad_t, Tensor? grad_y, Tensor x, Tensor update, Tensor weight, "
    "Tensor bias, Tensor next_weight, Tensor next_bias, float eps, float next_eps, float scale, bool[] "
    "needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
