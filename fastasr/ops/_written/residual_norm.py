# SPDX-License-Identifier: Apache-2.0
# `make op OP=residual_norm` writes this file from fastasr/ops/residual_norm.py: change that one.
"""LayerNorm(x + update) over the last dimension"""

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
    COMPUTE,
    NOT_MINE,
    applied,
    back,
    is_batched,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    operand,
    promoted,
    wide,
)
from fastasr.ops.residual_norm import _gradients, _launch
from fastasr.ops.residual_norm import residual_norm as formula

op = OPS["residual_norm"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    update: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-05


class Saved(NamedTuple):
    x: Tensor
    update: Tensor
    weight: Tensor
    bias: Tensor
    statistics: Tensor
    eps: float


# --------------------------------------------------------------------------- the public function
def residual_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-05) -> Tensor:
    """LayerNorm(x + update) over the last dimension.

    Args:
        x, update: (..., D), one shape. float32, bfloat16, float16 or float64.
        weight, bias: (D,).
        eps: added to the variance.
    Returns:
        A tensor of x's shape in the promoted dtype of x and update, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and type(update) in PLAIN
        and type(weight) in PLAIN
        and weight.dtype in COMPUTE
        and type(bias) in PLAIN
        and type(eps) is float
        and (eps >= 0)
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or update.requires_grad or weight.requires_grad or bias.requires_grad
            ):
                return apply(kernels, True, x, update, weight, bias, eps)
            y, _ = kernels.forward(x, update, None, None, None, weight, bias, eps, 0, False)
            return y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, update, weight, bias, eps)
            raise
    check(x, update, weight, bias, eps)
    if is_compiling() or not (
        type(x) in PLAIN and type(update) in PLAIN and type(weight) in PLAIN and type(bias) in PLAIN
    ):
        return traced(x, update, weight, bias, eps)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, update, weight, bias, eps))
    kernels = family.kernels(x, update, weight, bias)
    if kernels is None:
        return laid_out(op, formula(x, update, weight, bias, eps))
    try:
        if is_grad_enabled() and (
            x.requires_grad or update.requires_grad or weight.requires_grad or bias.requires_grad
        ):
            return apply(kernels, False, x, update, weight, bias, eps)
        y, _ = run_kernels(kernels, x, update, weight, bias, eps, False)
    except Unlaunchable as error:
        family.give_up(error, x, update, weight, bias)
        return formula(x, update, weight, bias, eps)
    return y


def check(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(eps) is not float:
        op.wrong_float("eps", eps)
    if not (eps >= 0):
        op.fail("eps", "at least 0", eps)
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


def traced(x, update, weight, bias, eps):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("residual_norm", x, update, weight, bias):
        return formula(x, update, weight, bias, eps)
    y, _ = operator(
        x, update, weight, bias, eps, is_grad_enabled() and (x.requires_grad or update.requires_grad or
        weight.requires_grad or bias.requires_grad),
    )  # fmt: skip
    return y


def run_kernels(kernels, x, update, weight, bias, eps, keep):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x, update)
    statistics_dtype = wide(x, update, weight, bias)
    y, statistics = _launch(op, kernels, make(Arguments, (x, update, weight, bias, eps)), y_dtype, keep)
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if statistics.dtype is not statistics_dtype:
        statistics = statistics.to(statistics_dtype)
    return y, statistics


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x, a.update), wide(a.x, a.update, a.weight, a.bias))


# --------------------------------------------------------------------------- gradients without the dispatcher
class ResidualNorm(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, update, weight, bias, eps):
        if direct:
            y, statistics = kernels.forward(x, update, None, None, None, weight, bias, eps, 0, True)
        else:
            y, statistics = run_kernels(kernels, x, update, weight, bias, eps, True)
        y = not_a_view(y)
        ctx.save_for_backward(x, update, weight, bias, statistics)
        ctx.rest = kernels, direct, eps
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("residual_norm")
        # once: a checkpoint gives them one time
        x, update, weight, bias, statistics = ctx.saved_tensors
        kernels, direct, eps = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, _, _, d_weight, d_bias = kernels.backward(
                operand(grad_y, None), x, update, None, None, None, weight, bias, statistics, eps, 0
            )
            d_update = d_x
            return None, None, d_x, d_update, d_weight, d_bias, None
        d_x, d_update, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, update, weight, bias, statistics, eps))
        )
        return None, None, d_x, d_update, d_weight, d_bias, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    d_x, d_update, d_weight, d_bias = _gradients(op, kernels, grads, saved, None)
    d_x = back(d_x, saved.x)
    d_update = back(d_update, saved.update)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_update, d_weight, d_bias


apply = applied(ResidualNorm)


# --------------------------------------------------------------------------- the registered operator
def fake(x, update, weight, bias, eps=1e-05, keep=False):
    keep = keep and family.kernels(x, update, weight, bias) is not None
    S = x.shape[:-1]
    C = x.shape[-1]
    return torch.empty((*S, C), dtype=promoted(x, update), device=x.device), torch.empty(
        (*S, 3) if keep else (0,), dtype=wide(x, update, weight, bias), device=x.device
    )


op.serve(
    residual_norm,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "statistics"),
        deciding=("x", "update", "weight", "bias"),
        differentiable=("x", "update", "weight", "bias"),
        graded={"y": ""},
        saves=("x", "update", "weight", "bias", "statistics"),
        kept=("statistics",),
    ),
)
operator = register_op(
    op,
    "residual_norm(Tensor x, Tensor update, Tensor weight, Tensor bias, float eps=1e-05, bool keep=False) "
    "-> (Tensor, Tensor)",
    "residual_norm_backward(Tensor grad_y, Tensor x, Tensor update, Tensor weight, Tensor bias, Tensor "
    "statistics, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
