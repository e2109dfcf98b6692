# SPDX-License-Identifier: Apache-2.0
# `make op OP=clamped_linear` writes this file from fastasr/ops/clamped_linear.py: change that one.
"""A linear layer without a bias, clamped twice, and its activation: clamp(act(clamp(clamp(x) weightᵀ)))"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward
from fastasr.ops._runtime import applied, back, laid_out, listed, make, node_gradients, not_a_view, promoted
from fastasr.ops.clamped_linear import _gradients, _launch
from fastasr.ops.clamped_linear import clamped_linear as formula

op = OPS["clamped_linear"]
family = op.family
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity"
    input_min: Tensor | None = None
    input_max: Tensor | None = None
    output_min: Tensor | None = None
    output_max: Tensor | None = None
    next_min: Tensor | None = None
    next_max: Tensor | None = None


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    input_min: Tensor | None
    input_max: Tensor | None
    output_min: Tensor | None
    output_max: Tensor | None
    next_min: Tensor | None
    next_max: Tensor | None
    z: Tensor
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]


# --------------------------------------------------------------------------- the public function
def clamped_linear(
    x: Tensor,
    weight: Tensor,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity",
    *,
    input_min: Tensor | None = None,
    input_max: Tensor | None = None,
    output_min: Tensor | None = None,
    output_max: Tensor | None = None,
    next_min: Tensor | None = None,
    next_max: Tensor | None = None,
) -> Tensor:
    """A linear layer without a bias, clamped twice, and its activation: clamp(act(clamp(clamp(x) weightᵀ))).

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); x's dtype, except under autocast, which casts both.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
        input_min, input_max: the bounds of x, tensors without dimensions on its device, read there in x's dtype, or
            None.
        output_min, output_max: the bounds of the product.
        next_min, next_max: the bounds of the activation.
    Returns:
        (..., N).
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; activation is not one of these.
    """
    check(x, weight, activation, input_min, input_max, output_min, output_max, next_min, next_max)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and (input_min is None or type(input_min) in PLAIN)
        and (input_max is None or type(input_max) in PLAIN)
        and (output_min is None or type(output_min) in PLAIN)
        and (output_max is None or type(output_max) in PLAIN)
        and (next_min is None or type(next_min) in PLAIN)
        and (next_max is None or type(next_max) in PLAIN)
    ):
        return traced(x, weight, activation, input_min, input_max, output_min, output_max, next_min, next_max)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, weight, activation, input_min, input_max, output_min, output_max, next_min,
            next_max),
        )  # fmt: skip
    kernels = family.kernels(x, input_min, input_max, output_min, output_max, next_min, next_max)
    if kernels is None:
        return laid_out(
            op, formula(x, weight, activation, input_min=input_min, input_max=input_max,
            output_min=output_min, output_max=output_max, next_min=next_min, next_max=next_max),
        )  # fmt: skip
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        x, weight = cast(cast_dtype, x, weight)
        kernels = family.kernels(x, input_min, input_max, output_min, output_max, next_min, next_max)
        if kernels is None:
            return formula(
                x, weight, activation, input_min=input_min, input_max=input_max, output_min=output_min,
                output_max=output_max, next_min=next_min, next_max=next_max,
            )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or weight.requires_grad
            or (input_min is not None and input_min.requires_grad)
            or (input_max is not None and input_max.requires_grad)
            or (output_min is not None and output_min.requires_grad)
            or (output_max is not None and output_max.requires_grad)
            or (next_min is not None and next_min.requires_grad)
            or (next_max is not None and next_max.requires_grad)
        ):
            return apply(
                kernels, False, x, weight, activation, input_min, input_max, output_min, output_max, next_min,
                next_max,
            )  # fmt: skip
        y, _ = run_kernels(
            kernels, x, weight, activation, input_min, input_max, output_min, output_max, next_min, next_max,
            False,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, x, input_min, input_max, output_min, output_max, next_min, next_max)
        return formula(
            x, weight, activation, input_min=input_min, input_max=input_max, output_min=output_min,
            output_max=output_max, next_min=next_min, next_max=next_max,
        )  # fmt: skip
    return y


def check(
    x: Tensor,
    weight: Tensor,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"],
    input_min: Tensor | None,
    input_max: Tensor | None,
    output_min: Tensor | None,
    output_max: Tensor | None,
    next_min: Tensor | None,
    next_max: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if not (type(activation) is str and activation in ACTIVATION_CODES):
        op.wrong_choice("activation", activation, ACTIVATION_CODES)
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
        right = shape[1] == K
    if not right:
        op.wrong_shape("weight", weight, listed("N", K))
    if weight.device != x.device:
        op.wrong_device("weight", weight, "x", x)
    if input_min is not None:
        if (
            not isinstance(input_min, Tensor)
            or input_min.dtype not in FLOATING
            or input_min.layout is not torch.strided
        ):
            op.wrong_tensor("input_min", input_min)
        if input_min.shape != ():
            op.wrong_shape("input_min", input_min, listed())
        if input_min.device != x.device:
            op.wrong_device("input_min", input_min, "x", x)
    if input_max is not None:
        if (
            not isinstance(input_max, Tensor)
            or input_max.dtype not in FLOATING
            or input_max.layout is not torch.strided
        ):
            op.wrong_tensor("input_max", input_max)
        if input_max.shape != ():
            op.wrong_shape("input_max", input_max, f"{listed()} (that of input_min)")
        if input_max.device != x.device:
            op.wrong_device("input_max", input_max, "x", x)
    if output_min is not None:
        if (
            not isinstance(output_min, Tensor)
            or output_min.dtype not in FLOATING
            or output_min.layout is not torch.strided
        ):
            op.wrong_tensor("output_min", output_min)
        if output_min.shape != ():
            op.wrong_shape("output_min", output_min, f"{listed()} (that of input_min)")
        if output_min.device != x.device:
            op.wrong_device("output_min", output_min, "x", x)
    if output_max is not None:
        if (
            not isinstance(output_max, Tensor)
            or output_max.dtype not in FLOATING
            or output_max.layout is not torch.strided
        ):
            op.wrong_tensor("output_max", output_max)
        if output_max.shape != ():
            op.wrong_shape("output_max", output_max, f"{listed()} (that of input_min)")
        if output_max.device != x.device:
            op.wrong_device("output_max", output_max, "x", x)
    if next_min is not None:
        if (
            not isinstance(next_min, Tensor)
            or next_min.dtype not in FLOATING
            or next_min.layout is not torch.strided
        ):
            op.wrong_tensor("next_min", next_min)
        if next_min.shape != ():
            op.wrong_shape("next_min", next_min, f"{listed()} (that of input_min)")
        if next_min.device != x.device:
            op.wrong_device("next_min", next_min, "x", x)
    if next_max is not None:
        if (
            not isinstance(next_max, Tensor)
            or next_max.dtype not in FLOATING
            or next_max.layout is not torch.strided
        ):
            op.wrong_tensor("next_max", next_max)
        if next_max.shape != ():
            op.wrong_shape("next_max", next_max, f"{listed()} (that of input_min)")
        if next_max.device != x.device:
            op.wrong_device("next_max", next_max, "x", x)
    if weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("weight", weight, "x", x)


def traced(x, weight, activation, input_min, input_max, output_min, output_max, next_min, next_max):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("clamped_linear", x, input_min, input_max, output_min, output_max, next_min, next_max):
        return formula(
            x, weight, activation, input_min=input_min, input_max=input_max, output_min=output_min,
            output_max=output_max, next_min=next_min, next_max=next_max,
        )  # fmt: skip
    y, _ = operator(
        x, weight, activation, input_min, input_max, output_min, output_max, next_min, next_max,
        is_grad_enabled() and (x.requires_grad or weight.requires_grad or (input_min is not None and
        input_min.requires_grad) or (input_max is not None and input_max.requires_grad) or (output_min is not None
        and output_min.requires_grad) or (output_max is not None and output_max.requires_grad) or (next_min is not
        None and next_min.requires_grad) or (next_max is not None and next_max.requires_grad)),
    )  # fmt: skip
    return y


def run_kernels(
    kernels, x, weight, activation, input_min, input_max, output_min, output_max, next_min, next_max, keep
):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    y, z = _launch(
        op, kernels, make(Arguments, (x, weight, activation, input_min, input_max, output_min, output_max,
        next_min, next_max,)), y_dtype, keep,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if z.dtype is not y_dtype:
        z = z.to(y_dtype)
    return y, z


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x), promoted(a.x))


# --------------------------------------------------------------------------- gradients without the dispatcher
class ClampedLinear(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, x, weight, activation, input_min, input_max, output_min, output_max, next_min,
        next_max,
    ):  # fmt: skip
        y, z = run_kernels(
            kernels, x, weight, activation, input_min, input_max, output_min, output_max, next_min, next_max,
            True,
        )  # fmt: skip
        y = not_a_view(y)
        ctx.save_for_backward(x, weight, input_min, input_max, output_min, output_max, next_min, next_max, z)
        ctx.rest = kernels, direct, activation
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("clamped_linear")
        # once: a checkpoint gives them one time
        x, weight, input_min, input_max, output_min, output_max, next_min, next_max, z = ctx.saved_tensors
        kernels, direct, activation = ctx.rest
        d_x, d_weight, d_input_min, d_input_max, d_output_min, d_output_max, d_next_min, d_next_max = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, weight, input_min, input_max, output_min, output_max,
            next_min, next_max, z, activation,)), ctx.needs_input_grad[2:],
        )  # fmt: skip
        return (
            None,
            None,
            d_x,
            d_weight,
            None,
            d_input_min,
            d_input_max,
            d_output_min,
            d_output_max,
            d_next_min,
            d_next_max,
        )


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    d_x, d_weight, d_input_min, d_input_max, d_output_min, d_output_max, d_next_min, d_next_max = _gradients(
        op, kernels, grads, saved, needs
    )
    d_x = back(d_x, saved.x)
    d_weight = back(d_weight, saved.weight)
    d_input_min = back(d_input_min, saved.input_min)
    d_input_max = back(d_input_max, saved.input_max)
    d_output_min = back(d_output_min, saved.output_min)
    d_output_max = back(d_output_max, saved.output_max)
    d_next_min = back(d_next_min, saved.next_min)
    d_next_max = back(d_next_max, saved.next_max)
    return d_x, d_weight, d_input_min, d_input_max, d_output_min, d_output_max, d_next_min, d_next_max


apply = applied(ClampedLinear)


# --------------------------------------------------------------------------- the registered operator
def fake(
    x, weight, activation='identity', input_min=None, input_max=None, output_min=None, output_max=None,
    next_min=None, next_max=None, keep=False,
):  # fmt: skip
    keep = (
        keep
        and family.kernels(x, input_min, input_max, output_min, output_max, next_min, next_max) is not None
    )
    S = x.shape[:-1]
    N = weight.shape[0]
    return torch.empty((*S, N), dtype=promoted(x), device=x.device), torch.empty(
        (*S, N) if keep else (0,), dtype=promoted(x), device=x.device
    )


op.serve(
    clamped_linear,
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
        deciding=("x", "input_min", "input_max", "output_min", "output_max", "next_min", "next_max"),
        differentiable=(
            "x",
            "weight",
            "input_min",
            "input_max",
            "output_min",
            "output_max",
            "next_min",
            "next_max",
        ),
        graded={"y": ""},
        saves=(
            "x",
            "weight",
            "input_min",
            "input_max",
            "output_min",
            "output_max",
            "next_min",
            "next_max",
            "z",
        ),
        kept=("z",),
        asks=True,
        autocast=("x", "weight"),
    ),
)
operator = register_op(
    op,
    'clamped_linear(Tensor x, Tensor weight, str activation="identity", Tensor? input_min=None, Tensor? '
    "input_max=None, Tensor? output_min=None, Tensor? output_max=None, Tensor? next_min=None, Tensor? "
    "next_max=None, bool keep=False) -> (Tensor, Tensor)",
    "clamped_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? input_min, Tensor? "
    "input_max, Tensor? output_min, Tensor? output_max, Tensor? next_min, Tensor? next_max, Tensor z, str "
    "activation, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
