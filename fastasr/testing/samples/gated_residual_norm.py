# SPDX-License-Identifier: Apache-2.0
"""Samples of gated_residual_norm, and its benchmark at the sizes of ESPnet's MEGA decoder."""

from functools import partial
from typing import Any

from fastasr.ops import _activation
from fastasr.testing.speed import Case, case, costs
from fastasr.testing.table import Make, OpTable, Sample


def _call(make: Make, shape: tuple[int, ...], **more: Any) -> dict:
    channels = shape[-1]
    return {
        "x": make.normal(*shape),
        "update": make.normal(*shape, scale=2.0),
        "candidate": make.normal(*shape, scale=1.5),
        "hidden": make.normal(*shape),
        "weight": make.normal(channels, scale=0.3, mean=1.0),
        "bias": make.normal(channels, scale=0.2),
        "eps": 1e-12,
    } | more


def _slices(make: Make, length: int, batch: int, channels: int, between: int = 7) -> dict:
    """Makes update and candidate as slices of one projection, as in a MEGA block."""
    call = _call(make, (length, batch, channels))
    base = make.normal(length, batch, 2 * channels + between)
    return call | {"update": base[..., :channels], "candidate": base[..., -channels:]}


def _with_mask(make: Make, shape: tuple[int, ...]) -> dict:
    return _call(make, shape, dropout_mask=make.uniform(*shape) > 0.3)


def _same_rows(make: Make) -> dict:
    """Makes rows of zeros, and rows of one value that float32 cannot represent exactly."""
    zero = make.normal(4, 8, scale=0.0)
    call = _call(make, (4, 8)) | {"x": zero.clone(), "candidate": zero.clone(), "hidden": zero.clone()}
    call["x"][2:] = 0.1
    call["candidate"][2:] = 0.1
    return call | {"activation": "identity"}


TABLE = OpTable(
    op="gated_residual_norm",
    samples=(
        Sample("lbd", lambda m: _call(m, (4, 2, 11)), thorough=True),
        Sample("slices of a projection", lambda m: _slices(m, 30, 4, 64)),
        Sample("slices", lambda m: _slices(m, 6, 2, 20), thorough=True),
        Sample("dropout", lambda m: _with_mask(m, (3, 2, 9)), thorough=True),
        *(Sample(name, partial(_call, shape=(7, 2, 33), activation=name)) for name in _activation.NAMES),
        Sample("block", lambda m: _slices(m, 40, 4, 512)),
        Sample("matrix", lambda m: _call(m, (9, 193))),
        Sample("vector", lambda m: _call(m, (40,)), exact=False),
        Sample("five channels", lambda m: _call(m, (300, 5), eps=0.1)),
        Sample("one channel", lambda m: _call(m, (30, 1), eps=1e-3), exact=False),  # gradient to bias only
        Sample("no rows", lambda m: _call(m, (0, 3, 8))),
        Sample("rows of one value", _same_rows, exact=False),
    ),
    rows=("x", "update", "candidate", "hidden", "dropout_mask"),
    # with few channels and a small eps, LayerNorm may divide by a number that is only rounding error
    random=lambda m, shape: _call(m, (*shape(), 1 + shape.size()), eps=shape.choice((0.1, 1.0))),
)


# --- the benchmark


def sized(T: int = 200, B: int = 4, C: int = 512) -> Case:
    shape, n = (T, B, C), T * B * C
    passes = costs((5 * n, 0), (8 * n, 0))
    return case("gated_residual_norm", shape, lambda m: _slices(m, *shape, between=1152), passes, copy=True)


CASES = ON_DEVICE = (sized(), sized(1024))
WATCH = "the mean in two parts; `ex2` and the reciprocal of the gate; 800 rows in as many parts"
