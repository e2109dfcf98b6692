# SPDX-License-Identifier: Apache-2.0
"""Shortcuts for calls of a block's plain submodules.

These functions also run on instances of upstream's classes, where a submodule may be a wrapped projection or a dropout
with hooks. A submodule that is not a plain module of torch's is called normally.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common.plain import has_known_forward, is_plain, is_watched, runs_torchs, weight_and_bias
from fastasr.ops import _dropout, _linears


def is_plain_linear(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Says whether this is torch's linear layer as it is, so that its weight and bias suffice."""
    return is_plain(module, torch.nn.Linear)


def linear(module: torch.nn.Module, x: Tensor) -> Tensor:
    return ops.linear(x, *weight_and_bias(module)) if is_plain_linear(module) else module(x)


def linears(modules: Sequence[torch.nn.Module], x: Tensor) -> Sequence[Tensor]:
    """Returns x through each module."""
    found = None
    if all(map(is_plain_linear, modules)):
        found = _linears.linears(x, [weight_and_bias(module) for module in modules])
    return [linear(module, x) for module in modules] if found is None else found


def is_idle(module: torch.nn.Module) -> bool:
    """Says whether this dropout returns its input and draws no random numbers."""
    return is_plain(module, torch.nn.Dropout) and not (module.training and module.p > 0)


def dropped_share(module: torch.nn.Module) -> float | None:
    """Returns the share of elements that this dropout sets to 0, or None if it is no plain dropout of torch's."""
    if not is_plain(module, torch.nn.Dropout):
        return None
    return module.p if module.training else 0.0


def dropout(module: torch.nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Returns module(x) for a dropout, or module(x) + residual if a residual is given."""
    p = dropped_share(module)
    if p:
        return _dropout.dropout(x, p, residual)
    y = module(x) if p is None else x
    return y if residual is None else y + residual


def is_layer_norm(module: torch.nn.Module) -> TypeGuard[torch.nn.LayerNorm]:
    """Says whether this is torch's LayerNorm over the last dimension with weight and bias, without hooks."""
    if not is_plain(module, torch.nn.LayerNorm) or len(module.normalized_shape) != 1:
        return False
    weight, bias = weight_and_bias(module)
    return weight is not None and bias is not None


def conv_delay(
    module: torch.nn.Module,
    causal: bool = False,
    around: tuple[int, int] = (0, 0),
    stride: int = 1,
    known: Any = torch.nn.Conv1d,
) -> int | None:
    """Returns P − ⌊K / 2⌋ of a depthwise convolution of K taps over time that keeps the length and sees P frames of the
    past, or None for any other module and under hooks. It is torch's, or NeMo's class that pads by itself. ``causal``:
    torch's with all of its padding on either side, whose last frames are cut. ``around``: the frames of 0 that the
    caller puts on either side. ``stride``: the convolution's, whose result is every ``stride``-th frame. ``known``: the
    class, torch's or one of it that adds ``around`` itself.
    """
    cls = type(module)
    nemo = cls.__name__ == "CausalConv1D" and cls.__module__.startswith("nemo.")
    # NeMo's is one of torch's, with more attributes.
    if not is_plain(module, cls if nemo else known):
        return None
    taps = module.kernel_size[0]
    # torch's own reading of ``padding``, a number or "same", which pads even numbers of taps unevenly
    both = module._reversed_padding_repeated_twice
    left, right = (module._left_padding, module._right_padding) if nemo else both
    left, right = left + around[0], right + around[1]
    plain = (
        module.groups == module.in_channels == module.out_channels
        and (module.stride, module.dilation, module.padding_mode) == ((stride,), (1,), "zeros")
        and left + right == (taps - 1) * (2 if causal else 1)
    )
    return left - taps // 2 if plain else None


def is_pointwise_conv1d(module: torch.nn.Module) -> TypeGuard[torch.nn.Conv1d]:
    """Says whether this is torch's convolution of one tap without hooks."""
    sizes = (1,), (1,), (0,), 1
    return (
        is_plain(module, torch.nn.Conv1d)
        and (module.kernel_size, module.stride, module.padding, module.groups) == sizes
    )


def is_pointwise_conv2d(module: torch.nn.Module) -> TypeGuard[torch.nn.Conv2d]:
    """Says whether this is torch's convolution of 1 × 1 taps without hooks."""
    sizes = (1, 1), (1, 1), (0, 0), 1
    return (
        is_plain(module, torch.nn.Conv2d)
        and (module.kernel_size, module.stride, module.padding, module.groups) == sizes
    )


def is_dense_conv2d(module: torch.nn.Module) -> TypeGuard[torch.nn.Conv2d]:
    """Says whether this is torch's convolution in one group without dilation, padded by numbers of zeros, without
    hooks."""
    return (
        is_plain(module, torch.nn.Conv2d)
        and "_conv_forward" not in vars(module)
        and (module.groups, module.dilation, module.padding_mode) == (1, (1, 1), "zeros")
        and isinstance(module.padding, tuple)
    )


def is_conv1d(module: torch.nn.Module) -> TypeGuard[torch.nn.Conv1d]:
    """Says whether this is torch's convolution over time without dilation, padded by a number of zeros, without hooks.
    Its weight may be a function of other parameters, such as torch's weight norm."""
    cls = type(module)
    if torch.nn.utils.parametrize.is_parametrized(module) and cls.__bases__ == (torch.nn.Conv1d,):
        known = runs_torchs(cls, torch.nn.Conv1d) and not is_watched(module) and has_known_forward(module)
    else:
        known = is_plain(module, torch.nn.Conv1d)
    return (
        known
        and "_conv_forward" not in vars(module)
        and (module.dilation, module.padding_mode) == ((1,), "zeros")
        and isinstance(module.padding, tuple)
    )


def is_depthwise_conv2d(module: torch.nn.Module) -> TypeGuard[torch.nn.Conv2d]:
    """Says whether this is torch's depthwise convolution of odd taps that keeps both lengths, without hooks."""
    return (
        is_plain(module, torch.nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels
        and (module.stride, module.dilation, module.padding_mode) == ((1, 1), (1, 1), "zeros")
        and module.padding == tuple(k // 2 for k in module.kernel_size)
        and all(k % 2 for k in module.kernel_size)
    )


def is_depthwise_conv(module: Any) -> TypeGuard[torch.nn.Conv1d]:
    """Says whether this is a depthwise convolution over time with equal padding on both sides that keeps the length,
    without hooks.
    """
    return conv_delay(module) == 0 and module.kernel_size[0] % 2 == 1


def patches(conv: Any, x: Tensor) -> Tensor:
    """Returns (B, T', F', taps): what a convolution of one padded map x (B, T, F) multiplies by its weights."""
    (rows, columns), (down, across) = conv.kernel_size, conv.stride
    return x.unfold(1, rows, down).unfold(2, columns, across).flatten(3)
