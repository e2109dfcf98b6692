# SPDX-License-Identifier: Apache-2.0
"""Samples of conv_subsampling, and its benchmark: the front end of a FastConformer with 256 channels and 80 mel bins, a
batch of 4 x 16 s, one recording of 30 s, and a step of a stream. Upstream is ``ParakeetEncoder``'s code, whose maps
have channels first.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import BATCH, FORWARD, FRAMES, Case, Implementation, case, costs, parameters
from fastasr.testing.table import Make, OpTable, Sample


def _call(
    make: Make, batch: int, frames: int, bins: int, channels: int, masked: bool = True, **options: Any
) -> dict:
    first = (frames - 1) // 2
    mask = {"mask": ~make.padding(first, [max(0, first - 2 * b) for b in range(batch)])} if masked else {}
    return {
        "x": make.normal(batch, frames, bins),
        "weight": make.normal(channels, 1, 3, 3, scale=0.3),
        "bias": make.normal(channels, scale=0.3),
        "depthwise_weight": make.normal(channels, 1, 3, 3, scale=0.3),
        "depthwise_bias": make.normal(channels),
        **mask,
        **options,
    }


def _random(make: Make, shape: Shape) -> dict:
    frames, bins = 7 + shape.choice((0, 1, 2, 3, 4, 20, 66, 131)), 3 + shape.choice((0, 1, 2, 3, 17, 40))
    batch, channels = shape.choice((0, 1, 2, 5)), shape.choice((1, 3, 8, 16, 17, 33))
    options: dict[str, Any] = {"left": shape.choice((1, 2))}
    if shape.choice((False, True)):
        options |= {"bias": None, "depthwise_bias": None}
    return _call(make, batch, frames, bins, channels, shape.choice((False, True)), **options)


def _one_bad_frame(make: Make) -> dict:
    arguments = _call(make, 2, 23, 9, 5)
    arguments["x"][0, 9, 4] = float("nan")
    return arguments


def _one_bad_weight(make: Make) -> dict:
    arguments = _call(make, 2, 23, 9, 5)
    arguments["weight"][2, 0, 1, 2] = float("nan")
    return arguments


TABLE = OpTable(
    op="conv_subsampling",
    samples=(
        Sample("masked", lambda m: _call(m, 2, 17, 9, 4), thorough=True),
        Sample(
            "no mask, no biases",
            lambda m: _call(m, 1, 12, 8, 3, masked=False, bias=None, depthwise_bias=None),
            thorough=True,
        ),
        Sample("causal", lambda m: _call(m, 2, 15, 10, 6, left=2), thorough=True),
        Sample("a front end", lambda m: _call(m, 2, 67, 81, 40), large=True),
        Sample("causal, several blocks", lambda m: _call(m, 2, 150, 21, 33, left=2), large=True),
        Sample("one frame, one column", lambda m: _call(m, 2, 7, 3, 17)),
        Sample("one frame, one column, causal", lambda m: _call(m, 2, 8, 4, 17, left=2)),
        Sample("two blocks of channels", lambda m: _call(m, 1, 11, 7, 70)),
        Sample("one channel", lambda m: _call(m, 3, 20, 12, 1)),
        Sample("all frames masked", lambda m: _call(m, 1, 11, 7, 8) | {"mask": torch.zeros(1, 5).bool()}),
        Sample("no sequences", lambda m: _call(m, 0, 11, 7, 8)),
        # NaN alone: torch's bfloat16 convolution turns an infinity into NaN.
        Sample("NaN in one frame", _one_bad_frame, exact=False),
        Sample("NaN in one weight", _one_bad_weight, exact=False),
    ),
    rows=("x", "mask"),
    random=_random,
)


# --- the benchmark
PARAMETERS = ("weight", "bias", "depthwise_weight", "depthwise_bias")


def _upstream(
    x: Tensor, weight: Tensor, bias: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor, mask: Tensor
) -> Implementation:
    channels = weight.shape[0]
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, 2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, channels, 3, 2, (0, 1), groups=channels),
    ).to(x)
    for layer, values in ((layers[0], (weight, bias)), (layers[2], (depthwise_weight, depthwise_bias))):
        layer.weight.data, layer.bias.data = (v.detach().clone() for v in values)
    return Implementation(partial(layers, x.unsqueeze(1)), parameters(*layers.parameters()))


def _case(batch: int, frames: int, bins: int = 80, channels: int = 256, **options: Any) -> Case:
    padded = frames + 2, bins + 2
    first, wide = (padded[0] - 1) // 2, (padded[1] - 1) // 2
    into, out = batch * padded[0] * padded[1], batch * ((first - 1) // 2) * ((wide + 1) // 2) * channels
    products = 2 * 9 * (batch * first * wide * channels + out)
    moved = costs((into + out, products), (into + out, 3 * products))  # x, y; x, dy: h, dh and the weights'
    options |= {"others": {"upstream": _upstream}, "differentiable": PARAMETERS}  # features have no gradient
    shape = batch, frames, bins, channels
    return case("conv_subsampling", shape, lambda m: _call(m, batch, *padded, channels), moved, **options)


def sized(T: int = 1602, B: int = 4, F: int = 82, C: int = 256) -> Case:
    return _case(B, T - 2, F - 2, C)  # the front end pads two frames and two bins


CASES = (_case(4, 1600), _case(1, 3000), _case(1, 16, passes=(FORWARD,)))
ON_DEVICE = (_case(BATCH, FRAMES),)
WATCH = "the first convolution is computed again for every tap of the second"
