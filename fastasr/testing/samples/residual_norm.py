# SPDX-License-Identifier: Apache-2.0
"""Samples of residual_norm, and its benchmark at the sizes of ESPnet's MEGA decoder."""

from fastasr.testing.speed import Case, case, costs
from fastasr.testing.table import Make, OpTable, Sample


def _call(make: Make, shape: tuple[int, ...], eps: float = 1e-12, scale: float = 1.0) -> dict:
    channels = shape[-1]
    return {
        "x": make.normal(*shape, scale=scale),
        "update": make.normal(*shape, scale=scale),
        "weight": make.normal(channels, scale=0.3, mean=1.0),
        "bias": make.normal(channels, scale=0.2),
        "eps": eps,
    }


TABLE = OpTable(
    op="residual_norm",
    samples=(
        Sample("lbd", lambda m: _call(m, (4, 2, 11)), thorough=True),
        Sample("odd channels", lambda m: _call(m, (11, 193))),
        Sample("block", lambda m: _call(m, (40, 4, 512))),
        Sample("wide", lambda m: _call(m, (3, 2070))),
        Sample("vector", lambda m: _call(m, (40,)), exact=False),
        Sample("five channels", lambda m: _call(m, (300, 5), eps=0.1)),
        Sample("very wide", lambda m: _call(m, (2, 5000))),
        Sample("no epsilon", lambda m: _call(m, (3, 40), eps=0.0)),
        Sample("large values", lambda m: _call(m, (5, 3, 24), scale=300.0)),
        Sample("no rows", lambda m: _call(m, (0, 3, 8))),
        Sample("rows of zeros", lambda m: _call(m, (4, 8), scale=0.0), exact=False),
        Sample(
            "NaN and inf",
            lambda m: (
                _call(m, (3, 4))
                | {"x": m.values(1, float("nan"), 2, 3, 1, float("inf"), 2, 3, 1, 2, 3, 4).view(3, 4)}
            ),
            exact=False,
        ),
    ),
    rows=("x", "update"),
    # with few channels and a small eps, LayerNorm may divide by a number that is only rounding error
    random=lambda m, shape: _call(m, (*shape(), 1 + shape.size()), eps=shape.choice((0.1, 1.0))),
)


# --- the benchmark


def sized(T: int = 200, B: int = 4, C: int = 512) -> Case:
    shape, n = (T, B, C), T * B * C
    return case("residual_norm", shape, lambda m: _call(m, shape), costs((3 * n, 0), (4 * n, 0)), copy=True)


CASES = ON_DEVICE = (sized(), sized(1024))
WATCH = "the mean in two parts; 512 elements per warp forward and 256 backward"
