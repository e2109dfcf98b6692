# SPDX-License-Identifier: Apache-2.0
"""Samples of conv_spatial_gate, and its benchmark at the sizes of ESPnet's E-Branchformers: 3072 linear units of the
large one, 1024 of a small one. Upstream is ESPnet's ConvolutionalSpatialGatingUnit.
"""

from typing import Any

from torch import Tensor

from fastasr.ops import _activation
from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import BATCH, Case, Implementation, case, costs, module, upstream_member
from fastasr.testing.table import Make, OpTable, Sample


def _call(
    make: Make, batch: int, frames: int, channels: int, taps: int, masked: bool = True, **options: Any
) -> dict:
    mask = (
        {"padding_mask": make.padding(frames, [max(0, frames - 2 * b) for b in range(batch)])}
        if masked
        else {}
    )
    return {
        "x": make.normal(batch, frames, 2 * channels, scale=1.5, mean=0.3),
        "norm_weight": make.normal(channels, scale=0.3, mean=1.0),
        "norm_bias": make.normal(channels, scale=0.2),
        "weight": make.normal(channels, 1, taps, scale=0.3),
        "bias": make.normal(channels, mean=1.0),
        **mask,
        **options,
    }


def _one_bad_frame(make: Make, arguments: dict, value: float) -> dict:
    arguments["x"][0, 9, 3] = value
    arguments["x"][0, 5, -2] = value
    return arguments


def _random(make: Make, shape: Shape) -> dict:
    frames, batch, channels = shape.size(), shape.choice((0, 1, 2, 5)), 1 + shape.size()
    taps = shape.choice((1, 3, 7, 15, 31))
    # with few channels and a small eps, LayerNorm may divide by a number that is only rounding error
    options: dict[str, Any] = {"activation": shape.choice(_activation.NAMES), "eps": shape.choice((0.1, 1.0))}
    return _call(make, batch, frames, channels, taps) | options


TABLE = OpTable(
    op="conv_spatial_gate",
    samples=(
        Sample("gate", lambda m: _call(m, 2, 14, 12, 7), thorough=True),
        Sample(
            "no mask, no bias, weight is a matrix",
            lambda m: (
                _call(m, 3, 13, 16, 5, masked=False, eps=1e-12) | {"weight": m.normal(16, 5), "bias": None}
            ),
            thorough=True,
        ),
        Sample("silu gate", lambda m: _call(m, 2, 20, 18, 3, activation="silu"), thorough=True),
        Sample("gelu gate", lambda m: _call(m, 2, 21, 33, 15, activation="gelu")),
        Sample("tanh gate", lambda m: _call(m, 2, 19, 40, 5, activation="tanh")),
        Sample("gelu gate, more frames", lambda m: _call(m, 2, 70, 33, 15, activation="gelu"), large=True),
        Sample("tanh gate, more frames", lambda m: _call(m, 2, 70, 40, 5, activation="tanh"), large=True),
        Sample("one tap", lambda m: _call(m, 2, 17, 64, 1)),
        Sample("one tap, more frames", lambda m: _call(m, 3, 130, 64, 1), large=True),
        Sample("shorter than the kernel", lambda m: _call(m, 3, 7, 80, 31)),
        Sample("one frame", lambda m: _call(m, 8, 1, 33, 15)),
        Sample("encoder", lambda m: _call(m, 4, 150, 200, 31), large=True),
        Sample("wide", lambda m: _call(m, 2, 40, 1100, 31), large=True),
        Sample("no frames", lambda m: _call(m, 3, 0, 8, 5)),
        Sample("no sequences", lambda m: _call(m, 0, 4, 8, 5)),
        Sample(
            "infinity in two frames",
            lambda m: _one_bad_frame(m, _call(m, 2, 20, 8, 5), float("inf")),
            exact=False,
        ),
        Sample(
            "NaN in two frames", lambda m: _one_bad_frame(m, _call(m, 2, 20, 8, 5), float("nan")), exact=False
        ),
    ),
    unread=("weight",),  # some taps reach no frame of a short sequence
    rows=("x", "padding_mask"),
    random=_random,
)


# --- the benchmark


def _upstream(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Implementation:
    unit = upstream_member("espnet2.asr.layers.cgmlp.ConvolutionalSpatialGatingUnit")
    unit = unit(2 * weight.shape[0], weight.shape[-1], 0.0, False, "identity").to(x)
    parameters: dict[str, Any] = {"norm.weight": norm_weight, "norm.bias": norm_bias}
    parameters |= {"conv.weight": weight, "conv.bias": bias}
    return module(unit, x, **parameters)


def sized(T: int = 400, B: int = 4, C: int = 1536, K: int = 31) -> Case:
    shape, n = (B, T, C), B * T * C
    passes = costs((3 * n, 2 * n * K), (5 * n, 6 * n * K))

    def arguments(make: Make) -> dict:
        return _call(make, *shape, K, masked=False, eps=1e-12)

    others = {"upstream": _upstream}
    return case("conv_spatial_gate", shape, arguments, passes, f", {K} taps", others=others)


CASES = (sized(), sized(C=512))
ON_DEVICE = (sized(750, BATCH), sized(750, BATCH, 512))
WATCH = "groups of eight frames from registers; rows of up to 65536 channels in registers; seven launches backward"
