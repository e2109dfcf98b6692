# SPDX-License-Identifier: Apache-2.0
"""Samples of depthwise_conv2d, and its benchmark: the ConvNeXt layer of Zipformer's front end with 4 x 16 s of
features, 128 channels at 19 frequencies, 7 x 7 taps; and the same for one streaming step of 32 frames behind its cache.

Upstream is its torch.nn.Conv2d on maps with channels first, as in its front end.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import BATCH, FORWARD, FRAMES, Case, Implementation, case, costs, module
from fastasr.testing.table import Make, OpTable, Sample, invalid


def _maps(
    make: Make,
    shape: tuple[int, ...],
    taps: tuple[int, int] = (7, 7),
    padding: tuple[int, int] = (3, 3),
    **options: Any,
) -> dict:
    channels = shape[-1]
    return {
        "x": make.normal(*shape),
        "weight": make.normal(channels, 1, *taps, scale=0.2),
        "bias": make.normal(channels),
        "padding": padding,
        **options,
    }


def _random(make: Make, shape: Shape) -> dict:
    taps = shape.choice((1, 2, 3, 5, 7)), shape.choice((1, 3, 4, 7, 9))
    padding = shape.choice(range(taps[0])), shape.choice(range(taps[1]))
    least = [max(1, k - 2 * p) for k, p in zip(taps, padding, strict=True)]
    frames, width = least[0] + shape.choice((0, 1, 2, 5, 33, 64)), least[1] + shape.choice((0, 1, 3, 9, 18))
    batch, channels = shape.choice((0, 1, 2, 5)), shape.choice((0, 1, 3, 8, 16, 17, 33))
    return _maps(make, (batch, frames, width, channels), taps, padding) | (
        {"bias": None} if shape.choice((False, True)) else {}
    )


def _one_bad_pixel(make: Make, value: float) -> dict:
    arguments = _maps(make, (2, 12, 9, 5), (5, 3), (2, 1))
    arguments["x"][0, 9, 4, 3] = value
    return arguments


TABLE = OpTable(
    op="depthwise_conv2d",
    samples=(
        Sample("maps", lambda m: _maps(m, (2, 6, 5, 4), (3, 5), (1, 2)), thorough=True),
        Sample("no bias", lambda m: _maps(m, (1, 5, 4, 3), (3, 3), (2, 0), bias=None), thorough=True),
        Sample(
            "weight without its 1",
            lambda m: _maps(m, (2, 8, 9, 6), (3, 3), (1, 1)) | {"weight": m.normal(6, 3, 3)},
        ),
        Sample("ConvNeXt", lambda m: _maps(m, (2, 37, 19, 32)), large=True),
        Sample("one block and a frame", lambda m: _maps(m, (1, 33, 9, 40)), large=True),
        Sample("streaming: the cache's frames are before", lambda m: _maps(m, (1, 9, 6, 24), (5, 3), (0, 1))),
        Sample("two blocks of channels", lambda m: _maps(m, (2, 5, 4, 70), (3, 3), (1, 1))),
        Sample("many sequences", lambda m: _maps(m, (40, 3, 4, 5), (3, 3), (1, 1))),
        Sample("one frame", lambda m: _maps(m, (3, 1, 9, 17), (5, 3), (2, 1))),
        Sample("one pixel", lambda m: _maps(m, (2, 9, 1, 16), (3, 1), (1, 0))),
        Sample("one tap", lambda m: _maps(m, (2, 9, 5, 18), (1, 1), (0, 0))),
        Sample("even taps", lambda m: _maps(m, (2, 5, 6, 8), (2, 4), (1, 2))),
        Sample("padding as wide as the taps", lambda m: _maps(m, (2, 4, 5, 8), (3, 4), (2, 3))),
        Sample("one channel", lambda m: _maps(m, (2, 12, 7, 1), (5, 3), (2, 1))),
        Sample("no sequences", lambda m: _maps(m, (0, 9, 5, 8))),
        Sample("no channels", lambda m: _maps(m, (2, 9, 5, 0))),
        Sample("infinity in one pixel", lambda m: _one_bad_pixel(m, float("inf")), exact=False),
        Sample("NaN in one pixel", lambda m: _one_bad_pixel(m, float("nan")), exact=False),
    ),
    invalid=(
        *invalid(
            lambda m: _maps(m, (2, 5, 4, 3), (3, 3), (0, 0)),
            ("x is smaller than the kernel", "x", lambda m: m.normal(2, 2, 4, 3)),
        ),
        *invalid(
            lambda m: _maps(m, (2, 5, 4, 3), (3, 3), (1, 1)),
            ("x has no frames", "x", lambda m: m.normal(2, 0, 4, 3)),
            ("weight has no taps", "weight", lambda m: m.normal(3, 1, 3, 0)),
            ("negative padding", "padding", (-1, 1)),
            ("padding beyond the taps", "padding", (1, 3)),
        ),
    ),
    rows=("x",),
    random=_random,
)


# --- the benchmark


def _upstream(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Implementation:
    channels, _, *taps = weight.shape
    conv = torch.nn.Conv2d(channels, channels, (taps[0], taps[1]), padding=padding, groups=channels).to(x)
    return module(conv, x.permute(0, 3, 1, 2).contiguous(), weight=weight, bias=bias)


def _case(
    shape: tuple[int, ...],
    padding: tuple[int, int] = (3, 3),
    note: str = "",
    taps: tuple[int, int] = (7, 7),
    **options: Any,
) -> Case:
    batch, frames, width, channels = shape
    out_frames, out_width = frames + 2 * padding[0] - taps[0] + 1, width + 2 * padding[1] - taps[1] + 1
    into, out = math.prod(shape), batch * out_frames * out_width * channels
    products = 2 * out * taps[0] * taps[1]
    moved = costs((into + out, products), (2 * into + out, 2 * products))  # x; y. x, dy; dx
    note = f", {taps[0]}x{taps[1]} taps{note}"
    options |= {"others": {"upstream": _upstream}}
    return case("depthwise_conv2d", shape, lambda m: _maps(m, shape, taps, padding), moved, note, **options)


def sized(T: int = 796, B: int = 4, F: int = 19, C: int = 128, K: int = 7, L: int = 7) -> Case:
    return _case((B, T, F, C), (K // 2, L // 2), taps=(K, L))


CASES = (
    _case((4, 796, 19, 128)),
    _case((4, 396, 19, 128)),
    _case((1, 22, 19, 128), (0, 3), ", one streaming step", passes=(FORWARD,)),
)
ON_DEVICE = (_case((BATCH, FRAMES, 19, 128)),)  # a front end
WATCH = (
    "registers of the loop over columns; its pixels in the first-level cache; the weights' gradients in parts"
)
