# SPDX-License-Identifier: Apache-2.0
# `make op OP=add_norm` writes this file from fastasr/ops/add_norm.py: change that one.
"""x + scale · update, and its norm over the last dimension"""

from typing import Literal, NamedTuple

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
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    promoted,
)
from fastasr.ops.add_norm import _gradients, _launch
from fastasr.ops.add_norm import add_norm as formula

op = OPS["add_norm"]
family = op.family
KIND_CODES = {"layer": 0, "rms": 1}


class Arguments(NamedTuple):
    x: Tensor
    update: Tensor
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-05
    scale: float = 1.0
    kind: Literal["layer", "rms"] = "layer"
    update_weight: Tensor | None = None
    update_limit: float = 0.0
    limit: float = 0.0


class Saved(NamedTuple):
    x: Tensor
    update: Tensor
    weight: Tensor
    bias: Tensor | None
    update_weight: Tensor | None
    eps: float
    scale: float
    kind: Literal["layer", "rms"]
    update_limit: float
    limit: float


# --------------------------------------------------------------------------- the public function
def add_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-05,
    scale: float = 1.0,
    *,
    kind: Literal["layer", "rms"] = "layer",
    update_weight: Tensor | None = None,
    update_limit: float = 0.0,
    limit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns x + scale · update, and its norm over the last dimension.

    Args:
        x, update: (..., C), one shape. float32, bfloat16, float16 or float64.
        weight: (C,); bias: (C,) or None.
        eps: added to the variance, or to the mean of the squares.
        scale: the factor of the update.
        kind: "layer" subtracts the mean and divides by the standard deviation; "rms" divides by the root mean square.
        update_weight: (C,); the RMSNorm of the update with this weight takes the update's place.
        update_limit, limit: the norms read the update and the sum between -limit and limit, or the largest numbers of
            their dtype; 0: no limit.
    Returns:
        The sum, in the promoted dtype of x and update, and the norm of the sum as it is rounded, computed in float32 or
        better and rounded once to update's dtype. Both have x's shape.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and x.is_contiguous()
        and type(update) in PLAIN
        and type(weight) in PLAIN
        and weight.dtype in COMPUTE
        and (bias is None or type(bias) in PLAIN)
        and (update_weight is None or type(update_weight) in PLAIN)
        and type(eps) is float
        and (eps >= 0)
        and type(scale) is float
        and type(kind) is str
        and kind in KIND_CODES
        and type(update_limit) is float
        and (update_limit >= 0)
        and type(limit) is float
        and (limit >= 0)
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad
                or update.requires_grad
                or weight.requires_grad
                or (bias is not None and bias.requires_grad)
                or (update_weight is not None and update_weight.requires_grad)
            ):
                return apply(
                    kernels, True, x, update, weight, bias, eps, scale, kind, update_weight, update_limit,
                    limit,
                )  # fmt: skip
            t, y = kernels.forward(
                x, update, weight, bias, update_weight, eps, scale, KIND_CODES[kind], update_limit, limit
            )
            return t, y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit)
            raise
    check(x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(update) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (update_weight is None or type(update_weight) in PLAIN)
    ):
        return traced(x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit)
        )
    kernels = family.kernels(x, update, weight, bias, update_weight)
    if kernels is None:
        return laid_out(
            op, formula(x, update, weight, bias, eps, scale, kind=kind, update_weight=update_weight,
            update_limit=update_limit, limit=limit),
        )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or update.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (update_weight is not None and update_weight.requires_grad)
        ):
            return apply(
                kernels, False, x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit
            )
        t, y = run_kernels(
            kernels, x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit
        )
    except Unlaunchable as error:
        family.give_up(error, x, update, weight, bias, update_weight)
        return formula(
            x, update, weight, bias, eps, scale, kind=kind, update_weight=update_weight,
            update_limit=update_limit, limit=limit,
        )  # fmt: skip
    return t, y


def check(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    scale: float,
    kind: Literal["layer", "rms"],
    update_weight: Tensor | None,
    update_limit: float,
    limit: float,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(eps) is not float:
        op.wrong_float("eps", eps)
    if not (eps >= 0):
        op.fail("eps", "at least 0", eps)
    if type(scale) is not float:
        op.wrong_float("scale", scale)
    if not (type(kind) is str and kind in KIND_CODES):
        op.wrong_choice("kind", kind, KIND_CODES)
    if type(update_limit) is not float:
        op.wrong_float("update_limit", update_limit)
    if not (update_limit >= 0):
        op.fail("update_limit", "at least 0", update_limit)
    if type(limit) is not float:
        op.wrong_float("limit", limit)
    if not (limit >= 0):
        op.fail("limit", "at least 0", limit)
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
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
            op.wrong_tensor("bias", bias)
        if bias.shape != (C,):
            op.wrong_shape("bias", bias, listed(C))
        if bias.device != x.device:
            op.wrong_device("bias", bias, "x", x)
    if update_weight is not None:
        if (
            not isinstance(update_weight, Tensor)
            or update_weight.dtype not in FLOATING
            or update_weight.layout is not torch.strided
        ):
            op.wrong_tensor("update_weight", update_weight)
        if update_weight.shape != (C,):
            op.wrong_shape("update_weight", update_weight, listed(C))
        if update_weight.device != x.device:
            op.wrong_device("update_weight", update_weight, "x", x)


def traced(x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("add_norm", x, update, weight, bias, update_weight):
        return formula(
            x, update, weight, bias, eps, scale, kind=kind, update_weight=update_weight,
            update_limit=update_limit, limit=limit,
        )  # fmt: skip
    t, y = operator(x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit)
    return t, y


def run_kernels(kernels, x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    t_dtype = promoted(x, update)
    y_dtype = promoted(update)
    t, y = _launch(
        op, kernels, make(Arguments, (x, update, weight, bias, eps, scale, kind, update_weight, update_limit,
        limit,)), t_dtype, False,
    )  # fmt: skip
    if t.dtype is not t_dtype:
        t = t.to(t_dtype)
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return t, y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x, a.update), promoted(a.update))


# --------------------------------------------------------------------------- gradients without the dispatcher
class AddNorm(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit
    ):
        if direct:
            t, y = kernels.forward(
                x, update, weight, bias, update_weight, eps, scale, KIND_CODES[kind], update_limit, limit
            )
        else:
            t, y = run_kernels(
                kernels, x, update, weight, bias, eps, scale, kind, update_weight, update_limit, limit
            )
        t = not_a_view(t)
        y = not_a_view(y)
        ctx.save_for_backward(x, update, weight, bias, update_weight)
        ctx.rest = kernels, direct, eps, scale, kind, update_limit, limit
        ctx.set_materialize_grads(False)
        return t, y

    @staticmethod
    def backward(ctx, grad_t, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("add_norm")
        # once: a checkpoint gives them one time
        x, update, weight, bias, update_weight = ctx.saved_tensors
        kernels, direct, eps, scale, kind, update_limit, limit = ctx.rest
        if grad_t is None and grad_y is None:
            return (None,) * 12
        d_x, d_update, d_weight, d_bias, d_update_weight = node_gradients(
            op, kernels, (grad_t, grad_y,), make(Saved, (x, update, weight, bias, update_weight, eps, scale,
            kind, update_limit, limit,)), ctx.needs_input_grad[2:],
        )  # fmt: skip
        return None, None, d_x, d_update, d_weight, d_bias, None, None, None, d_update_weight, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    d_x, d_update, d_weight, d_bias, d_update_weight = _gradients(op, kernels, grads, saved, needs)
    d_x = back(d_x, saved.x)
    d_update = back(d_update, saved.update)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    d_update_weight = back(d_update_weight, saved.update_weight)
    return d_x, d_update, d_weight, d_bias, d_update_weight


apply = applied(AddNorm)


# --------------------------------------------------------------------------- the registered operator
def fake(
    x, update, weight, bias=None, eps=1e-05, scale=1.0, kind='layer', update_weight=None, update_limit=0.0,
    limit=0.0,
):  # fmt: skip
    S = x.shape[:-1]
    C = x.shape[-1]
    return torch.empty((*S, C), dtype=promoted(x, update), device=x.device), torch.empty(
        (*S, C), dtype=promoted(update), device=x.device
    )


op.serve(
    add_norm,
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
        deciding=("x", "update", "weight", "bias", "update_weight"),
        differentiable=("x", "update", "weight", "bias", "update_weight"),
        graded={"t": "", "y": ""},
        saves=("x", "update", "weight", "bias", "update_weight"),
        materialize=False,
        asks=True,
    ),
)
operator = register_op(
    op,
    "add_norm(Tensor x, Tensor update, Tensor weight, Tensor? bias=None, float eps=1e-05, float "
    'scale=1.0, str kind="layer", Tensor? update_weight=None, float update_limit=0.0, float limit=0.0) -> '
    "(Tensor, Tensor)",
    "add_norm_backward(Tensor? grad_t, Tensor? grad_y, Tensor x, Tensor update, Tensor weight, Tensor? "
    "bias, Tensor? update_weight, float eps, float scale, str kind, float update_limit, float limit, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
