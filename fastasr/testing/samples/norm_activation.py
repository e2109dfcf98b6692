# SPDX-License-Identifier: Apache-2.0
"""Samples of norm_activation, and its benchmark at the sizes of w2v-BERT 2.0 and of Nemotron's streaming encoder."""

import math
from typing import Any

import torch

from fastasr.testing.speed import Case, case, costs
from fastasr.testing.table import Make, OpTable, Sample


def _call(
    make: Make,
    shape: tuple[int, ...],
    eps: float = 1e-5,
    scale: float = 1.0,
    bias: bool = True,
    **options: Any,
) -> dict:
    channels = shape[-1]
    return {
        "x": make.normal(*shape, scale=scale, mean=0.3 * scale),
        "weight": make.normal(channels, scale=0.3, mean=1.0),
        "bias": make.normal(channels, scale=0.2) if bias else None,
        "eps": eps,
    } | options


def _wide_parameters(make: Make, *shape: int, **options: Any) -> dict:
    """Makes a call under autocast: the parameters are float32."""
    wide = _call(Make(dtype=torch.float32, device=make.device, seed=3), shape, **options)
    return wide | {"x": make.normal(*shape)}


def _infinite(make: Make, **options: Any) -> dict:
    call = _call(make, (3, 8), kind="rms", bias=False, **options)
    call["x"][0, 3], call["x"][1, 5] = math.inf, -math.inf
    return call


TABLE = OpTable(
    op="norm_activation",
    samples=(
        Sample("btc", lambda m: _call(m, (4, 2, 11)), thorough=True),
        Sample("rms", lambda m: _call(m, (4, 2, 12), kind="rms", bias=False), thorough=True),
        Sample("rms with a bias, gelu", lambda m: _call(m, (3, 40), kind="rms", activation="gelu")),
        Sample("no bias, tanh", lambda m: _call(m, (5, 3, 24), bias=False, activation="tanh")),
        Sample("relu", lambda m: _call(m, (3, 2, 40), activation="relu"), exact=False),
        Sample("the norm alone", lambda m: _call(m, (6, 33), activation="identity")),
        Sample("odd channels", lambda m: _call(m, (11, 193))),
        Sample("block", lambda m: _call(m, (40, 4, 512))),
        Sample("block, rms", lambda m: _call(m, (50, 2, 512), kind="rms", bias=False)),
        Sample("wide", lambda m: _call(m, (3, 2070))),
        Sample("limited", lambda m: _call(m, (4, 2, 12), limit=1.317), thorough=True),
        Sample("limited, rms", lambda m: _call(m, (50, 2, 512), kind="rms", bias=False, limit=1.713)),
        Sample("a limit that no dtype reaches", lambda m: _call(m, (3, 40), kind="rms", limit=1e39)),
        Sample("infinities within a limit", lambda m: _infinite(m, limit=1e4), exact=False),
        Sample("vector", lambda m: _call(m, (40,)), exact=False),
        Sample("five channels", lambda m: _call(m, (300, 5), eps=0.1)),
        Sample("no epsilon", lambda m: _call(m, (3, 40), eps=0.0)),
        Sample("large values", lambda m: _call(m, (5, 3, 24), scale=50.0)),
        Sample("no rows", lambda m: _call(m, (0, 3, 8))),
        Sample("rows of zeros", lambda m: _call(m, (4, 8), scale=0.0), exact=False),
        Sample("parameters in float32", lambda m: _wide_parameters(m, 30, 2, 256)),
        Sample("parameters in float32, rms", lambda m: _wide_parameters(m, 9, 192, kind="rms")),
        Sample(
            "NaN and inf",
            lambda m: (
                _call(m, (3, 4))
                | {"x": m.values(1, float("nan"), 2, 3, 1, float("inf"), 2, 3, 1, 2, 3, 4).view(3, 4)}
            ),
            exact=False,
        ),
    ),
    rows=("x",),
    # With few channels and a small eps, LayerNorm may divide by a number that is only rounding error.
    random=lambda m, shape: _call(
        m,
        (*shape(), 1 + shape.size()),
        eps=shape.choice((0.1, 1.0)),
        bias=shape.choice((True, False)),
        kind=shape.choice(("layer", "rms")),
        limit=shape.choice((0.0, 1.3125)),  # of float32 and float64: both see the same elements beyond it
    ),
)


# --- the benchmark


def sized(T: int = 750, B: int = 4, C: int = 1024) -> Case:
    shape, n = (B, T, C), B * T * C
    passes = costs((2 * n, 0), (3 * n, 0))  # x; y. x, dy; dx
    return case("norm_activation", shape, lambda m: _call(m, shape), passes, copy=True)


CASES = ON_DEVICE = (sized(), sized(188, 16, 512))
WATCH = "the mean in two parts; `ex2` and the reciprocal of the activation; it uses residual_norm's tiles"
