# SPDX-License-Identifier: Apache-2.0
"""Samples of swoosh_l, and its benchmark; swoosh_r has the same samples with its own definition."""

import math
from typing import Any

from torch import Tensor

from fastasr.testing.speed import BATCH, FRAMES, Case, Implementation, case, costs, module, upstream_member
from fastasr.testing.table import Make, OpTable, Sample


def _extremes(make: Make) -> dict:
    nan, inf = float("nan"), float("inf")
    return {
        "x": make.values(
            nan, inf, -inf, 0.0, -0.0, 4.0, 1.0, 88.0, -88.0, 104.0, -104.0, 6e4, -6e4, 1e-8, -1e-8
        )
    }


SAMPLES = (
    Sample("btc", lambda m: {"x": m.normal(3, 5, 64, scale=3.0)}, thorough=True),
    Sample("vector", lambda m: {"x": m.normal(17)}, thorough=True),
    Sample("nchw", lambda m: {"x": m.normal(2, 3, 4, 5)}),
    # A single element must not be near the derivative's zero, where any relative error is large.
    Sample("scalar", lambda m: {"x": m.normal(mean=4.0)}),
    Sample("single", lambda m: {"x": m.normal(1, mean=-4.0)}),
    Sample("wide range", lambda m: {"x": m.uniform(4099, low=-30.0, high=30.0)}),
    # where a slope is 0, SwooshL's and SwooshR's: errors of the exponential are a large part of it
    Sample("small slopes", lambda m: {"x": m.uniform(2000, low=1.4, high=1.7)}),
    Sample("small slopes to the right", lambda m: {"x": m.uniform(2000, low=-1.6, high=-1.3)}),
    Sample("large values", lambda m: {"x": m.normal(1000, scale=100.0)}),
    Sample("threads", lambda m: {"x": m.normal(33, 4, 257, scale=2.0)}),
    Sample("no elements", lambda m: {"x": m.normal(0)}),
    Sample("no frames", lambda m: {"x": m.normal(0, 4, 8)}),
    Sample("no channels", lambda m: {"x": m.normal(3, 4, 0)}),
    Sample("extremes", _extremes, exact=False),
)

TABLE = OpTable(
    op="swoosh_l", samples=SAMPLES, rows=("x",), random=lambda m, shape: {"x": m.normal(*shape(), scale=4.0)}
)


# --- the benchmark


def measured(op: str, *shape: int) -> Case:
    """Returns the case of swoosh_l or swoosh_r."""

    def upstream(x: Tensor) -> Implementation:
        return module(upstream_member(f"zipformer.modules.scaling.Swoosh{op[-1].upper()}")(), x)

    n = math.prod(shape)
    passes = costs((2 * n, 0), (3 * n, 0))  # x; y. x, dy; dx
    options: dict[str, Any] = {"copy": True, "others": {"upstream": upstream}}
    return case(op, shape, lambda m: {"x": m.normal(*shape, scale=3.0)}, passes, **options)


def sized(T: int = 1600, B: int = 4, C: int = 512) -> Case:
    return measured("swoosh_l", T, B, C)


CASES = (measured("swoosh_l", 4, 1600, 512),)
ON_DEVICE = tuple(measured("swoosh_l", FRAMES, BATCH, c) for c in (512, 768, 1536))
WATCH = "the approximate `ex2` and reciprocal with their corrections in float32"
