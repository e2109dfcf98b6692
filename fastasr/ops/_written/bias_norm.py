# SPDX-License-Identifier: Apache-2.0
# `make op OP=bias_norm` writes this file from fastasr/ops/bias_norm.py: change that one.
"""x · mean((x − bias)², channel_dim)^(−1/2) · e^log_scale"""

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
from fastasr.ops.bias_norm import _check, _gradients, _launch
from fastasr.ops.bias_norm import bias_norm as formula

op = OPS["bias_norm"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    bias: Tensor
    log_scale: Tensor
    channel_dim: int = -1


class Saved(NamedTuple):
    x: Tensor
    bias: Tensor
    log_scale: Tensor
    channel_dim: int


# --------------------------------------------------------------------------- the public function
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
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (dtype := x.dtype)
        and x.is_contiguous()
        and type(bias) in PLAIN
        and bias.dtype is dtype
        and type(log_scale) in PLAIN
        and log_scale.dtype is dtype
        and type(channel_dim) is int
        and channel_dim == -1
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (x.requires_grad or bias.requires_grad or log_scale.requires_grad):
                return apply(kernels, True, x, bias, log_scale, channel_dim)
            return kernels.forward(x, bias, log_scale)
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, bias, log_scale, channel_dim)
            raise
    check(x, bias, log_scale, channel_dim)
    if is_compiling() or not (type(x) in PLAIN and type(bias) in PLAIN and type(log_scale) in PLAIN):
        return traced(x, bias, log_scale, channel_dim)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, bias, log_scale, channel_dim))
    kernels = family.kernels(x, bias, log_scale)
    if kernels is None:
        return laid_out(op, formula(x, bias, log_scale, channel_dim))
    try:
        if is_grad_enabled() and (x.requires_grad or bias.requires_grad or log_scale.requires_grad):
            return apply(kernels, False, x, bias, log_scale, channel_dim)
        y = run_kernels(kernels, x, bias, log_scale, channel_dim)
    except Unlaunchable as error:
        family.give_up(error, x, bias, log_scale)
        return formula(x, bias, log_scale, channel_dim)
    return y


def check(x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) >= 1:
        right = True
    if not right:
        op.wrong_shape("x", x, listed("...", "D"))
    if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
        op.wrong_tensor("bias", bias)
    shape, right = bias.shape, False
    if len(shape) == 1:
        right = True
    if not right:
        op.wrong_shape("bias", bias, listed("C"))
    if bias.device != x.device:
        op.wrong_device("bias", bias, "x", x)
    if (
        not isinstance(log_scale, Tensor)
        or log_scale.dtype not in FLOATING
        or log_scale.layout is not torch.strided
    ):
        op.wrong_tensor("log_scale", log_scale)
    if log_scale.shape != () and log_scale.shape != (1,):
        op.wrong_shape("log_scale", log_scale, f"{listed()} or {listed(1)}")
    if log_scale.device != x.device:
        op.wrong_device("log_scale", log_scale, "x", x)
    if type(channel_dim) is not int:
        op.wrong_int("channel_dim", channel_dim)
    if not (-x.dim() <= channel_dim < x.dim()):
        op.wrong_dimension("channel_dim", channel_dim, x)
    _check(op, make(Arguments, (x, bias, log_scale, channel_dim)))


def traced(x, bias, log_scale, channel_dim):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("bias_norm", x, bias, log_scale):
        return formula(x, bias, log_scale, channel_dim)
    return operator(x, bias, log_scale, channel_dim)


def run_kernels(kernels, x, bias, log_scale, channel_dim):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x, bias)
    y = _launch(op, kernels, make(Arguments, (x, bias, log_scale, channel_dim)), y_dtype, False)
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x, a.bias),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class BiasNorm(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, bias, log_scale, channel_dim):
        y = (
            kernels.forward(x, bias, log_scale)
            if direct
            else run_kernels(kernels, x, bias, log_scale, channel_dim)
        )
        y = not_a_view(y)
        ctx.save_for_backward(x, bias, log_scale)
        ctx.rest = kernels, direct, channel_dim
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("bias_norm")
        # once: a checkpoint gives them one time
        x, bias, log_scale = ctx.saved_tensors
        kernels, direct, channel_dim = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, d_bias, d_log_scale = kernels.backward(operand(grad_y, None), x, bias, log_scale)
            return None, None, d_x, d_bias, d_log_scale, None
        d_x, d_bias, d_log_scale = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, bias, log_scale, channel_dim))
        )
        return None, None, d_x, d_bias, d_log_scale, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    d_x, d_bias, d_log_scale = _gradients(op, kernels, grads, saved, None)
    d_x = back(d_x, saved.x)
    d_bias = back(d_bias, saved.bias)
    d_log_scale = back_in_shape(d_log_scale, saved.log_scale)
    return d_x, d_bias, d_log_scale


apply = applied(BiasNorm)


# --------------------------------------------------------------------------- the registered operator
def fake(x, bias, log_scale, channel_dim=-1):
    S = x.shape[:-1]
    D = x.shape[-1]
    return torch.empty((*S, D), dtype=promoted(x, bias), device=x.device)


op.serve(
    bias_norm,
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
        deciding=("x", "bias", "log_scale"),
        differentiable=("x", "bias", "log_scale"),
        graded={"y": ""},
        saves=("x", "bias", "log_scale"),
    ),
)
operator = register_op(
    op,
    "bias_norm(Tensor x, Tensor bias, Tensor log_scale, SymInt channel_dim=-1) -> Tensor",
    "bias_norm_backward(Tensor grad_y, Tensor x, Tensor bias, Tensor log_scale, SymInt channel_dim) -> "
    "(Tensor, Tensor, Tensor)",
)
