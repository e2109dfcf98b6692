# SPDX-License-Identifier: Apache-2.0
# `make op OP=bypass` writes this file from fastasr/ops/bypass.py: change that one.
"""x_orig + (x − x_orig) · scale"""

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
from fastasr.ops.bypass import _trailing
from fastasr.ops.bypass import bypass as formula

op = OPS["bypass"]
family = op.family


class Arguments(NamedTuple):
    x_orig: Tensor
    x: Tensor
    scale: Tensor


class Saved(NamedTuple):
    x_orig: Tensor
    x: Tensor
    scale: Tensor


# --------------------------------------------------------------------------- the public function
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
    kernels = family.native
    if (
        kernels is not None
        and type(x_orig) in PLAIN
        and x_orig.is_cpu
        and (dtype := x_orig.dtype)
        and x_orig.is_contiguous()
        and type(x) in PLAIN
        and x.dtype is dtype
        and type(scale) in PLAIN
        and scale.dtype is dtype
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (x_orig.requires_grad or x.requires_grad or scale.requires_grad):
                return apply(kernels, True, x_orig, x, scale)
            return kernels.forward(x_orig, x, scale)
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x_orig, x, scale)
            raise
    check(x_orig, x, scale)
    if is_compiling() or not (type(x_orig) in PLAIN and type(x) in PLAIN and type(scale) in PLAIN):
        return traced(x_orig, x, scale)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x_orig, x, scale))
    kernels = family.kernels(x_orig, x, scale)
    if kernels is None:
        return laid_out(op, formula(x_orig, x, scale))
    try:
        if is_grad_enabled() and (x_orig.requires_grad or x.requires_grad or scale.requires_grad):
            return apply(kernels, False, x_orig, x, scale)
        y = run_kernels(kernels, x_orig, x, scale)
    except Unlaunchable as error:
        family.give_up(error, x_orig, x, scale)
        return formula(x_orig, x, scale)
    return y


def check(x_orig: Tensor, x: Tensor, scale: Tensor) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not isinstance(x_orig, Tensor) or x_orig.dtype not in FLOATING or x_orig.layout is not torch.strided:
        op.wrong_tensor("x_orig", x_orig)
    S = x_orig.shape
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    if x.shape != (*S,):
        op.wrong_shape("x", x, f"{listed(*S)} (that of x_orig)")
    if x.device != x_orig.device:
        op.wrong_device("x", x, "x_orig", x_orig)
    if not isinstance(scale, Tensor) or scale.dtype not in FLOATING or scale.layout is not torch.strided:
        op.wrong_tensor("scale", scale)
    if scale.device != x_orig.device:
        op.wrong_device("scale", scale, "x_orig", x_orig)
    _trailing(op, make(Arguments, (x_orig, x, scale)))


def traced(x_orig, x, scale):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("bypass", x_orig, x, scale):
        return formula(x_orig, x, scale)
    return operator(x_orig, x, scale)


def run_kernels(kernels, x_orig, x, scale):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x_orig, x, scale)
    dtype = y_dtype if kernels.backend == "cpu" else None
    y = kernels.forward(operand(x_orig, dtype), operand(x, dtype), operand(scale, dtype))
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x_orig, a.x, a.scale),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class Bypass(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x_orig, x, scale):
        y = kernels.forward(x_orig, x, scale) if direct else run_kernels(kernels, x_orig, x, scale)
        y = not_a_view(y)
        ctx.save_for_backward(x_orig, x, scale)
        ctx.rest = kernels, direct
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("bypass")
        # once: a checkpoint gives them one time
        x_orig, x, scale = ctx.saved_tensors
        kernels, direct = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x_orig, d_x, d_scale = kernels.backward(operand(grad_y, None), x_orig, x, scale)
            return None, None, d_x_orig, d_x, d_scale
        d_x_orig, d_x, d_scale = node_gradients(op, kernels, (grad_y,), make(Saved, (x_orig, x, scale)))
        return None, None, d_x_orig, d_x, d_scale


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_y,) = grads
    dtype = promoted(saved.x_orig, saved.x, saved.scale) if kernels.backend == "cpu" else None
    d_x_orig, d_x, d_scale = kernels.backward(
        operand(grad_y, dtype), operand(saved.x_orig, dtype), operand(saved.x, dtype), operand(saved.scale,
        dtype),
    )  # fmt: skip
    d_x_orig = back(d_x_orig, saved.x_orig)
    d_x = back(d_x, saved.x)
    d_scale = back_in_shape(d_scale, saved.scale)
    return d_x_orig, d_x, d_scale


apply = applied(Bypass)


# --------------------------------------------------------------------------- the registered operator
def fake(x_orig, x, scale):
    S = x_orig.shape
    return torch.empty((*S,), dtype=promoted(x_orig, x, scale), device=x_orig.device)


op.serve(
    bypass,
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
        deciding=("x_orig", "x", "scale"),
        differentiable=("x_orig", "x", "scale"),
        graded={"y": ""},
        saves=("x_orig", "x", "scale"),
    ),
)
operator = register_op(
    op,
    "bypass(Tensor x_orig, Tensor x, Tensor scale) -> Tensor",
    "bypass_backward(Tensor grad_y, Tensor x_orig, Tensor x, Tensor scale) -> (Tensor, Tensor, Tensor)",
)
