# SPDX-License-Identifier: Apache-2.0
"""Samples of depthwise_conv_residual, and its benchmark: both branches of an E-Branchformer layer of 512 channels, with
the 3 taps that ESPnet and RETURNN use by default and the 31 of ESPnet's large recipes.

Upstream is ESPnet's code of the merge: a torch.nn.Conv1d between two transpositions, and the sum.
"""

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import BATCH, FRAMES, Case, Implementation, case, costs, module
from fastasr.testing.table import Invalid, Make, OpTable, Sample


def _call(make: Make, batch: int, frames: int, channels: int, taps: int) -> dict:
    return {
        "x": make.normal(batch, frames, channels, scale=1.5, mean=0.3),
        "weight": make.normal(channels, 1, taps, scale=0.4),
        "bias": make.normal(channels, scale=0.5),
    }


def _padded(make: Make, batch: int, frames: int, channels: int, taps: int, delay: int = 0) -> dict:
    padding = make.padding(frames, [max(0, frames - 3 * b) for b in range(batch)])
    return _call(make, batch, frames, channels, taps) | {"padding_mask": padding, "delay": delay}


def _half_of_wider_rows(make: Make) -> dict:
    arguments = _call(make, 2, 21, 24, 3)
    return arguments | {"x": make.normal(2, 21, 48)[..., 24:]}


def _one_bad_frame(make: Make, arguments: dict, value: float) -> dict:
    arguments["x"][0, 9, 3] = value
    return arguments


def _random(make: Make, shape: Shape) -> dict:
    frames, batch, channels = shape.size(), shape.choice((0, 1, 2, 5)), 1 + shape.size()
    taps = shape.choice((1, 2, 3, 4, 7, 15, 31))
    if shape.choice((False, True)):
        return _call(make, batch, frames, channels, taps)
    return _padded(make, batch, frames, channels, taps, shape.choice((-(taps // 2), 0, (taps - 1) // 2)))


TABLE = OpTable(
    op="depthwise_conv_residual",
    samples=(
        Sample("merge", lambda m: _call(m, 2, 14, 12, 3), thorough=True),
        Sample(
            "no bias, weight is a matrix",
            lambda m: _call(m, 3, 30, 16, 5) | {"weight": m.normal(16, 5), "bias": None},
            thorough=True,
        ),
        Sample("memory of SANM", lambda m: _padded(m, 3, 14, 12, 11), thorough=True),
        Sample("causal", lambda m: _padded(m, 2, 13, 10, 4, 1), thorough=True),
        Sample("none of the past", lambda m: _padded(m, 2, 70, 33, 5, -2)),
        Sample("even", lambda m: _call(m, 2, 70, 33, 4)),
        Sample("half of wider rows", _half_of_wider_rows),
        Sample("long kernel", lambda m: _call(m, 2, 70, 33, 31)),
        Sample("one tap", lambda m: _call(m, 2, 70, 40, 1)),
        Sample("shorter than the kernel", lambda m: _call(m, 3, 7, 80, 31)),
        Sample("one frame", lambda m: _call(m, 8, 1, 33, 15)),
        Sample("encoder", lambda m: _call(m, 4, 150, 200, 3), large=True),
        Sample("wide", lambda m: _call(m, 2, 40, 1100, 31), large=True),
        Sample("no frames", lambda m: _call(m, 3, 0, 8, 5)),
        Sample("no sequences", lambda m: _call(m, 0, 4, 8, 5)),
        Sample("infinity", lambda m: _one_bad_frame(m, _call(m, 2, 20, 8, 5), float("inf")), exact=False),
        Sample("NaN", lambda m: _one_bad_frame(m, _call(m, 2, 20, 8, 5), float("nan")), exact=False),
    ),
    invalid=(
        Invalid("x has no channels", lambda m: _call(m, 2, 6, 0, 3), ValueError, "x"),
        Invalid(
            "a delay beyond the frame",
            lambda m: _call(m, 2, 6, 5, 4) | {"delay": 2},
            ValueError,
            "fastasr.depthwise_conv_residual: delay: expected -2 to 1 for 4 taps, got 2",
        ),
    ),
    unread=("weight",),  # some taps reach no frame of a short sequence
    rows=("x", "padding_mask"),
    random=_random,
)


# --- the benchmark


class Merge(torch.nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x.transpose(1, 2)).transpose(1, 2)


def _upstream(x: Tensor, weight: Tensor, bias: Tensor) -> Implementation:
    channels, _, taps = weight.shape
    merge = Merge(channels, channels, taps, padding=taps // 2, groups=channels).to(x)
    return module(merge, x, weight=weight, bias=bias)


def sized(T: int = 400, B: int = 4, C: int = 1024, K: int = 3) -> Case:
    shape, n = (B, T, C), B * T * C
    passes = costs((2 * n, 2 * n * K), (3 * n, 4 * n * K))  # x; y. x, dy; dx
    note, others = f", {K} taps", {"upstream": _upstream}
    return case("depthwise_conv_residual", shape, lambda m: _call(m, *shape, K), passes, note, others=others)


CASES = (sized(), sized(K=31))
ON_DEVICE = (sized(FRAMES // 2, BATCH),)
WATCH = "x read as a map of one pixel's width; groups of four frames where there are three taps"
