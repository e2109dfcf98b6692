# SPDX-License-Identifier: Apache-2.0
"""depthwise_conv2d as the ConvNeXt layer of Zipformer's front end calls it: 4 x 16 s of features, 128 channels at 19
frequencies, 7 x 7 taps; and the same for one streaming step of 32 frames behind its cache.

Upstream is its torch.nn.Conv2d on channels_first maps, as its front end has them.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    FORWARD,
    FRAMES,
    PASSES,
    Case,
    Cost,
    Implementation,
    compiled,
    costs_of,
    parameters,
    simple,
)


def _upstream(padding, x, weight, bias) -> Implementation:
    channels, _, *taps = weight.shape
    conv = torch.nn.Conv2d(channels, channels, taps, padding=padding, groups=channels).to(x)
    conv.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    maps = x.permute(0, 3, 1, 2).contiguous()
    return Implementation(lambda: conv(maps), parameters(maps, *conv.parameters()))


def _make(shape, taps, padding, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    inputs = make(shape), 0.15 * make(shape[-1], 1, *taps), make(shape[-1])
    eager, ours = (
        partial(f, padding=padding) for f in (ops.depthwise_conv2d.definition, ops.depthwise_conv2d)
    )
    return {
        "eager": lambda: simple(eager, *inputs),
        "compile": lambda: simple(
            partial(compiled(ops.depthwise_conv2d.definition), padding=padding), *inputs
        ),
        "upstream": lambda: _upstream(padding, *inputs),
        "fastasr": lambda: simple(ours, *inputs),
    }


def _costs(shape, taps, padding, size: int) -> dict[str, Cost]:
    batch, frames, width, channels = shape
    into = batch * frames * width * channels
    out_frames, out_width = frames + 2 * padding[0] - taps[0] + 1, width + 2 * padding[1] - taps[1] + 1
    out = batch * out_frames * out_width * channels
    products = 2 * out * taps[0] * taps[1]
    return costs_of(
        Cost((into + out) * size, products),  # x; y
        Cost((2 * into + out) * size, 2 * products),  # x, dy; dx
    )


def _case(shape, taps, padding=None, passes=PASSES, note: str = "") -> Case:
    padding = tuple(k // 2 for k in taps) if padding is None else padding
    name = "x".join(map(str, shape)) + f", {taps[0]}x{taps[1]} taps" + note
    costs = partial(_costs, shape, taps, padding)
    return Case("depthwise_conv2d", name, name, partial(_make, shape, taps, padding), costs, passes=passes)


CASES = (
    _case((4, 796, 19, 128), (7, 7)),
    _case((4, 396, 19, 128), (7, 7)),
    _case((1, 22, 19, 128), (7, 7), (0, 3), (FORWARD,), ", one streaming step"),
)
ON_DEVICE = (_case((BATCH, FRAMES, 19, 128), (7, 7)),)  # a front end
