# SPDX-License-Identifier: Apache-2.0
# `make op OP=linear_activation` writes this file from fastasr/ops/linear_activation.py: change that one.
"""A linear layer and its activation: act(x weightᵀ + bias), or gated a · act(g) for (a, g) = x weightᵀ + bias"""

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
from fastasr.ops.linear_activation import _check, _fast, _gradients, _launch
from fastasr.ops.linear_activation import linear_activation as formula

op = OPS["linear_activation"]
family = op.family
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu"
    gated: bool = False
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dropout_seed: Tensor | None
    z: Tensor
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]
    gated: bool
    dropout_p: float


# --------------------------------------------------------------------------- the public function
def linear_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu",
    gated: bool = False,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """A linear layer and its activation: act(x weightᵀ + bias), or gated a · act(g) for (a, g) = x weightᵀ + bias.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); bias: (N,) or None; x's dtype, except under autocast, which casts all three.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
        gated: the second half of the product is the activation's argument, whose value multiplies the first half.
        dropout_p: the share of the result that is set to 0; the rest is divided by 1 − dropout_p.
        dropout_seed: int64 (1,), which chooses these elements; needed where dropout_p is more than 0. One seed and
            shape give the same elements on every backend.
    Returns:
        (..., N), or (..., N / 2) if gated.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; activation is not one of these; N is odd and gated is set; dropout_p
            is out of range, or has no seed.
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
        and (dropout_seed is None or (type(dropout_seed) in PLAIN and dropout_seed.is_cpu))
        and type(activation) is str
        and activation in ACTIVATION_CODES
        and type(gated) is bool
        and type(dropout_p) is float
        and (dropout_p >= 0 and dropout_p < 1)
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return apply(kernels, True, x, weight, bias, activation, gated, dropout_p, dropout_seed)
            y, _ = _fast(kernels, False, x, weight, bias, activation, gated, dropout_p, dropout_seed)
            return y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, weight, bias, activation, gated, dropout_p, dropout_seed)
            raise
    check(x, weight, bias, activation, gated, dropout_p, dropout_seed)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (dropout_seed is None or type(dropout_seed) in PLAIN)
    ):
        return traced(x, weight, bias, activation, gated, dropout_p, dropout_seed)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(x, weight, bias, activation, gated, dropout_p, dropout_seed))
    kernels = family.kernels(x)
    if kernels is None:
        return laid_out(
            op, formula(x, weight, bias, activation, gated, dropout_p=dropout_p, dropout_seed=dropout_seed)
        )
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        x, weight, bias = cast(cast_dtype, x, weight, bias)
        kernels = family.kernels(x)
        if kernels is None:
            return formula(x, weight, bias, activation, gated, dropout_p=dropout_p, dropout_seed=dropout_seed)
    try:
        if is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return apply(kernels, False, x, weight, bias, activation, gated, dropout_p, dropout_seed)
        y, _ = run_kernels(kernels, x, weight, bias, activation, gated, dropout_p, dropout_seed, False)
    except Unlaunchable as error:
        family.give_up(error, x)
        return formula(x, weight, bias, activation, gated, dropout_p=dropout_p, dropout_seed=dropout_seed)
    return y


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"],
    gated: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not (type(activation) is str and activation in ACTIVATION_CODES):
        op.wrong_choice("activation", activation, ACTIVATION_CODES)
    if type(gated) is not bool:
        op.wrong_flag("gated", gated)
    if type(dropout_p) is not float:
        op.wrong_float("dropout_p", dropout_p)
    if not (dropout_p >= 0 and dropout_p < 1):
        op.fail("dropout_p", "at least 0 and less than 1", dropout_p)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) >= 1:
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
    if dropout_seed is not None:
        if (
            not isinstance(dropout_seed, Tensor)
            or dropout_seed.dtype not in INT64
            or dropout_seed.layout is not torch.strided
        ):
            op.wrong_tensor("dropout_seed", dropout_seed, "an int64 tensor")
        if dropout_seed.shape != (1,):
            op.wrong_shape("dropout_seed", dropout_seed, listed(1))
        if dropout_seed.device != x.device:
            op.wrong_device("dropout_seed", dropout_seed, "x", x)
    if weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("weight", weight, "x", x)
    if bias is not None and bias.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("bias", bias, "x", x)
    _check(op, make(Arguments, (x, weight, bias, activation, gated, dropout_p, dropout_seed)))


def traced(x, weight, bias, activation, gated, dropout_p, dropout_seed):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("linear_activation", x):
        return formula(x, weight, bias, activation, gated, dropout_p=dropout_p, dropout_seed=dropout_seed)
    y, _ = operator(
        x, weight, bias, activation, gated, dropout_p, dropout_seed, is_grad_enabled() and (x.requires_grad or
        weight.requires_grad or (bias is not None and bias.requires_grad)),
    )  # fmt: skip
    return y


def run_kernels(kernels, x, weight, bias, activation, gated, dropout_p, dropout_seed, keep):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    y, z = _launch(
        op, kernels, make(Arguments, (x, weight, bias, activation, gated, dropout_p, dropout_seed,)), y_dtype,
        keep,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if z.dtype is not y_dtype:
        z = z.to(y_dtype)
    return y, z


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x), promoted(a.x))


# --------------------------------------------------------------------------- gradients without the dispatcher
class LinearActivation(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, weight, bias, activation, gated, dropout_p, dropout_seed):
        if direct:
            y, z = _fast(kernels, True, x, weight, bias, activation, gated, dropout_p, dropout_seed)
        else:
            y, z = run_kernels(kernels, x, weight, bias, activation, gated, dropout_p, dropout_seed, True)
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, bias, dropout_seed, z)
        ctx.rest = kernels, direct, activation, gated, dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("linear_activation")
        # once: a checkpoint gives them one time
        x, weight, bias, dropout_seed, z = ctx.saved_tensors
        kernels, direct, activation, gated, dropout_p = ctx.rest
        d_x, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, bias, dropout_seed, z, activation, gated,
            dropout_p,)), ctx.needs_input_grad[2:],
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


apply = applied(LinearActivation)


# --------------------------------------------------------------------------- the registered operator
def fake(x, weight, bias=None, activation="silu", gated=False, dropout_p=0.0, dropout_seed=None, keep=False):
    keep = keep and family.kernels(x) is not None
    S = x.shape[:-1]
    N = weight.shape[0]
    return torch.empty((*S, N // (1 + gated)), dtype=promoted(x), device=x.device), torch.empty(
        (*S, N) if keep else (0,), dtype=promoted(x), device=x.device
    )


op.serve(
    linear_activation,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "z"),
        deciding=("x",),
        differentiable=("x", "weight", "bias"),
        graded={"y": ""},
        saves=("x", "weight", "bias", "dropout_seed", "z"),
        kept=("z",),
        asks=True,
        autocast=("x", "weight", "bias"),
    ),
)
operator = register_op(
    op,
    'linear_activation(Tensor x, Tensor weight, Tensor? bias=None, str activation="silu", bool '
    "gated=False, float dropout_p=0.0, Tensor? dropout_seed=None, bool keep=False) -> (Tensor, Tensor)",
    "linear_activation_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? "
    "dropout_seed, Tensor z, str activation, bool gated, float dropout_p, bool[] needs) -> (Tensor, "
    "Tensor, Tensor)",
)
