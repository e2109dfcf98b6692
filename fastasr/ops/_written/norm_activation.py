# SPDX-License-Identifier: Apache-2.0
# `make op OP=norm_activation` writes this file from fastasr/ops/norm_activation.py: change that one.
"""The activation of LayerNorm or RMSNorm over the last dimension"""

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
from fastasr.ops.norm_activation import _gradients, _launch
from fastasr.ops.norm_activation import norm_activation as formula

op = OPS["norm_activation"]
family = op.family
KIND_CODES = {"layer": 0, "rms": 1}
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-05
    kind: Literal["layer", "rms"] = "layer"
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu"
    limit: float = 0.0


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    statistics: Tensor
    eps: float
    kind: Literal["layer", "rms"]
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]
    limit: float


# --------------------------------------------------------------------------- the public function
def norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-05,
    kind: Literal["layer", "rms"] = "layer",
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu",
    limit: float = 0.0,
) -> Tensor:
    """The activation of LayerNorm or RMSNorm over the last dimension.

    Args:
        x: (..., C); float32, bfloat16, float16 or float64.
        weight: (C,); bias: (C,) or None.
        eps: added to the variance, or to the mean of the squares.
        kind: "layer" subtracts the mean and divides by the standard deviation; "rms" divides by the root mean square.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
        limit: the norm reads x between -limit and limit, or the largest numbers of x's dtype; 0: no limit.
    Returns:
        A tensor of x's shape and dtype, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and type(weight) in PLAIN
        and weight.dtype in COMPUTE
        and (bias is None or type(bias) in PLAIN)
        and type(eps) is float
        and (eps >= 0)
        and type(kind) is str
        and kind in KIND_CODES
        and type(activation) is str
        and activation in ACTIVATION_CODES
        and type(limit) is float
        and (limit >= 0)
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return apply(kernels, True, x, weight, bias, eps, kind, activation, limit)
            y, _ = kernels.forward(
                x, weight, bias, eps, KIND_CODES[kind], ACTIVATION_CODES[activation], limit, False
            )
            return y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, weight, bias, eps, kind, activation, limit)
            raise
    check(x, weight, bias, eps, kind, activation, limit)
    if is_compiling() or not (
        type(x) in PLAIN and type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)
    ):
        return traced(x, weight, bias, eps, kind, activation, limit)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, weight, bias, eps, kind, activation, limit))
    kernels = family.kernels(x, weight, bias)
    if kernels is None:
        return laid_out(op, formula(x, weight, bias, eps=eps, kind=kind, activation=activation, limit=limit))
    try:
        if is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply(kernels, False, x, weight, bias, eps, kind, activation, limit)
        y, _ = run_kernels(kernels, x, weight, bias, eps, kind, activation, limit, False)
    except Unlaunchable as error:
        family.give_up(error, x, weight, bias)
        return formula(x, weight, bias, eps=eps, kind=kind, activation=activation, limit=limit)
    return y


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: Literal["layer", "rms"],
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"],
    limit: float,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(eps) is not float:
        op.wrong_float("eps", eps)
    if not (eps >= 0):
        op.fail("eps", "at least 0", eps)
    if not (type(kind) is str and kind in KIND_CODES):
        op.wrong_choice("kind", kind, KIND_CODES)
    if not (type(activation) is str and activation in ACTIVATION_CODES):
        op.wrong_choice("activation", activation, ACTIVATION_CODES)
    if type(limit) is not float:
        op.wrong_float("limit", limit)
    if not (limit >= 0):
        op.fail("limit", "at least 0", limit)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) >= 1:
        C = shape[-1]
        right = C >= 1
    if not right:
        op.wrong_shape("x", x, f"{listed('...', 'C')}, C >= 1")
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


def traced(x, weight, bias, eps, kind, activation, limit):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("norm_activation", x, weight, bias):
        return formula(x, weight, bias, eps=eps, kind=kind, activation=activation, limit=limit)
    y, _ = operator(
        x, weight, bias, eps, kind, activation, limit, is_grad_enabled() and (x.requires_grad or
        weight.requires_grad or (bias is not None and bias.requires_grad)),
    )  # fmt: skip
    return y


def run_kernels(kernels, x, weight, bias, eps, kind, activation, limit, keep):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    statistics_dtype = wide(x, weight, bias)
    y, statistics = _launch(
        op, kernels, make(Arguments, (x, weight, bias, eps, kind, activation, limit)), y_dtype, keep
    )
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if statistics.dtype is not statistics_dtype:
        statistics = statistics.to(statistics_dtype)
    return y, statistics


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x), wide(a.x, a.weight, a.bias))


# --------------------------------------------------------------------------- gradients without the dispatcher
class NormActivation(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias, eps, kind, activation, limit):
        if direct:
            y, statistics = kernels.forward(
                x, weight, bias, eps, KIND_CODES[kind], ACTIVATION_CODES[activation], limit, True
            )
        else:
            y, statistics = run_kernels(kernels, x, weight, bias, eps, kind, activation, limit, True)
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.rest = kernels, direct, eps, kind, activation, limit
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("norm_activation")
        # once: a checkpoint gives them one time
        x, weight, bias, statistics = ctx.saved_tensors
        kernels, direct, eps, kind, activation, limit = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, d_weight, d_bias = kernels.backward(
                operand(grad_y, None), x, weight, bias, statistics, eps, KIND_CODES[kind],
                ACTIVATION_CODES[activation], limit,
            )  # fmt: skip
            return None, None, d_x, d_weight, None if bias is None else d_bias, None, None, None, None
        d_x, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, bias, statistics, eps, kind, activation, limit))
        )
        return None, None, d_x, d_weight, d_bias, None, None, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    d_x, d_weight, d_bias = _gradients(op, kernels, grads, saved, None)
    d_x = back(d_x, saved.x)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_weight, d_bias


apply = applied(NormActivation)


# --------------------------------------------------------------------------- the registered operator
def fake(x, weight, bias=None, eps=1e-05, kind="layer", activation="silu", limit=0.0, keep=False):
    keep = keep and family.kernels(x, weight, bias) is not None
    S = x.shape[:-1]
    C = x.shape[-1]
    return torch.empty((*S, C), dtype=promoted(x), device=x.device), torch.empty(
        (*S, 3) if keep else (0,), dtype=wide(x, weight, bias), device=x.device
    )


op.serve(
    norm_activation,
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
        deciding=("x", "weight", "bias"),
        differentiable=("x", "weight", "bias"),
        graded={"y": ""},
        saves=("x", "weight", "bias", "statistics"),
        kept=("statistics",),
    ),
)
operator = register_op(
    op,
    'norm_activation(Tensor x, Tensor weight, Tensor? bias=None, float eps=1e-05, str kind="layer", str '
    'activation="silu", float limit=0.0, bool keep=False) -> (Tensor, Tensor)',
    "norm_activation_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor statistics, "
    "float eps, str kind, str activation, float limit) -> (Tensor, Tensor, Tensor)",
)
