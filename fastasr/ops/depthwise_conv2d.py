# SPDX-License-Identifier: Apache-2.0
r"""Depthwise convolution of maps, as in the ConvNeXt layer (Liu et al., 2022) of Zipformer's front end.

For x (B, T, F, C), taps w (C, K, L) and zeros around x:

    y[b, t, f, c] = bias[c] + Σ_{i < K, j < L} w[c, i, j] x[b, t + i − P, f + j − Q, c]        padding (P, Q)

With gradient g: dx is the convolution of g with w turned by 180° and padding (K − 1 − P, L − 1 − Q),
dw[c, i, j] = Σ_{b, t, f} g[b, t, f, c] x[b, t + i − P, f + j − Q, c] and dbias = Σ g.
Upstream: ``ConvNeXt.depthwise_conv`` in ``zipformer.modules.subsampling``.

Memory traffic per element: read x, write y forward; read g and x, write dx backward. 2 K L FLOPs each for y, dx, dw.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check
from fastasr.ops._dispatch import (
    PLAIN,
    KernelFamily,
    direct,
    native_kernels,
    served,
    triton_kernels,
)
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register

OP = "depthwise_conv2d"
FAMILY = KernelFamily(OP, (OP,), (native_kernels(OP), triton_kernels(OP)))


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """The formula in eager PyTorch."""
    channels, taps = weight.shape[0], weight.shape[-2:]
    padded = _pad(x, padding)
    frames, width = padded.shape[1] - taps[0] + 1, padded.shape[2] - taps[1] + 1
    if 0 in (x.shape[0], frames, width, channels):  # for which torch's convolution is an error
        nothing = weight.reshape(channels, taps.numel()).sum(1)
        return padded[:, :frames, :width] + (nothing if bias is None else nothing + bias)
    y = F.conv2d(
        padded.permute(0, 3, 1, 2), weight.reshape(channels, 1, *taps).to(x.dtype), bias, groups=channels
    )
    return y.permute(0, 2, 3, 1)


def _pad(x: Tensor, padding: tuple[int, int]) -> Tensor:
    return F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))


def definition_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pad_t: int, pad_f: int, needs: list[bool] | tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), computed in float32 or better; None for each that ``needs`` does not ask for."""
    if not grad.numel():
        wanted = x, weight, weight.new_empty(weight.shape[0])
        return tuple(torch.zeros_like(t) if need else None for t, need in zip(wanted, needs, strict=True))
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, taps = weight.shape[0], tuple(weight.shape[-2:])
    g = grad.to(dtype).permute(0, 3, 1, 2)
    w = weight.to(dtype).reshape(channels, 1, *taps)
    maps = x.to(dtype).permute(0, 3, 1, 2)
    padding = (pad_t, pad_f)
    dx = dweight = None
    if needs[0]:
        dx = torch.nn.grad.conv2d_input(maps.shape, w, g, padding=padding, groups=channels)
        dx = dx.permute(0, 2, 3, 1).to(x.dtype)
    if needs[1]:
        dweight = torch.nn.grad.conv2d_weight(maps, w.shape, g, padding=padding, groups=channels)
        dweight = dweight.reshape(weight.shape).to(weight.dtype)
    return dx, dweight, g.sum((0, 2, 3)).to(weight.dtype) if needs[2] else None


# --------------------------------------------------------------------------- kernels
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, pad_t: int, pad_f: int) -> Tensor:
    """y without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return definition(x, weight, bias, padding=(pad_t, pad_f))
    bias = bias if bias is None else bias.contiguous()
    return kernels.forward(x.contiguous(), weight.contiguous(), bias, pad_t, pad_f)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, pad_t: int, pad_f: int, needs: list[bool] | tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) without autograd; None for each that ``needs`` does not ask for."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return definition_backward(grad, x, weight, pad_t, pad_f, needs)
    found = kernels.backward(
        grad.contiguous(), x.contiguous(), weight.contiguous(), pad_t, pad_f, *map(bool, needs)
    )
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def backward(grad: Tensor, x: Tensor, weight: Tensor, pad_t: int, pad_f: int, needs: list[bool]):
    """:func:`gradients` as a registered op returns them: an empty tensor for None."""
    found = gradients(grad, x, weight, pad_t, pad_f, needs)
    return tuple(grad.new_empty(0) if g is None else g.contiguous() for g in found)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, pad_t: int, pad_f: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = pad_t, pad_f
        return forward(x, weight, bias, pad_t, pad_f)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(OP)
        needs = ctx.needs_input_grad[:3]
        return *gradients(grad, *ctx.saved_tensors, *ctx.padding, needs), None, None


# --------------------------------------------------------------------------- registration
def _fake_forward(x, weight, bias, pad_t, pad_f) -> Tensor:
    if FAMILY.kernels(x) is None:  # the definition's strides
        return definition(x, weight, bias, padding=(pad_t, pad_f))
    frames, width = (
        x.shape[1] + 2 * pad_t - weight.shape[-2] + 1,
        x.shape[2] + 2 * pad_f - weight.shape[-1] + 1,
    )
    return x.new_empty(x.shape[0], frames, width, x.shape[3])


def _fake_backward(grad, x, weight, pad_t, pad_f, needs):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


_BACKWARD_OP = register(
    "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int pad_t, int pad_f, bool[] needs) -> "
    "(Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, *ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def _op_backward(ctx, grad: Tensor):
    needs = list(ctx.needs_input_grad[:3])
    grads = _BACKWARD_OP(grad, *ctx.saved_tensors, *ctx.padding, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


_OP = register(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int pad_t, int pad_f) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
    autocast=lambda dtype, x, weight, bias, *padding: (*cast(dtype, x, weight, bias), *padding),
)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Every channel of the maps x convolved with taps of its own, stride 1, zeros around x; channels last.

    Args:
        x: (B, T, F, C), contiguous best: ``map.permute(0, 2, 3, 1)`` of a map in channels_last order is. float32,
            bfloat16, float16 or float64.
        weight: (C, 1, K, L), that of a ``torch.nn.Conv2d`` with C groups, or (C, K, L); x's dtype, except under
            autocast, which casts as it does for ``torch.nn.functional.conv2d``.
        bias: (C,) or None.
        padding: (P, Q), zeros before and after the frames and the pixels of a frame; less than (K, L).
    Returns:
        (B, T + 2P − K + 1, F + 2Q − L + 1, C), x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; padding out of range; x, padded, is smaller than the kernel.
    """
    if (
        not is_compiling()
        and FAMILY.native is not None
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and x.is_cpu
        and type(padding) is tuple
        and len(padding) == 2
        and type(padding[0]) is int
        and type(padding[1]) is int
        and not torch.is_autocast_enabled("cpu")
        and not (
            is_grad_enabled()
            and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        )
    ):
        try:
            return FAMILY.native.forward(x, weight, bias, *padding)
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    _check_call(x, weight, bias, padding)
    pad_t, pad_f = padding
    if not direct(x, weight, bias):
        if not served(OP, x):
            return definition(x, weight, bias, padding=(pad_t, pad_f))
        return _OP(x, weight, bias, pad_t, pad_f)
    if FAMILY.kernels(x) is None:
        return definition(x, weight, bias, padding=(pad_t, pad_f))
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = cast(dtype, x, weight, bias)
    if is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _DepthwiseConv2d.apply(x, weight, bias, pad_t, pad_f)
    return forward(x, weight, bias, pad_t, pad_f)


def _check_call(x, weight, bias, padding) -> None:
    _check.floating_tensor(OP, "x", x)
    _check.shape(OP, "x", x, "(B, T, F, C)", x.dim() == 4)
    channels = x.shape[3]
    _check.floating_tensor(OP, "weight", weight)
    _check.shape(
        OP,
        "weight",
        weight,
        f"({channels}, 1, K, L) or ({channels}, K, L), K and L at least 1",
        (weight.dim() == 3 or (weight.dim() == 4 and weight.shape[1] == 1))
        and weight.shape[0] == channels
        and min(weight.shape[-2:]) > 0,
    )
    if bias is not None:
        _check.floating_tensor(OP, "bias", bias)
        _check.shape(OP, "bias", bias, f"({channels},)", tuple(bias.shape) == (channels,))
    _check.same_device(OP, "weight", weight, x, "x")
    if bias is not None:
        _check.same_device(OP, "bias", bias, x, "x")
    if not isinstance(padding, tuple | list) or len(padding) != 2:
        raise TypeError(f"fastasr.{OP}: padding: expected a pair of ints, got {padding!r}")
    for pad, taps in zip(padding, weight.shape[-2:], strict=True):
        _check.integer(OP, "padding", pad)
        if not 0 <= pad < taps:
            raise ValueError(
                f"fastasr.{OP}: padding: expected at least 0 and less than {taps} taps, got {pad}"
            )
    least = tuple(taps - 2 * pad for pad, taps in zip(padding, weight.shape[-2:], strict=True))
    _check.shape(
        OP,
        "x",
        x,
        f"(B, T, F, C) with T >= {least[0]} and F >= {least[1]}, to fit the kernel",
        x.shape[1] >= least[0] and x.shape[2] >= least[1] and x.shape[1] > 0 and x.shape[2] > 0,
    )
    if autocast_dtype(x) is None:
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype != x.dtype:
                raise TypeError(
                    f"fastasr.{OP}: {name}: expected dtype {x.dtype} (that of x), got {value.dtype}"
                )
