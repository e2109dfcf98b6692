# SPDX-License-Identifier: Apache-2.0
# `make op OP=batch_norm_activation` writes this file from fastasr/ops/batch_norm_activation.py: change that one.
"""The activation of BatchNorm over all dimensions but the last, by the statistics of x itself"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, promote_types
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served, widest
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import refuse_double_backward
from fastasr.ops._runtime import (
    BOOL,
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
from fastasr.ops.batch_norm_activation import batch_norm_activation as formula

op = OPS["batch_norm_activation"]
family = op.family
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    padding_mask: Tensor | None = None
    eps: float = 1e-05
    momentum: float = 0.1
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu"


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    padding_mask: Tensor | None
    statistics: Tensor
    eps: float
    momentum: float
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]


# --------------------------------------------------------------------------- the public function
def batch_norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    padding_mask: Tensor | None = None,
    eps: float = 1e-05,
    momentum: float = 0.1,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The activation of BatchNorm over all dimensions but the last, by the statistics of x itself.

    Args:
        x: (..., C); float32, bfloat16, float16 or float64.
        weight, bias: (C,).
        padding_mask: x's shape without C, bool; True: the frame has no part in the statistics.
        eps: added to the variance.
        momentum: how far running statistics move towards those of x.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
    Returns:
        y in x's shape and dtype, computed in float32 or better and rounded once, 0 at padding; and constants (C,) in
        float32, or float64 if x is: the mean, the unbiased variance, which is 0 where one frame or none counts, and
        the rate: ``momentum``, or 0 where no frame counts. ``running.lerp_(found, rate)`` moves running statistics as
        torch does, and nothing waits for the device.
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
        and type(weight) in PLAIN
        and weight.dtype in COMPUTE
        and type(bias) in PLAIN
        and (padding_mask is None or type(padding_mask) in PLAIN)
        and type(eps) is float
        and (eps >= 0)
        and type(momentum) is float
        and type(activation) is str
        and activation in ACTIVATION_CODES
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
                return apply(kernels, True, x, weight, bias, padding_mask, eps, momentum, activation)
            y, mean, variance, rate, _ = kernels.forward(
                x, weight, bias, padding_mask, eps, momentum, ACTIVATION_CODES[activation]
            )
            return y, mean, variance, rate
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, weight, bias, padding_mask, eps, momentum, activation)
            raise
    check(x, weight, bias, padding_mask, eps, momentum, activation)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and type(bias) in PLAIN
        and (padding_mask is None or type(padding_mask) in PLAIN)
    ):
        return traced(x, weight, bias, padding_mask, eps, momentum, activation)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, weight, bias, padding_mask, eps, momentum, activation))
    kernels = family.kernels(x, weight, bias)
    if kernels is None:
        return laid_out(
            op, formula(x, weight, bias, padding_mask=padding_mask, eps=eps, momentum=momentum,
            activation=activation),
        )  # fmt: skip
    try:
        if is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
            return apply(kernels, False, x, weight, bias, padding_mask, eps, momentum, activation)
        y, mean, variance, rate, _ = run_kernels(
            kernels, x, weight, bias, padding_mask, eps, momentum, activation, False
        )
    except Unlaunchable as error:
        family.give_up(error, x, weight, bias)
        return formula(
            x, weight, bias, padding_mask=padding_mask, eps=eps, momentum=momentum, activation=activation
        )
    return y, mean, variance, rate


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    eps: float,
    momentum: float,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"],
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(eps) is not float:
        op.wrong_float("eps", eps)
    if not (eps >= 0):
        op.fail("eps", "at least 0", eps)
    if type(momentum) is not float:
        op.wrong_float("momentum", momentum)
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
    if padding_mask is not None:
        if (
            not isinstance(padding_mask, Tensor)
            or padding_mask.dtype not in BOOL
            or padding_mask.layout is not torch.strided
        ):
            op.wrong_tensor("padding_mask", padding_mask, "a bool tensor")
        if padding_mask.shape != (*S,):
            op.wrong_shape("padding_mask", padding_mask, listed(*S))
        if padding_mask.device != x.device:
            op.wrong_device("padding_mask", padding_mask, "x", x)


def traced(x, weight, bias, padding_mask, eps, momentum, activation):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("batch_norm_activation", x, weight, bias):
        return formula(
            x, weight, bias, padding_mask=padding_mask, eps=eps, momentum=momentum, activation=activation
        )
    y, mean, variance, rate, _ = operator(
        x, weight, bias, padding_mask, eps, momentum, activation, is_grad_enabled() and (x.requires_grad or
        weight.requires_grad or bias.requires_grad),
    )  # fmt: skip
    return y, mean, variance, rate


def run_kernels(kernels, x, weight, bias, padding_mask, eps, momentum, activation, keep):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    mean_dtype = wide(x)
    statistics_dtype = wide(x, weight, bias)
    dtype = widest(x, (weight, bias))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    y, mean, variance, rate, statistics = kernels.forward(
        operand(x, dtype), operand(weight, work), operand(bias, work), operand(padding_mask, None), eps,
        momentum, ACTIVATION_CODES[activation],
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if mean.dtype is not mean_dtype:
        mean = mean.to(mean_dtype)
    if variance.dtype is not mean_dtype:
        variance = variance.to(mean_dtype)
    if rate.dtype is not mean_dtype:
        rate = rate.to(mean_dtype)
    if statistics.dtype is not statistics_dtype:
        statistics = statistics.to(statistics_dtype)
    return y, mean, variance, rate, statistics


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x), wide(a.x), wide(a.x), wide(a.x), wide(a.x, a.weight, a.bias))


# --------------------------------------------------------------------------- gradients without the dispatcher
class BatchNormActivation(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias, padding_mask, eps, momentum, activation):
        if direct:
            y, mean, variance, rate, statistics = kernels.forward(
                x, weight, bias, padding_mask, eps, momentum, ACTIVATION_CODES[activation]
            )
        else:
            y, mean, variance, rate, statistics = run_kernels(
                kernels, x, weight, bias, padding_mask, eps, momentum, activation, True
            )
        y = not_a_view(y)
        mean = not_a_view(mean)
        variance = not_a_view(variance)
        rate = not_a_view(rate)
        ctx.save_for_backward(x, weight, bias, padding_mask, statistics)
        ctx.rest = kernels, direct, eps, momentum, activation
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, variance, rate)
        return y, mean, variance, rate

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("batch_norm_activation")
        # once: a checkpoint gives them one time
        x, weight, bias, padding_mask, statistics = ctx.saved_tensors
        kernels, direct, eps, momentum, activation = ctx.rest
        if grad_y is None:
            return (None,) * 9
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, d_weight, d_bias = kernels.backward(
                operand(grad_y, None), x, weight, bias, padding_mask, statistics, ACTIVATION_CODES[activation]
            )
            return None, None, d_x, d_weight, d_bias, None, None, None, None
        d_x, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, bias, padding_mask, statistics, eps, momentum,
            activation,)),
        )  # fmt: skip
        return None, None, d_x, d_weight, d_bias, None, None, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_y,) = grads
    dtype = widest(saved.x, (saved.weight, saved.bias))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    d_x, d_weight, d_bias = kernels.backward(
        operand(grad_y, dtype), operand(saved.x, dtype), operand(saved.weight, work), operand(saved.bias,
        work), operand(saved.padding_mask, None), saved.statistics, ACTIVATION_CODES[saved.activation],
    )  # fmt: skip
    d_x = back(d_x, saved.x)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_weight, d_bias


apply = applied(BatchNormActivation)


# --------------------------------------------------------------------------- the registered operator
def fake(x, weight, bias, padding_mask=None, eps=1e-05, momentum=0.1, activation="silu", keep=False):
    keep = keep and family.kernels(x, weight, bias) is not None
    S = x.shape[:-1]
    C = x.shape[-1]
    return (
        torch.empty((*S, C), dtype=promoted(x), device=x.device),
        torch.empty((C,), dtype=wide(x), device=x.device),
        torch.empty((C,), dtype=wide(x), device=x.device),
        torch.empty((C,), dtype=wide(x), device=x.device),
        torch.empty((4, C) if keep else (0,), dtype=wide(x, weight, bias), device=x.device),
    )


op.serve(
    batch_norm_activation,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "mean", "variance", "rate", "statistics"),
        deciding=("x", "weight", "bias"),
        differentiable=("x", "weight", "bias"),
        graded={"y": ""},
        saves=("x", "weight", "bias", "padding_mask", "statistics"),
        kept=("statistics",),
        materialize=False,
    ),
)
operator = register_op(
    op,
    "batch_norm_activation(Tensor x, Tensor weight, Tensor bias, Tensor? padding_mask=None, float "
    'eps=1e-05, float momentum=0.1, str activation="silu", bool keep=False) -> (Tensor, Tensor, Tensor, '
    "Tensor, Tensor)",
    "batch_norm_activation_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor? "
    "padding_mask, Tensor statistics, float eps, float momentum, str activation) -> (Tensor, Tensor, "
    "Tensor)",
)
