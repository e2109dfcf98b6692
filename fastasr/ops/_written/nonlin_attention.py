# SPDX-License-Identifier: Apache-2.0
# `make op OP=nonlin_attention` writes this file from fastasr/ops/nonlin_attention.py: change that one.
"""The core of Zipformer's NonlinAttention: (W (v tanh(s))) z, with s, v, z the thirds of ``projected``"""

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
from fastasr.ops._register import autocast_dtype, refuse_double_backward
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
from fastasr.ops.nonlin_attention import _fast, _gradients, _launch
from fastasr.ops.nonlin_attention import nonlin_attention as formula

op = OPS["nonlin_attention"]
family = op.family


class Arguments(NamedTuple):
    weights: Tensor
    projected: Tensor


class Saved(NamedTuple):
    weights: Tensor
    projected: Tensor
    o: Tensor


# --------------------------------------------------------------------------- the public function
def nonlin_attention(weights: Tensor, projected: Tensor) -> Tensor:
    """The core of Zipformer's NonlinAttention: (W (v tanh(s))) z, with s, v, z the thirds of ``projected``.

    Args:
        weights: (B, T, T), any strides; float32, bfloat16, float16 or float64.
        projected: (T, B, 3 D), of the same dtype outside autocast.
    Returns:
        (T, B, D) in that dtype; x and o are rounded to it too, as in eager. Under autocast the result is eager's.
    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(projected) in PLAIN
        and projected.is_cpu
        and (dtype := projected.dtype)
        and type(weights) in PLAIN
        and weights.is_cpu
        and weights.dtype is dtype
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (weights.requires_grad or projected.requires_grad):
                return apply(kernels, True, weights, projected)
            y, _ = _fast(kernels, False, weights, projected)
            return y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(weights, projected)
            raise
    check(weights, projected)
    cast_dtype = autocast_dtype(projected)
    if cast_dtype is not None and (projected.dtype is not cast_dtype or weights.dtype is not cast_dtype):
        return formula(weights, projected)
    if is_compiling() or not (type(weights) in PLAIN and type(projected) in PLAIN):
        return traced(weights, projected)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(weights, projected))
    kernels = family.kernels(projected)
    if kernels is None:
        return laid_out(op, formula(weights, projected))
    try:
        if is_grad_enabled() and (weights.requires_grad or projected.requires_grad):
            return apply(kernels, False, weights, projected)
        y, _ = run_kernels(kernels, weights, projected, False)
    except Unlaunchable as error:
        family.give_up(error, projected)
        return formula(weights, projected)
    return y


def check(weights: Tensor, projected: Tensor) -> None:
    """Raises if the arguments do not fit the declaration."""
    if (
        not isinstance(projected, Tensor)
        or projected.dtype not in FLOATING
        or projected.layout is not torch.strided
    ):
        op.wrong_tensor("projected", projected)
    shape, right = projected.shape, False
    if len(shape) == 3:
        T = shape[0]
        B = shape[1]
        right = shape[2] % 3 == 0
    if not right:
        op.wrong_shape("projected", projected, listed("T", "B", "3*D"))
    if (
        not isinstance(weights, Tensor)
        or weights.dtype not in FLOATING
        or weights.layout is not torch.strided
    ):
        op.wrong_tensor("weights", weights)
    if weights.shape != (B, T, T):
        op.wrong_shape("weights", weights, listed(B, T, T))
    if weights.device != projected.device:
        op.wrong_device("weights", weights, "projected", projected)
    if weights.dtype is not projected.dtype and autocast_dtype(projected) is None:
        op.wrong_dtype("weights", weights, "projected", projected)


def traced(weights, projected):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("nonlin_attention", projected):
        return formula(weights, projected)
    y, _ = operator(
        weights, projected, is_grad_enabled() and (weights.requires_grad or projected.requires_grad)
    )
    return y


def run_kernels(kernels, weights, projected, keep):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(projected)
    y, o = _launch(op, kernels, make(Arguments, (weights, projected)), y_dtype, keep)
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if o.dtype is not y_dtype:
        o = o.to(y_dtype)
    return y, o


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.projected), promoted(a.projected))


# --------------------------------------------------------------------------- gradients without the dispatcher
class NonlinAttention(Function):
    @staticmethod
    def forward(ctx, kernels, direct, weights, projected):
        if direct:
            y, o = _fast(kernels, True, weights, projected)
        else:
            y, o = run_kernels(kernels, weights, projected, True)
        y = not_a_view(y)
        ctx.save_for_backward(weights, projected, o)
        ctx.rest = kernels, direct
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("nonlin_attention")
        # once: a checkpoint gives them one time
        weights, projected, o = ctx.saved_tensors
        kernels, direct = ctx.rest
        d_weights, d_projected = node_gradients(
            op, kernels, (grad_y,), make(Saved, (weights, projected, o)), ctx.needs_input_grad[2:]
        )
        return None, None, d_weights, d_projected


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    d_weights, d_projected = _gradients(op, kernels, grads, saved, needs)
    d_weights = back(d_weights, saved.weights)
    d_projected = back(d_projected, saved.projected)
    return d_weights, d_projected


apply = applied(NonlinAttention)


# --------------------------------------------------------------------------- the registered operator
def fake(weights, projected, keep=False):
    keep = keep and family.kernels(projected) is not None
    T = projected.shape[0]
    B = projected.shape[1]
    D = projected.shape[2] // 3
    return torch.empty((T, B, D), dtype=promoted(projected), device=projected.device), torch.empty(
        (B, T, D) if keep else (0,), dtype=promoted(projected), device=projected.device
    )


op.serve(
    nonlin_attention,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "o"),
        deciding=("projected",),
        differentiable=("weights", "projected"),
        graded={"y": ""},
        saves=("weights", "projected", "o"),
        kept=("o",),
        asks=True,
        autocast=(),
    ),
)
operator = register_op(
    op,
    "nonlin_attention(Tensor weights, Tensor projected, bool keep=False) -> (Tensor, Tensor)",
    "nonlin_attention_backward(Tensor grad_y, Tensor weights, Tensor projected, Tensor o, bool[] needs) "
    "-> (Tensor, Tensor)",
)
