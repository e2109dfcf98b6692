# SPDX-License-Identifier: Apache-2.0
# `make op OP=swoosh_r` writes this file from fastasr/ops/swoosh.py: change that one.
"""SwooshR(x) = log(1 + e^(x-1)) − 0.08 x − 0.313261687, elementwise"""

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
    is_batched,
    laid_out,
    make,
    node_gradients,
    not_a_view,
    operand,
    promoted,
)
from fastasr.ops.swoosh import _gradients, _launch
from fastasr.ops.swoosh import swoosh_r as formula

op = OPS["swoosh_r"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor


class Saved(NamedTuple):
    x: Tensor


# --------------------------------------------------------------------------- the public function
def swoosh_r(x: Tensor) -> Tensor:
    """SwooshR(x) = log(1 + e^(x-1)) − 0.08 x − 0.313261687, elementwise. See :func:`swoosh_l`."""
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and x.is_contiguous()
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (x.requires_grad):
                return apply(kernels, True, x)
            return kernels.forward(x, True, None, -1, None)
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x)
            raise
    check(x)
    if is_compiling() or type(x) not in PLAIN:
        return traced(x)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x))
    kernels = family.kernels(x)
    if kernels is None:
        return laid_out(op, formula(x))
    try:
        if is_grad_enabled() and (x.requires_grad):
            return apply(kernels, False, x)
        y = run_kernels(kernels, x)
    except Unlaunchable as error:
        family.give_up(error, x)
        return formula(x)
    return y


def check(x: Tensor) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)


def traced(x):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("swoosh", x):
        return formula(x)
    return operator(x)


def run_kernels(kernels, x):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    y = _launch(op, kernels, make(Arguments, (x,)), y_dtype, False)
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class SwooshR(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x):
        y = kernels.forward(x, True, None, -1, None) if direct else run_kernels(kernels, x)
        y = not_a_view(y)
        ctx.save_for_backward(x)
        ctx.rest = kernels, direct
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("swoosh_r")
        # once: a checkpoint gives them one time
        (x,) = ctx.saved_tensors
        kernels, direct = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, _ = kernels.backward(operand(grad_y, None), x, True, None, -1, None, False)
            return None, None, d_x
        (d_x,) = node_gradients(op, kernels, (grad_y,), make(Saved, (x,)))
        return None, None, d_x


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (d_x,) = _gradients(op, kernels, grads, saved, None)
    d_x = back(d_x, saved.x)
    return (d_x,)


apply = applied(SwooshR)


# --------------------------------------------------------------------------- the registered operator
def fake(x):
    return torch.empty_like(x, dtype=promoted(x))


op.serve(
    swoosh_r,
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
        strided=("y",),
        differentiable=("x",),
        graded={"y": ""},
        saves=("x",),
        dense=False,
    ),
)
operator = register_op(
    op, "swoosh_r(Tensor x) -> Tensor", "swoosh_r_backward(Tensor grad_y, Tensor x) -> Tensor"
)
