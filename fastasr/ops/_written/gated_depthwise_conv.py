# SPDX-License-Identifier: Apache-2.0
# `make op OP=gated_depthwise_conv` writes this file from fastasr/ops/gated_depthwise_conv.py: change that one.
"""act of the depthwise convolution over time of x · gate(s), for h = (x, s); plain, or chunk-causal"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._layout import dense_channels
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import autocast_dtype, refuse_double_backward
from fastasr.ops._runtime import (
    BOOL,
    INT64,
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
from fastasr.ops.gated_depthwise_conv import _autocast, _check, _fast, _gradients, _launch
from fastasr.ops.gated_depthwise_conv import gated_depthwise_conv as formula

op = OPS["gated_depthwise_conv"]
family = op.family
ACTIVATION_CODES = {"identity": 0, "swoosh_r": 1, "silu": 2}
GATE_CODES = {"sigmoid": 0, "silu": 1}


class Arguments(NamedTuple):
    h: Tensor
    weight: Tensor
    bias: Tensor | None = None
    causal_weight: Tensor | None = None
    causal_bias: Tensor | None = None
    chunk_scale: Tensor | None = None
    padding_mask: Tensor | None = None
    cache: Tensor | None = None
    starts: Tensor | None = None
    chunk_size: int = -1
    activation: Literal["swoosh_r", "silu", "identity"] = "swoosh_r"
    return_cache: bool = False
    delay: int = 0
    gate: Literal["sigmoid", "silu"] = "sigmoid"


class Saved(NamedTuple):
    h: Tensor
    weight: Tensor
    bias: Tensor | None
    causal_weight: Tensor | None
    causal_bias: Tensor | None
    chunk_scale: Tensor | None
    padding_mask: Tensor | None
    cache: Tensor | None
    starts: Tensor | None
    chunk_size: int
    activation: Literal["swoosh_r", "silu", "identity"]
    return_cache: bool
    delay: int
    gate: Literal["sigmoid", "silu"]


# --------------------------------------------------------------------------- the public function
@overload
def gated_depthwise_conv(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal_weight: Tensor | None = None,
    causal_bias: Tensor | None = None,
    chunk_scale: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    cache: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = -1,
    activation: Literal["swoosh_r", "silu", "identity"] = "swoosh_r",
    return_cache: Literal[False] = False,
    delay: int = 0,
    gate: Literal["sigmoid", "silu"] = "sigmoid",
) -> Tensor: ...
@overload
def gated_depthwise_conv(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal_weight: Tensor | None = None,
    causal_bias: Tensor | None = None,
    chunk_scale: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    cache: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = -1,
    activation: Literal["swoosh_r", "silu", "identity"] = "swoosh_r",
    return_cache: Literal[True],
    delay: int = 0,
    gate: Literal["sigmoid", "silu"] = "sigmoid",
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_depthwise_conv(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal_weight: Tensor | None = None,
    causal_bias: Tensor | None = None,
    chunk_scale: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    cache: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = -1,
    activation: Literal["swoosh_r", "silu", "identity"] = "swoosh_r",
    return_cache: bool,
    delay: int = 0,
    gate: Literal["sigmoid", "silu"] = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]: ...
def gated_depthwise_conv(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal_weight: Tensor | None = None,
    causal_bias: Tensor | None = None,
    chunk_scale: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    cache: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = -1,
    activation: Literal["swoosh_r", "silu", "identity"] = "swoosh_r",
    return_cache: bool = False,
    delay: int = 0,
    gate: Literal["sigmoid", "silu"] = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]:
    """act of the depthwise convolution over time of x · gate(s), for h = (x, s); plain, or chunk-causal.

    Args:
        h: (T, B, 2C), both halves of a gated projection; float32, bfloat16, float16 or float64. Its channels are read
            where they lie if they are contiguous, whatever the other strides.
        weight: (C, 1, K) or (C, K): the taps of the plain convolution, padded with zeros to the same length; in
            chunk-causal form, where K is odd, those of the convolution within each chunk. Weights and biases may have
            another dtype than h: kernels read them unrounded, under autocast too.
        bias: (C,), of that convolution.
        causal_weight: (C, 1, (K + 1) / 2) or (C, (K + 1) / 2): the taps on this frame and those before it, whatever
            their chunk. Together with chunk_scale it selects the chunk-causal form.
        causal_bias: (C,).
        chunk_scale: (2, C, K): by how much the scale of the convolution within the chunk exceeds 1, by the distance
            from the chunk's first frame, and to its last.
        padding_mask: (B, T), bool; True where a frame is padding, which counts as 0.
        cache: (B, C, K // 2 + delay): x · gate(s) of the frames before the first; None: zeros.
        starts: int64 (N,), without caches: where recordings begin and end in every sequence. The convolution of a frame
            sees none beyond these bounds. Their order does not matter, and equal numbers are recordings without frames.
            On a GPU nothing waits for them.
        chunk_size: frames of a chunk; -1, or more than T: one chunk holds the whole sequence. With ``starts`` chunks
            count from the first frame of the recording, and a shorter recording is one chunk of its own length.
        activation: "swoosh_r", "silu" or "identity".
        return_cache: return (y, cache for the frames that follow).
        delay: plain form: the convolution sees K // 2 + delay frames of the past; (K − 1) // 2 makes it causal.
        gate: "sigmoid", or "silu": u = x · s · sigmoid(s).
    Returns:
        y (T, B, C), in the promotion of h's and chunk_scale's dtype, computed in float32 or better and rounded once. It
        is contiguous, or lies in h's order of memory. The new cache has the promotion of h's and the cache's dtype.
    Raises:
        TypeError: an argument is of the wrong type, or a tensor not floating (padding_mask: not bool).
        ValueError: shapes, dtypes or devices do not match; chunk_size is 0 or less than -1; a tap would not reach the
            frame itself because of delay; an argument of the chunk-causal form is given without the others; starts are
            given with a cache.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(h) in PLAIN
        and h.is_cpu
        and (dtype := h.dtype)
        and type(weight) in PLAIN
        and weight.is_cpu
        and weight.dtype is dtype
        and (bias is None or (type(bias) in PLAIN and bias.is_cpu and bias.dtype is dtype))
        and (
            causal_weight is None
            or (type(causal_weight) in PLAIN and causal_weight.is_cpu and causal_weight.dtype is dtype)
        )
        and (
            causal_bias is None
            or (type(causal_bias) in PLAIN and causal_bias.is_cpu and causal_bias.dtype is dtype)
        )
        and (
            chunk_scale is None
            or (type(chunk_scale) in PLAIN and chunk_scale.is_cpu and chunk_scale.dtype is dtype)
        )
        and (padding_mask is None or (type(padding_mask) in PLAIN and padding_mask.is_cpu))
        and (cache is None or (type(cache) in PLAIN and cache.is_cpu and cache.dtype is dtype))
        and (starts is None or (type(starts) in PLAIN and starts.is_cpu))
        and type(chunk_size) is int
        and (chunk_size == -1 or chunk_size >= 1)
        and type(activation) is str
        and activation in ACTIVATION_CODES
        and type(return_cache) is bool
        and type(delay) is int
        and type(gate) is str
        and gate in GATE_CODES
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                h.requires_grad
                or weight.requires_grad
                or (bias is not None and bias.requires_grad)
                or (causal_weight is not None and causal_weight.requires_grad)
                or (causal_bias is not None and causal_bias.requires_grad)
                or (chunk_scale is not None and chunk_scale.requires_grad)
                or (cache is not None and cache.requires_grad)
            ):
                return apply(
                    kernels, True, h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask,
                    cache, starts, chunk_size, activation, return_cache, delay, gate,
                )  # fmt: skip
            y, new_cache = _fast(
                kernels, False, h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache,
                starts, chunk_size, activation, return_cache, delay, gate,
            )  # fmt: skip
            return (y, new_cache) if return_cache else y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts,
                chunk_size, activation, return_cache, delay, gate,
            )  # fmt: skip
            raise
    check(
        h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts, chunk_size,
        activation, return_cache, delay, gate,
    )  # fmt: skip
    if is_compiling() or not (
        type(h) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (causal_weight is None or type(causal_weight) in PLAIN)
        and (causal_bias is None or type(causal_bias) in PLAIN)
        and (chunk_scale is None or type(chunk_scale) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
        and (cache is None or type(cache) in PLAIN)
        and (starts is None or type(starts) in PLAIN)
    ):
        return traced(
            h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts, chunk_size,
            activation, return_cache, delay, gate,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache,
            starts, chunk_size, activation, return_cache, delay, gate),
        )  # fmt: skip
    kernels = family.kernels(h, weight, bias, causal_weight, causal_bias, chunk_scale, cache)
    if kernels is None:
        return laid_out(
            op, formula(h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask=padding_mask,
            cache=cache, starts=starts, chunk_size=chunk_size, activation=activation,
            return_cache=return_cache, delay=delay, gate=gate),
        )  # fmt: skip
    cast_dtype = autocast_dtype(h)
    if cast_dtype is not None:
        h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts, chunk_size, activation, return_cache, delay, gate = _autocast(
            op, cast_dtype, make(Arguments, (h, weight, bias, causal_weight, causal_bias, chunk_scale,
            padding_mask, cache, starts, chunk_size, activation, return_cache, delay, gate,)),
        )  # fmt: skip
        kernels = family.kernels(h, weight, bias, causal_weight, causal_bias, chunk_scale, cache)
        if kernels is None:
            return formula(
                h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask=padding_mask,
                cache=cache, starts=starts, chunk_size=chunk_size, activation=activation,
                return_cache=return_cache, delay=delay, gate=gate,
            )  # fmt: skip
    try:
        if is_grad_enabled() and (
            h.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (causal_weight is not None and causal_weight.requires_grad)
            or (causal_bias is not None and causal_bias.requires_grad)
            or (chunk_scale is not None and chunk_scale.requires_grad)
            or (cache is not None and cache.requires_grad)
        ):
            return apply(
                kernels, False, h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache,
                starts, chunk_size, activation, return_cache, delay, gate,
            )  # fmt: skip
        y, new_cache = run_kernels(
            kernels, h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts,
            chunk_size, activation, return_cache, delay, gate,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, h, weight, bias, causal_weight, causal_bias, chunk_scale, cache)
        return formula(
            h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask=padding_mask, cache=cache,
            starts=starts, chunk_size=chunk_size, activation=activation, return_cache=return_cache,
            delay=delay, gate=gate,
        )  # fmt: skip
    return (y, new_cache) if return_cache else y


def check(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor | None,
    causal_bias: Tensor | None,
    chunk_scale: Tensor | None,
    padding_mask: Tensor | None,
    cache: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    activation: Literal["swoosh_r", "silu", "identity"],
    return_cache: bool,
    delay: int,
    gate: Literal["sigmoid", "silu"],
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(chunk_size) is not int:
        op.wrong_int("chunk_size", chunk_size)
    if not (chunk_size == -1 or chunk_size >= 1):
        op.fail("chunk_size", "-1 or at least 1", chunk_size)
    if not (type(activation) is str and activation in ACTIVATION_CODES):
        op.wrong_choice("activation", activation, ACTIVATION_CODES)
    if type(return_cache) is not bool:
        op.wrong_flag("return_cache", return_cache)
    if type(delay) is not int:
        op.wrong_int("delay", delay)
    if not (type(gate) is str and gate in GATE_CODES):
        op.wrong_choice("gate", gate, GATE_CODES)
    if not isinstance(h, Tensor) or h.dtype not in FLOATING or h.layout is not torch.strided:
        op.wrong_tensor("h", h)
    shape, right = h.shape, False
    if len(shape) == 3:
        T = shape[0]
        B = shape[1]
        C = shape[2] // 2
        right = shape[2] % 2 == 0
    if not right:
        op.wrong_shape("h", h, listed("T", "B", "2*C"))
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    shape, right = weight.shape, False
    if len(shape) == 3:
        K = shape[2]
        right = shape[0] == C and shape[1] == 1 and K >= 1
    elif len(shape) == 2:
        K = shape[1]
        right = shape[0] == C and K >= 1
    if not right:
        op.wrong_shape("weight", weight, f"{listed(C, 1, 'K')} or {listed(C, 'K')}, K >= 1")
    if weight.device != h.device:
        op.wrong_device("weight", weight, "h", h)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
            op.wrong_tensor("bias", bias)
        if bias.shape != (C,):
            op.wrong_shape("bias", bias, listed(C))
        if bias.device != h.device:
            op.wrong_device("bias", bias, "h", h)
    if causal_weight is not None:
        if (
            not isinstance(causal_weight, Tensor)
            or causal_weight.dtype not in FLOATING
            or causal_weight.layout is not torch.strided
        ):
            op.wrong_tensor("causal_weight", causal_weight)
        if causal_weight.shape != (C, 1, K // 2 + 1) and causal_weight.shape != (C, K // 2 + 1):
            op.wrong_shape(
                "causal_weight", causal_weight, f"{listed(C, 1, K // 2 + 1)} or {listed(C, K // 2 + 1)}"
            )
        if causal_weight.device != h.device:
            op.wrong_device("causal_weight", causal_weight, "h", h)
    if causal_bias is not None:
        if (
            not isinstance(causal_bias, Tensor)
            or causal_bias.dtype not in FLOATING
            or causal_bias.layout is not torch.strided
        ):
            op.wrong_tensor("causal_bias", causal_bias)
        if causal_bias.shape != (C,):
            op.wrong_shape("causal_bias", causal_bias, listed(C))
        if causal_bias.device != h.device:
            op.wrong_device("causal_bias", causal_bias, "h", h)
    if chunk_scale is not None:
        if (
            not isinstance(chunk_scale, Tensor)
            or chunk_scale.dtype not in FLOATING
            or chunk_scale.layout is not torch.strided
        ):
            op.wrong_tensor("chunk_scale", chunk_scale)
        if chunk_scale.shape != (2, C, K):
            op.wrong_shape("chunk_scale", chunk_scale, listed(2, C, K))
        if chunk_scale.device != h.device:
            op.wrong_device("chunk_scale", chunk_scale, "h", h)
    if padding_mask is not None:
        if (
            not isinstance(padding_mask, Tensor)
            or padding_mask.dtype not in BOOL
            or padding_mask.layout is not torch.strided
        ):
            op.wrong_tensor("padding_mask", padding_mask, "a bool tensor")
        if padding_mask.shape != (B, T):
            op.wrong_shape("padding_mask", padding_mask, listed(B, T))
        if padding_mask.device != h.device:
            op.wrong_device("padding_mask", padding_mask, "h", h)
    if cache is not None:
        if not isinstance(cache, Tensor) or cache.dtype not in FLOATING or cache.layout is not torch.strided:
            op.wrong_tensor("cache", cache)
        if cache.shape != (B, C, K // 2 + delay):
            op.wrong_shape("cache", cache, listed(B, C, K // 2 + delay))
        if cache.device != h.device:
            op.wrong_device("cache", cache, "h", h)
    if starts is not None:
        if not isinstance(starts, Tensor) or starts.dtype not in INT64 or starts.layout is not torch.strided:
            op.wrong_tensor("starts", starts, "an int64 tensor")
        shape, right = starts.shape, False
        if len(shape) == 1:
            N = shape[0]
            right = N >= 1
        if not right:
            op.wrong_shape("starts", starts, f"{listed('N')}, N >= 1")
        if starts.device != h.device:
            op.wrong_device("starts", starts, "h", h)
    _check(
        op, make(Arguments, (h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache,
        starts, chunk_size, activation, return_cache, delay, gate,)),
    )  # fmt: skip


def traced(
    h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts, chunk_size,
    activation, return_cache, delay, gate,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("gated_depthwise_conv", h, weight, bias, causal_weight, causal_bias, chunk_scale, cache):
        return formula(
            h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask=padding_mask, cache=cache,
            starts=starts, chunk_size=chunk_size, activation=activation, return_cache=return_cache,
            delay=delay, gate=gate,
        )  # fmt: skip
    y, new_cache = operator(
        h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts, chunk_size,
        activation, return_cache, delay, gate,
    )  # fmt: skip
    return (y, new_cache) if return_cache else y


def run_kernels(
    kernels, h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts,
    chunk_size, activation, return_cache, delay, gate,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(h, chunk_scale)
    new_cache_dtype = promoted(h, cache)
    y, new_cache = _launch(
        op, kernels, make(Arguments, (h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask,
        cache, starts, chunk_size, activation, return_cache, delay, gate,)), y_dtype, False,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if new_cache.dtype is not new_cache_dtype:
        new_cache = new_cache.to(new_cache_dtype)
    return y, new_cache


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.h, a.chunk_scale), promoted(a.h, a.cache))


# --------------------------------------------------------------------------- gradients without the dispatcher
class GatedDepthwiseConv(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache,
        starts, chunk_size, activation, return_cache, delay, gate,
    ):  # fmt: skip
        if direct:
            y, new_cache = _fast(
                kernels, True, h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache,
                starts, chunk_size, activation, return_cache, delay, gate,
            )  # fmt: skip
        else:
            y, new_cache = run_kernels(
                kernels, h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache,
                starts, chunk_size, activation, return_cache, delay, gate,
            )  # fmt: skip
        y = not_a_view(y)
        new_cache = not_a_view(new_cache)
        ctx.save_for_backward(
            h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts
        )
        ctx.rest = kernels, direct, chunk_size, activation, return_cache, delay, gate
        return (y, new_cache) if return_cache else y

    @staticmethod
    def backward(ctx, grad_y, grad_new_cache=None, *_):
        if is_grad_enabled():
            refuse_double_backward("gated_depthwise_conv")
        # once: a checkpoint gives them one time
        h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts = (
            ctx.saved_tensors
        )
        kernels, direct, chunk_size, activation, return_cache, delay, gate = ctx.rest
        if direct and not (
            return_cache
            or transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_h, d_weight, d_bias, d_causal_weight, d_causal_bias, d_chunk_scale, d_cache = kernels.backward(
                operand(grad_y, None, dense_channels), h, weight, bias, causal_weight, causal_bias,
                chunk_scale, padding_mask, cache, starts, chunk_size, ACTIVATION_CODES[activation], delay,
                GATE_CODES[gate],
            )  # fmt: skip
            return (
                None,
                None,
                d_h,
                d_weight,
                None if bias is None else d_bias,
                None if causal_weight is None else d_causal_weight,
                None if causal_bias is None else d_causal_bias,
                None if chunk_scale is None else d_chunk_scale,
                None,
                None if cache is None else d_cache,
                None,
                None,
                None,
                None,
                None,
                None,
            )
        d_h, d_weight, d_bias, d_causal_weight, d_causal_bias, d_chunk_scale, d_cache = node_gradients(
            op, kernels, (grad_y, grad_new_cache,), make(Saved, (h, weight, bias, causal_weight, causal_bias,
            chunk_scale, padding_mask, cache, starts, chunk_size, activation, return_cache, delay, gate,)),
        )  # fmt: skip
        return (
            None,
            None,
            d_h,
            d_weight,
            d_bias,
            d_causal_weight,
            d_causal_bias,
            d_chunk_scale,
            None,
            d_cache,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    d_h, d_weight, d_bias, d_causal_weight, d_causal_bias, d_chunk_scale, d_cache = _gradients(
        op, kernels, grads, saved, None
    )
    d_h = back(d_h, saved.h)
    d_weight = back_in_shape(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    d_causal_weight = back_in_shape(d_causal_weight, saved.causal_weight)
    d_causal_bias = back(d_causal_bias, saved.causal_bias)
    d_chunk_scale = back(d_chunk_scale, saved.chunk_scale)
    d_cache = back(d_cache, saved.cache)
    return d_h, d_weight, d_bias, d_causal_weight, d_causal_bias, d_chunk_scale, d_cache


apply = applied(GatedDepthwiseConv)


# --------------------------------------------------------------------------- the registered operator
def fake(
    h, weight, bias=None, causal_weight=None, causal_bias=None, chunk_scale=None, padding_mask=None,
    cache=None, starts=None, chunk_size=-1, activation='swoosh_r', return_cache=False, delay=0,
    gate='sigmoid',
):  # fmt: skip
    T = h.shape[0]
    B = h.shape[1]
    C = h.shape[2] // 2
    if len(weight.shape) == 3:
        K = weight.shape[2]
    elif len(weight.shape) == 2:
        K = weight.shape[1]
    return torch.empty((T, B, C), dtype=promoted(h, chunk_scale), device=h.device), torch.empty(
        (B, C, K // 2 + delay) if return_cache else (0,), dtype=promoted(h, cache), device=h.device
    )


op.serve(
    gated_depthwise_conv,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "new_cache"),
        deciding=("h", "weight", "bias", "causal_weight", "causal_bias", "chunk_scale", "cache"),
        differentiable=("h", "weight", "bias", "causal_weight", "causal_bias", "chunk_scale", "cache"),
        graded={"y": "", "new_cache": "return_cache"},
        saves=(
            "h",
            "weight",
            "bias",
            "causal_weight",
            "causal_bias",
            "chunk_scale",
            "padding_mask",
            "cache",
            "starts",
        ),
        autocast=_autocast,
    ),
)
operator = register_op(
    op,
    "gated_depthwise_conv(Tensor h, Tensor weight, Tensor? bias=None, Tensor? causal_weight=None, Tensor? "
    "causal_bias=None, Tensor? chunk_scale=None, Tensor? padding_mask=None, Tensor? cache=None, Tensor? "
    'starts=None, SymInt chunk_size=-1, str activation="swoosh_r", bool return_cache=False, SymInt '
    'delay=0, str gate="sigmoid") -> (Tensor, Tensor)',
    "gated_depthwise_conv_backward(Tensor? grad_y, Tensor? grad_new_cache, Tensor h, Tensor weight, "
    "Tensor? bias, Tensor? causal_weight, Tensor? causal_bias, Tensor? chunk_scale, Tensor? padding_mask, "
    "Tensor? cache, Tensor? starts, SymInt chunk_size, str activation, bool return_cache, SymInt delay, "
    "str gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
