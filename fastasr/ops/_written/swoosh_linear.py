# SPDX-License-Identifier: Apache-2.0
# `make op OP=swoosh_linear` writes this file from fastasr/ops/swoosh_linear.py: change that one.
"""Swoosh, dropout with a shared mask, and a linear layer, saving only x: (swoosh(x) ⊙ mask) weightᵀ + bias"""

from typing import Literal, NamedTuple

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
    INT64,
    MASKS,
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
from fastasr.ops.swoosh_linear import _fast, _gradients, _launch
from fastasr.ops.swoosh_linear import swoosh_linear as formula

op = OPS["swoosh_linear"]
family = op.family
KIND_CODES = {"SwooshL": False, "SwooshR": True}


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    kind: Literal["SwooshL", "SwooshR"] = "SwooshL"
    mask: Tensor | None = None
    mask_row: Tensor | None = None
    shared_dim: int = -1


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    mask_row: Tensor | None
    kind: Literal["SwooshL", "SwooshR"]
    shared_dim: int


# --------------------------------------------------------------------------- the public function
def swoosh_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: Literal["SwooshL", "SwooshR"] = "SwooshL",
    mask: Tensor | None = None,
    mask_row: Tensor | None = None,
    shared_dim: int = -1,
) -> Tensor:
    """Swoosh, dropout with a shared mask, and a linear layer, saving only x: (swoosh(x) ⊙ mask) weightᵀ + bias.

    The mask is given; its size along ``shared_dim`` is 1. With ``mask_row`` it is (R, K), and the rows of x (..., K)
    name their rows of it.
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
        and (
            mask is None
            or (type(mask) in PLAIN and mask.is_cpu and mask.dtype is dtype and not mask.requires_grad)
        )
        and (mask_row is None or (type(mask_row) in PLAIN and mask_row.is_cpu))
        and type(kind) is str
        and kind in KIND_CODES
        and type(shared_dim) is int
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return apply(kernels, True, x, weight, bias, kind, mask, mask_row, shared_dim)
            return _fast(kernels, False, x, weight, bias, kind, mask, mask_row, shared_dim)
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, weight, bias, kind, mask, mask_row, shared_dim)
            raise
    check(x, weight, bias, kind, mask, mask_row, shared_dim)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (mask is None or type(mask) in PLAIN)
        and (mask_row is None or type(mask_row) in PLAIN)
    ):
        return traced(x, weight, bias, kind, mask, mask_row, shared_dim)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, weight, bias, kind, mask, mask_row, shared_dim))
    kernels = family.kernels(x)
    if kernels is None:
        return laid_out(op, formula(x, weight, bias, kind, mask, mask_row, shared_dim))
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        weight, bias = cast(cast_dtype, weight, bias)
        kernels = family.kernels(x)
        if kernels is None:
            return formula(x, weight, bias, kind, mask, mask_row, shared_dim)
    try:
        if is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply(kernels, False, x, weight, bias, kind, mask, mask_row, shared_dim)
        y = run_kernels(kernels, x, weight, bias, kind, mask, mask_row, shared_dim)
    except Unlaunchable as error:
        family.give_up(error, x)
        return formula(x, weight, bias, kind, mask, mask_row, shared_dim)
    return y


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: Literal["SwooshL", "SwooshR"],
    mask: Tensor | None,
    mask_row: Tensor | None,
    shared_dim: int,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not (type(kind) is str and kind in KIND_CODES):
        op.wrong_choice("kind", kind, KIND_CODES)
    if type(shared_dim) is not int:
        op.wrong_int("shared_dim", shared_dim)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) >= 1:
        S = shape[:-1]
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
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype not in MASKS or mask.layout is not torch.strided:
            op.wrong_tensor("mask", mask, "a bool or floating tensor")
        if mask.requires_grad:
            op.fail("mask", "a constant", "a tensor that requires a gradient")
        if mask.device != x.device:
            op.wrong_device("mask", mask, "x", x)
    if mask_row is not None:
        if (
            not isinstance(mask_row, Tensor)
            or mask_row.dtype not in INT64
            or mask_row.layout is not torch.strided
        ):
            op.wrong_tensor("mask_row", mask_row, "an int64 tensor")
        if mask_row.shape != (*S,):
            op.wrong_shape("mask_row", mask_row, listed(*S))
        if mask_row.device != x.device:
            op.wrong_device("mask_row", mask_row, "x", x)
    if weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("weight", weight, "x", x)
    if bias is not None and bias.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("bias", bias, "x", x)


def traced(x, weight, bias, kind, mask, mask_row, shared_dim):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("swoosh", x):
        return formula(x, weight, bias, kind, mask, mask_row, shared_dim)
    return operator(x, weight, bias, kind, mask, mask_row, shared_dim)


def run_kernels(kernels, x, weight, bias, kind, mask, mask_row, shared_dim):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(weight)
    y = _launch(
        op, kernels, make(Arguments, (x, weight, bias, kind, mask, mask_row, shared_dim)), y_dtype, False
    )
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.weight),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class SwooshLinear(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias, kind, mask, mask_row, shared_dim):
        if direct:
            y = _fast(kernels, True, x, weight, bias, kind, mask, mask_row, shared_dim)
        else:
            y = run_kernels(kernels, x, weight, bias, kind, mask, mask_row, shared_dim)
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, bias, mask, mask_row)
        ctx.rest = kernels, direct, kind, shared_dim
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("swoosh_linear")
        # once: a checkpoint gives them one time
        x, weight, bias, mask, mask_row = ctx.saved_tensors
        kernels, direct, kind, shared_dim = ctx.rest
        d_x, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, bias, mask, mask_row, kind, shared_dim,)),
            ctx.needs_input_grad[2:],
        )  # fmt: skip
        return None, None, d_x, d_weight, d_bias, None, None, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    d_x, d_weight, d_bias = _gradients(op, kernels, grads, saved, needs)
    d_x = back(d_x, saved.x)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_weight, d_bias


apply = applied(SwooshLinear)


# --------------------------------------------------------------------------- the registered operator
def fake(x, weight, bias=None, kind="SwooshL", mask=None, mask_row=None, shared_dim=-1):
    S = x.shape[:-1]
    N = weight.shape[0]
    return torch.empty((*S, N), dtype=promoted(weight), device=x.device)


op.serve(
    swoosh_linear,
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
        saves=("x", "weight", "bias", "mask", "mask_row"),
        asks=True,
        autocast=("weight", "bias"),
    ),
)
operator = register_op(
    op,
    'swoosh_linear(Tensor x, Tensor weight, Tensor? bias=None, str kind="SwooshL", Tensor? mask=None, '
    "Tensor? mask_row=None, SymInt shared_dim=-1) -> Tensor",
    "swoosh_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? "
    "mask_row, str kind, SymInt shared_dim, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
