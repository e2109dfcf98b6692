# SPDX-License-Identifier: Apache-2.0
"""Samples of batch_norm_activation, and its benchmark at the sizes of a FastConformer of 110M parameters: a batch and a
row of recordings.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import Case, case, costs
from fastasr.testing.table import Make, OpTable, Sample


def _call(
    make: Make, shape: tuple[int, ...], scale: float = 1.0, mean: float = 0.3, **options: Any
) -> dict[str, Any]:
    channels = shape[-1]
    return {
        "x": make.normal(*shape, scale=scale, mean=mean * scale),
        "weight": make.normal(channels, scale=0.3, mean=1.0),
        "bias": make.normal(channels, scale=0.2),
        "padding_mask": None,
        **options,
    }


def _padded(make: Make, lengths: tuple[int, ...], frames: int, channels: int, **options: Any) -> dict:
    """Makes a call whose padding is NaN: nothing reads it."""
    call = _call(make, (len(lengths), frames, channels), **options)
    mask = make.padding(frames, lengths)
    call["x"] = call["x"].masked_fill(mask.unsqueeze(-1), math.nan)
    return call | {"padding_mask": mask}


def _gaps(frames: int, every: int) -> Tensor:
    """Returns (1, frames), True at each frame with this number, as between recordings in a row."""
    return (torch.arange(frames) % every == every // 2)[None]


def _row(make: Make, frames: int, channels: int, every: int, **options: Any) -> dict:
    return _call(make, (1, frames, channels), padding_mask=_gaps(frames, every), **options)


def _wide_parameters(make: Make, *shape: int, **options: Any) -> dict:
    """Makes a call under autocast: the parameters are float32."""
    wide = _call(Make(dtype=torch.float32, device=make.device, seed=3), shape, **options)
    return wide | {"x": make.normal(*shape)}


def _random(make: Make, shape: Shape) -> dict:
    frames = shape()
    call = _call(
        make,
        (*frames, 1 + shape.size()),
        eps=shape.choice((0.1, 1.0)),  # the variance of few frames may be rounding error
        momentum=shape.choice((0.0, 0.1, 1.0)),
        activation=shape.choice(("identity", "silu", "relu", "tanh", "gelu")),
    )
    if shape.choice((True, False)):
        call["padding_mask"] = make.uniform(*frames) < shape.choice((0.1, 0.5, 0.9))
    return call


TABLE = OpTable(
    op="batch_norm_activation",
    samples=(
        Sample("btc", lambda m: _call(m, (4, 5, 11)), thorough=True),
        Sample(
            "padded",
            lambda m: _row(m, 23, 12, 4, activation="identity", momentum=0.3, eps=1e-3),
            thorough=True,
        ),
        Sample("padding is not read", lambda m: _padded(m, (9, 4, 0), 9, 40)),
        Sample("odd channels", lambda m: _call(m, (61, 193))),
        Sample("the norm alone", lambda m: _call(m, (6, 7, 33), activation="identity")),
        Sample("relu", lambda m: _row(m, 30, 40, 7, activation="relu"), exact=False),
        Sample("tanh", lambda m: _row(m, 30, 24, 3, activation="tanh")),
        Sample("gelu", lambda m: _call(m, (40, 24), activation="gelu")),
        Sample("block", lambda m: _call(m, (4, 40, 512))),
        Sample("row", lambda m: _row(m, 300, 96, 13)),
        Sample("many frames of few channels", lambda m: _row(m, 900, 5, 2, eps=0.1)),
        Sample("long", lambda m: _call(m, (4, 500, 64)), large=True),
        Sample("a channel", lambda m: _call(m, (70, 1))),
        Sample("large mean", lambda m: _call(m, (300, 24), scale=0.1, mean=1000.0), draws=4),
        Sample("large values", lambda m: _call(m, (30, 24), scale=50.0)),
        Sample("no epsilon", lambda m: _call(m, (30, 40), eps=0.0)),
        Sample("two frames", lambda m: _call(m, (1, 2, 40), eps=0.1)),
        Sample("one frame", lambda m: _call(m, (1, 1, 40), momentum=0.5)),
        Sample("vector", lambda m: _call(m, (40,)), exact=False),
        Sample("every frame is padding", lambda m: _padded(m, (0, 0), 4, 12)),
        Sample("no frames", lambda m: _call(m, (0, 3, 8))),
        Sample("equal frames", lambda m: _call(m, (40, 8), scale=0.0), exact=False),
        Sample("parameters in float32", lambda m: _wide_parameters(m, 30, 2, 256)),
        Sample(
            "NaN",
            lambda m: (
                _call(m, (3, 4)) | {"x": m.values(1, float("nan"), 2, 3, 1, 5, 2, 3, 1, 2, 3, 4).view(3, 4)}
            ),
            exact=False,
        ),
    ),
    random=_random,
)


# --- the benchmark


def _case(*shape: int, row: bool = False) -> Case:
    n = math.prod(shape)
    passes = costs((3 * n, 0), (5 * n, 0))  # x; x, y. x, dy; x, dy, dx

    def make(m: Make) -> dict:
        return _row(m, shape[1], shape[2], 40) if row else _call(m, shape)

    return case("batch_norm_activation", shape, make, passes, ", row" * row, copy=True)


def sized(T: int = 188, B: int = 16, C: int = 512) -> Case:
    return _case(B, T, C)


CASES = ON_DEVICE = (_case(16, 188, 512), _case(4, 375, 512), _case(1, 3008, 512, row=True))
WATCH = "float64 tables added up before each tile; parts of padding alone; `ex2` and the reciprocal of the activation"
