# SPDX-License-Identifier: Apache-2.0
# `make op OP=gated_residual_norm` writes this file from fastasr/ops/residual_norm.py: change that one.
"""LayerNorm(x + σ(update) · (act(candidate + hidden) · dropout_mask − x)) over the last dimension"""

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
    MASKS,
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
from fastasr.ops.residual_norm import gated_residual_norm as formula

op = OPS["gated_residual_norm"]
family = op.family
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}


class Arguments(NamedTuple):
    x: Tensor
    update: Tensor
    candidate: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-05
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu"
    dropout_mask: Tensor | None = None


class Saved(NamedTuple):
    x: Tensor
    update: Tensor
    candidate: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    dropout_mask: Tensor | None
    statistics: Tensor
    eps: float
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]


# --------------------------------------------------------------------------- the public function
def gated_residual_norm(
    x: Tensor,
    update: Tensor,
    candidate: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-05,
    *,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu",
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + σ(update) · (act(candidate + hidden) · dropout_mask − x)) over the last dimension.

    Args:
        x, update, candidate, hidden: (..., D), one shape; slices of a wider projection need no copy. float32, bfloat16,
            float16 or float64.
        weight, bias: (D,).
        eps: added to the variance.
        activation: "identity", "silu", "relu", "tanh" or "gelu".
        dropout_mask: x's shape, bool or floating, multiplied on the activated sum; it gets no gradient.
    Returns:
        A tensor of x's shape in the promoted dtype of the four inputs, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (dtype := x.dtype)
        and type(update) in PLAIN
        and type(candidate) in PLAIN
        and type(hidden) in PLAIN
        and type(weight) in PLAIN
        and weight.dtype in COMPUTE
        and type(bias) in PLAIN
        and (
            dropout_mask is None
            or (
                type(dropout_mask) in PLAIN and dropout_mask.dtype is dtype and not dropout_mask.requires_grad
            )
        )
        and type(eps) is float
        and (eps >= 0)
        and type(activation) is str
        and activation in ACTIVATION_CODES
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad
                or update.requires_grad
                or candidate.requires_grad
                or hidden.requires_grad
                or weight.requires_grad
                or bias.requires_grad
            ):
                return apply(
                    kernels, True, x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask
                )
            y, _ = kernels.forward(
                x, update, candidate, hidden, dropout_mask, weight, bias, eps, ACTIVATION_CODES[activation],
                False,
            )  # fmt: skip
            return y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask)
            raise
    check(x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(update) in PLAIN
        and type(candidate) in PLAIN
        and type(hidden) in PLAIN
        and type(weight) in PLAIN
        and type(bias) in PLAIN
        and (dropout_mask is None or type(dropout_mask) in PLAIN)
    ):
        return traced(x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask)
        )
    kernels = family.kernels(x, update, candidate, hidden, weight, bias)
    if kernels is None:
        return laid_out(
            op, formula(x, update, candidate, hidden, weight, bias, eps, activation=activation,
            dropout_mask=dropout_mask),
        )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or update.requires_grad
            or candidate.requires_grad
            or hidden.requires_grad
            or weight.requires_grad
            or bias.requires_grad
        ):
            return apply(
                kernels, False, x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask
            )
        y, _ = run_kernels(
            kernels, x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask, False
        )
    except Unlaunchable as error:
        family.give_up(error, x, update, candidate, hidden, weight, bias)
        return formula(
            x, update, candidate, hidden, weight, bias, eps, activation=activation, dropout_mask=dropout_mask
        )
    return y


def check(
    x: Tensor,
    update: Tensor,
    candidate: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"],
    dropout_mask: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(eps) is not float:
        op.wrong_float("eps", eps)
    if not (eps >= 0):
        op.fail("eps", "at least 0", eps)
    if not (type(activation) is str and activation in ACTIVATION_CODES):
        op.wrong_choice("activation", activation, ACTIVATION_CODES)
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
    if (
        not isinstance(candidate, Tensor)
        or candidate.dtype not in FLOATING
        or candidate.layout is not torch.strided
    ):
        op.wrong_tensor("candidate", candidate)
    if candidate.shape != (*S, C):
        op.wrong_shape("candidate", candidate, listed(*S, C))
    if candidate.device != x.device:
        op.wrong_device("candidate", candidate, "x", x)
    if not isinstance(hidden, Tensor) or hidden.dtype not in FLOATING or hidden.layout is not torch.strided:
        op.wrong_tensor("hidden", hidden)
    if hidden.shape != (*S, C):
        op.wrong_shape("hidden", hidden, listed(*S, C))
    if hidden.device != x.device:
        op.wrong_device("hidden", hidden, "x", x)
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
    if dropout_mask is not None:
        if (
            not isinstance(dropout_mask, Tensor)
            or dropout_mask.dtype not in MASKS
            or dropout_mask.layout is not torch.strided
        ):
            op.wrong_tensor("dropout_mask", dropout_mask, "a bool or floating tensor")
        if dropout_mask.requires_grad:
            op.fail("dropout_mask", "a constant", "a tensor that requires a gradient")
        if dropout_mask.shape != (*S, C):
            op.wrong_shape("dropout_mask", dropout_mask, listed(*S, C))
        if dropout_mask.device != x.device:
            op.wrong_device("dropout_mask", dropout_mask, "x", x)


def traced(x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("residual_norm", x, update, candidate, hidden, weight, bias):
        return formula(
            x, update, candidate, hidden, weight, bias, eps, activation=activation, dropout_mask=dropout_mask
        )
    y, _ = operator(
        x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask, is_grad_enabled() and
        (x.requires_grad or update.requires_grad or candidate.requires_grad or hidden.requires_grad or
        weight.requires_grad or bias.requires_grad),
    )  # fmt: skip
    return y


def run_kernels(kernels, x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask, keep):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x, update, candidate, hidden)
    statistics_dtype = wide(x, update, candidate, hidden, weight, bias)
    y, statistics = _launch(
        op, kernels, make(Arguments, (x, update, candidate, hidden, weight, bias, eps, activation,
        dropout_mask,)), y_dtype, keep,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if statistics.dtype is not statistics_dtype:
        statistics = statistics.to(statistics_dtype)
    return y, statistics


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (
        promoted(a.x, a.update, a.candidate, a.hidden),
        wide(a.x, a.update, a.candidate, a.hidden, a.weight, a.bias),
    )


# --------------------------------------------------------------------------- gradients without the dispatcher
class GatedResidualNorm(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask
    ):
        if direct:
            y, statistics = kernels.forward(
                x, update, candidate, hidden, dropout_mask, weight, bias, eps, ACTIVATION_CODES[activation],
                True,
            )  # fmt: skip
        else:
            y, statistics = run_kernels(
                kernels, x, update, candidate, hidden, weight, bias, eps, activation, dropout_mask, True
            )
        y = not_a_view(y)
        ctx.save_for_backward(x, update, candidate, hidden, weight, bias, dropout_mask, statistics)
        ctx.rest = kernels, direct, eps, activation
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("gated_residual_norm")
        # once: a checkpoint gives them one time
        x, update, candidate, hidden, weight, bias, dropout_mask, statistics = ctx.saved_tensors
        kernels, direct, eps, activation = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, d_update, d_candidate, d_weight, d_bias = kernels.backward(
                operand(grad_y, None), x, update, candidate, hidden, dropout_mask, weight, bias, statistics,
                eps, ACTIVATION_CODES[activation],
            )  # fmt: skip
            d_hidden = d_candidate
            return None, None, d_x, d_update, d_candidate, d_hidden, d_weight, d_bias, None, None, None
        d_x, d_update, d_candidate, d_hidden, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, update, candidate, hidden, weight, bias, dropout_mask,
            statistics, eps, activation,)),
        )  # fmt: skip
        return None, None, d_x, d_update, d_candidate, d_hidden, d_weight, d_bias, None, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    d_x, d_update, d_candidate, d_hidden, d_weight, d_bias = _gradients(op, kernels, grads, saved, None)
    d_x = back(d_x, saved.x)
    d_update = back(d_update, saved.update)
    d_candidate = back(d_candidate, saved.candidate)
    d_hidden = back(d_hidden, saved.hidden)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_update, d_candidate, d_hidden, d_weight, d_bias


apply = applied(GatedResidualNorm)


# --------------------------------------------------------------------------- the registered operator
def fake(
    x, update, candidate, hidden, weight, bias, eps=1e-05, activation="silu", dropout_mask=None, keep=False
):
    keep = keep and family.kernels(x, update, candidate, hidden, weight, bias) is not None
    S = x.shape[:-1]
    C = x.shape[-1]
    return torch.empty((*S, C), dtype=promoted(x, update, candidate, hidden), device=x.device), torch.empty(
        (*S, 3) if keep else (0,), dtype=wide(x, update, candidate, hidden, weight, bias), device=x.device
    )


op.serve(
    gated_residual_norm,
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
        deciding=("x", "update", "candidate", "hidden", "weight", "bias"),
        differentiable=("x", "update", "candidate", "hidden", "weight", "bias"),
        graded={"y": ""},
        saves=("x", "update", "candidate", "hidden", "weight", "bias", "dropout_mask", "statistics"),
        kept=("statistics",),
    ),
)
operator = register_op(
    op,
    "gated_residual_norm(Tensor x, Tensor update, Tensor candidate, Tensor hidden, Tensor weight, Tensor "
    'bias, float eps=1e-05, str activation="silu", Tensor? dropout_mask=None, bool keep=False) -> '
    "(Tensor, Tensor)",
    "gated_residual_norm_backward(Tensor grad_y, Tensor x, Tensor update, Tensor candidate, Tensor "
    "hidden, Tensor weight, Tensor bias, Tensor? dropout_mask, Tensor statistics, float eps, str "
    "activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
