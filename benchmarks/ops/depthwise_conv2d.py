# SPDX-License-Identifier: Apache-2.0
"""depthwise_conv2d as the ConvNeXt layer of Zipformer's front end calls it: 4 x 16 s of features, 128 channels at 19
frequencies, 7 x 7 taps; and the same for one streaming step of 32 frames behind its cache.

Upstream is its torch.nn.Conv2d on channels_first maps, as its front end has them.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import BATCH, FORWARD, FRAMES, PASSES, Case, costs, module, shaped, versions


def _upstream(padding, x, weight, bias):
    channels, _, *taps = weight.shape
    conv = torch.nn.Conv2d(channels, channels, taps, padding=padding, groups=channels).to(x)
    return module(conv, x.permute(0, 3, 1, 2).contiguous(), weight=weight, bias=bias)


def _case(shape, taps, padding=None, passes=PASSES, note: str = "") -> Case:
    padding = tuple(k // 2 for k in taps) if padding is None else padding

    def make(device: str, dtype: torch.dtype):
        randn = partial(torch.randn, device=device, dtype=dtype)
        inputs = randn(shape), 0.15 * randn(shape[-1], 1, *taps), randn(shape[-1])
        upstream = {"upstream": lambda: _upstream(padding, *inputs)}
        return versions(ops.depthwise_conv2d, *inputs, options={"padding": padding}, others=upstream)

    batch, frames, width, channels = shape
    into = batch * frames * width * channels
    out_frames, out_width = frames + 2 * padding[0] - taps[0] + 1, width + 2 * padding[1] - taps[1] + 1
    out = batch * out_frames * out_width * channels
    products = 2 * out * taps[0] * taps[1]
    moved = costs((into + out, products), (2 * into + out, 2 * products))  # x; y. x, dy; dx
    note = f", {taps[0]}x{taps[1]} taps{note}"
    return shaped("depthwise_conv2d", shape, make, moved, note, passes=passes)


CASES = (
    _case((4, 796, 19, 128), (7, 7)),
    _case((4, 396, 19, 128), (7, 7)),
    _case((1, 22, 19, 128), (7, 7), (0, 3), (FORWARD,), ", one streaming step"),
)
ON_DEVICE = (_case((BATCH, FRAMES, 19, 128), (7, 7)),)  # a front end
