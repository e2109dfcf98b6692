# SPDX-License-Identifier: Apache-2.0
# `make op OP=conv_spatial_gate` writes this file from fastasr/ops/conv_spatial_gate.py: change that one.
"""The gating unit of E-Branchformer's cgMLP: r · act(depthwise convolution over time of LayerNorm(g)), x = (r, g)"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, promote_types
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served, widest
from fastasr.ops._layout import dense_channels
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import refuse_double_backward
from fastasr.ops._runtime import (
    BOOL,
    COMPUTE,
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
from fastasr.ops.conv_spatial_gate import conv_spatial_gate as formula

op = OPS["conv_spatial_gate"]
family = op.family
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}


class Arguments(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-05
    padding_mask: Tensor | None = None
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity"


class Saved(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor | None
    padding_mask: Tensor | None
    eps: float
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]


# --------------------------------------------------------------------------- the public function
def conv_spatial_gate(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-05,
    *,
    padding_mask: Tensor | None = None,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity",
) -> Tensor:
    """The gating unit of E-Branchformer's cgMLP: r · act(depthwise convolution over time of LayerNorm(g)), x = (r, g).

    Args:
        x: (B, T, 2C), the factor and the gate; float32, bfloat16, float16 or float64. Its channels are read where they
            lie if they are contiguous, whatever the other strides.
        norm_weight, norm_bias: (C,), of the LayerNorm.
        weight: (C, 1, K) or (C, K), K odd: the taps, padded with zeros to the same length.
        bias: (C,), of the convolution.
        eps: added to the variance.
        padding_mask: (B, T), bool; True: the frame is padding, and its normalised gate counts as 0.
        activation: of the gate: "identity", "silu", "relu", "tanh" or "gelu".
    Returns:
        y (B, T, C), contiguous, in x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (x.is_contiguous() or x.stride(-1) == 1)
        and type(norm_weight) in PLAIN
        and norm_weight.dtype in COMPUTE
        and type(norm_bias) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
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
                or norm_weight.requires_grad
                or norm_bias.requires_grad
                or weight.requires_grad
                or (bias is not None and bias.requires_grad)
            ):
                return apply(
                    kernels, True, x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation
                )
            return kernels.forward(
                x, norm_weight, norm_bias, weight, bias, padding_mask, eps, ACTIVATION_CODES[activation]
            )
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation)
            raise
    check(x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(norm_weight) in PLAIN
        and type(norm_bias) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
    ):
        return traced(x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation)
        )
    kernels = family.kernels(x, norm_weight, norm_bias, weight, bias)
    if kernels is None:
        return laid_out(
            op, formula(x, norm_weight, norm_bias, weight, bias, eps, padding_mask=padding_mask,
            activation=activation),
        )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or norm_weight.requires_grad
            or norm_bias.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        ):
            return apply(
                kernels, False, x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation
            )
        y = run_kernels(kernels, x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation)
    except Unlaunchable as error:
        family.give_up(error, x, norm_weight, norm_bias, weight, bias)
        return formula(
            x, norm_weight, norm_bias, weight, bias, eps, padding_mask=padding_mask, activation=activation
        )
    return y


def check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    padding_mask: Tensor | None,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"],
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
    if len(shape) == 3:
        B = shape[0]
        T = shape[1]
        C = shape[2] // 2
        right = shape[2] % 2 == 0 and C >= 1
    if not right:
        op.wrong_shape("x", x, f"{listed('B', 'T', '2*C')}, C >= 1")
    if (
        not isinstance(norm_weight, Tensor)
        or norm_weight.dtype not in FLOATING
        or norm_weight.layout is not torch.strided
    ):
        op.wrong_tensor("norm_weight", norm_weight)
    if norm_weight.shape != (C,):
        op.wrong_shape("norm_weight", norm_weight, listed(C))
    if norm_weight.device != x.device:
        op.wrong_device("norm_weight", norm_weight, "x", x)
    if (
        not isinstance(norm_bias, Tensor)
        or norm_bias.dtype not in FLOATING
        or norm_bias.layout is not torch.strided
    ):
        op.wrong_tensor("norm_bias", norm_bias)
    if norm_bias.shape != (C,):
        op.wrong_shape("norm_bias", norm_bias, listed(C))
    if norm_bias.device != x.device:
        op.wrong_device("norm_bias", norm_bias, "x", x)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    shape, right = weight.shape, False
    if len(shape) == 3:
        K = shape[2]
        right = shape[0] == C and shape[1] == 1 and K % 2 == 1
    elif len(shape) == 2:
        K = shape[1]
        right = shape[0] == C and K % 2 == 1
    if not right:
        op.wrong_shape("weight", weight, f"{listed(C, 1, 'K')} or {listed(C, 'K')}, K odd")
    if weight.device != x.device:
        op.wrong_device("weight", weight, "x", x)
    if bias is not None:
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
        if padding_mask.shape != (B, T):
            op.wrong_shape("padding_mask", padding_mask, listed(B, T))
        if padding_mask.device != x.device:
            op.wrong_device("padding_mask", padding_mask, "x", x)


def traced(x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("conv_spatial_gate", x, norm_weight, norm_bias, weight, bias):
        return formula(
            x, norm_weight, norm_bias, weight, bias, eps, padding_mask=padding_mask, activation=activation
        )
    return operator(x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation)


def run_kernels(kernels, x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    dtype = widest(x, (norm_weight, norm_bias, weight, bias))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    y = kernels.forward(
        operand(x, dtype, dense_channels), operand(norm_weight, work), operand(norm_bias, work),
        operand(weight, work), operand(bias, work), operand(padding_mask, None), eps,
        ACTIVATION_CODES[activation],
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class ConvSpatialGate(Function):
    @staticmethod
    def forward(ctx, kernels, direct, x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation):
        if direct:
            y = kernels.forward(
                x, norm_weight, norm_bias, weight, bias, padding_mask, eps, ACTIVATION_CODES[activation]
            )
        else:
            y = run_kernels(kernels, x, norm_weight, norm_bias, weight, bias, eps, padding_mask, activation)
        y = not_a_view(y)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, padding_mask)
        ctx.rest = kernels, direct, eps, activation
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("conv_spatial_gate")
        # once: a checkpoint gives them one time
        x, norm_weight, norm_bias, weight, bias, padding_mask = ctx.saved_tensors
        kernels, direct, eps, activation = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, d_norm_weight, d_norm_bias, d_weight, d_bias = kernels.backward(
                operand(grad_y, None), x, norm_weight, norm_bias, weight, bias, padding_mask, eps,
                ACTIVATION_CODES[activation],
            )  # fmt: skip
            return (
                None,
                None,
                d_x,
                d_norm_weight,
                d_norm_bias,
                d_weight,
                None if bias is None else d_bias,
                None,
                None,
                None,
            )
        d_x, d_norm_weight, d_norm_bias, d_weight, d_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, norm_weight, norm_bias, weight, bias, padding_mask, eps,
            activation,)),
        )  # fmt: skip
        return None, None, d_x, d_norm_weight, d_norm_bias, d_weight, d_bias, None, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_y,) = grads
    dtype = widest(saved.x, (saved.norm_weight, saved.norm_bias, saved.weight, saved.bias))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    d_x, d_norm_weight, d_norm_bias, d_weight, d_bias = kernels.backward(
        operand(grad_y, dtype), operand(saved.x, dtype, dense_channels), operand(saved.norm_weight, work),
        operand(saved.norm_bias, work), operand(saved.weight, work), operand(saved.bias, work),
        operand(saved.padding_mask, None), saved.eps, ACTIVATION_CODES[saved.activation],
    )  # fmt: skip
    d_x = back(d_x, saved.x)
    d_norm_weight = back(d_norm_weight, saved.norm_weight)
    d_norm_bias = back(d_norm_bias, saved.norm_bias)
    d_weight = back_in_shape(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_x, d_norm_weight, d_norm_bias, d_weight, d_bias


apply = applied(ConvSpatialGate)


# --------------------------------------------------------------------------- the registered operator
def fake(x, norm_weight, norm_bias, weight, bias=None, eps=1e-05, padding_mask=None, activation="identity"):
    B = x.shape[0]
    T = x.shape[1]
    C = x.shape[2] // 2
    return torch.empty((B, T, C), dtype=promoted(x), device=x.device)


op.serve(
    conv_spatial_gate,
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
        deciding=("x", "norm_weight", "norm_bias", "weight", "bias"),
        differentiable=("x", "norm_weight", "norm_bias", "weight", "bias"),
        graded={"y": ""},
        saves=("x", "norm_weight", "norm_bias", "weight", "bias", "padding_mask"),
    ),
)
operator = register_op(
    op,
    "conv_spatial_gate(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias=None, "
    'float eps=1e-05, Tensor? padding_mask=None, str activation="identity") -> Tensor',
    "conv_spatial_gate_backward(Tensor grad_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor "
    "weight, Tensor? bias, Tensor? padding_mask, float eps, str activation) -> (Tensor, Tensor, Tensor, "
    "Tensor, Tensor)",
)
