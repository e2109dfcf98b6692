# SPDX-License-Identifier: Apache-2.0
"""The convolutions of a front end, over time or over time and frequency, and the projection of its frames.

    y = W frames(conv(x)) + b       frames: channels and frequencies of a frame

On a CPU in float32, convolutions of many channels are matrix products with channels last in memory, where these take
less time than torch's convolution.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations

from fastasr import ops
from fastasr._recording import is_traced
from fastasr._transforms import is_transformed
from fastasr.models.common import plumbing
from fastasr.models.common.linear import Linear
from fastasr.models.common.plain import is_plain
from fastasr.ops import _conv1d, _conv2d, _kept, _reduced_weights

# convolution -> a record of the parameters of its weight norm, and the weight
_NORMED: weakref.WeakKeyDictionary[torch.nn.Module, tuple[_kept.Originals, Tensor]] = (
    weakref.WeakKeyDictionary()
)


def are_plain(layers: Iterable[torch.nn.Module]) -> bool:
    """Says whether these are torch's ReLUs and convolutions without hooks."""
    return all(plumbing.is_dense_conv2d(layer) or is_plain(layer, torch.nn.ReLU) for layer in layers)


def in_sequence(conv: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns ``conv(x)`` for maps x (batch, 1, time, frequency)."""
    if is_plain(conv, torch.nn.Sequential) and are_plain(conv):
        return convolved(conv, x)
    y: Tensor = conv(x)
    return y


def convolved(
    layers: Iterable[torch.nn.Module], x: Tensor, behind: Callable[[Any, Tensor], Tensor] = lambda conv, x: x
) -> Tensor:
    """Returns maps x (batch, channels, time, frequency) behind ``layers``, which are plain. ``behind(conv, maps)``
    follows each convolution; it may change the maps in place."""
    relu = False  # is still to be applied
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            x, relu = behind(layer, _convolution(relu, layer, x)), False
        else:
            relu = True
    return x.relu() if relu else x


def _convolution(relu: bool, conv: Any, x: Tensor) -> Tensor:
    operands = x, conv.weight, conv.bias, conv.stride, conv.padding
    ours = x.dim() == 4 and _conv2d.serves(*operands)
    if ours and _conv2d.is_faster(*operands):
        if conv.in_channels > 1:
            return _conv2d.convolution(*operands, relu)
        seen = _conv2d.seen(x.relu() if relu else x, conv.weight, conv.stride, conv.padding)
        return ops.linear(seen, conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
    if ours and conv.in_channels == 1:
        # The next convolution wants channels last. Of one channel, contiguous(memory_format=...) would return x itself.
        x = x.to(memory_format=torch.channels_last)
    elif ours:
        x = x.contiguous()  # with channels last torch's sums are less exact
    return F.conv2d(x.relu() if relu else x, *operands[1:])


def over_time(conv: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns ``conv(x)`` for a convolution of x (B, channels, T), with channels last in memory if it is ours."""
    if plumbing.is_conv1d(conv):
        return conv1d(conv, x)
    y: Tensor = conv(x)
    return y


def release(conv: torch.nn.Module) -> None:
    """Frees the weight that is kept for ``conv``."""
    _NORMED.pop(conv, None)


def _weight(conv: Any) -> Tensor:
    """Returns ``conv.weight``. torch's weight norm computes it at each reading: for 128 taps of 1,024 channels, as in
    wav2vec 2.0, this takes as long as the convolution of two seconds. Without gradients it is kept on a CPU."""
    found = getattr(conv, "parametrizations", {})
    if torch.is_grad_enabled() or "weight" not in found or is_traced() or is_transformed():
        weight: Tensor = conv.weight
        return weight
    normed = found["weight"]
    parts = list(normed.parameters())
    norms = len(normed) == 1 and is_plain(normed[0], parametrizations._WeightNorm)
    if not norms or not _kept.are_counted(parts) or not all(t.is_cpu for t in parts):
        return conv.weight
    kept = _NORMED.get(conv)
    if kept is None or not kept[0].unchanged(parts):
        kept = _NORMED[conv] = _kept.Originals(parts), conv.weight
    return kept[1]


# What is bound to convolutions that upstream's code calls
def conv1d(self: Any, input: Tensor) -> Tensor:
    """(B, channels, T) -> (B, channels', T'), with channels last in memory if it is ours."""
    operands = input, _weight(self), self.bias, self.stride[0], self.padding[0]
    if _conv1d.serves(*operands, self.groups) and _conv1d.is_faster(*operands, self.groups):
        return _conv1d.convolution(*operands, self.groups)
    return F.conv1d(*operands, groups=self.groups)


def conv2d(self: Any, input: Tensor) -> Tensor:
    """(B, channels, T, F) -> (B, channels', T', F'), in the same way."""
    return _convolution(False, self, input)


def frames(x: Tensor) -> Tensor:
    """(batch, channels, time, frequency) -> (batch, time, channels * frequency)"""
    return x.transpose(1, 2).flatten(2)


def projected(out: Any, x: Tensor) -> Tensor:
    """Returns ``out(frames(x))``. Where x has channels last and there are many frames, the columns of the weight are
    reordered in place of the frames, which would be a slow pass over more memory, and one more for their gradient."""
    batch, channels, time, frequency = x.shape
    maps = x.permute(0, 2, 3, 1)
    plain = is_plain(out, torch.nn.Linear, Linear)
    # a compiler reorders by itself; weights of fewer bits are known by the parameter
    kept = not plain or torch.compiler.is_compiling() or is_transformed()
    kept = kept or _reduced_weights.of(x, out.weight) is not None
    if kept or not maps.is_contiguous() or batch * time <= 2 * out.out_features:
        y: Tensor = out(frames(x))
        return y
    weight = out.weight.unflatten(1, (channels, frequency)).transpose(1, 2).flatten(1)
    return ops.linear(maps.flatten(2), weight, out.bias)
