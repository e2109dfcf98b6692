# SPDX-License-Identifier: Apache-2.0
"""Samples of add_norm, and its benchmark at the sizes of a FastConformer of 110M parameters and of Gemma 4's tower."""

import math
from collections.abc import Callable
from typing import Any

import torch

from fastasr.testing.speed import Case, case, costs
from fastasr.testing.table import Make, OpTable, Sample


def _call(make: Make, shape: tuple[int, ...], eps: float = 1e-5, size: float = 1.0, **more: Any) -> dict:
    channels = shape[-1]
    return {
        "x": make.normal(*shape, scale=size),
        "update": make.normal(*shape, scale=size),
        "weight": make.normal(channels, scale=0.3, mean=1.0),
        "bias": make.normal(channels, scale=0.2),
        "eps": eps,
    } | more


def _of_rms(make: Make, *shape: int, **more: Any) -> dict:
    """Makes a call with an RMSNorm of the update and another one of the sum, as Gemma has them."""
    weight = make.normal(shape[-1], scale=0.3, mean=1.0)
    return _call(make, shape, kind="rms", bias=None, update_weight=weight, scale=0.5) | more


def _of_layer(make: Make, *shape: int, **more: Any) -> dict:
    return _call(make, shape, **more)


def _of_stream(make: Make, *shape: int, **more: Any) -> dict:
    """Makes a call under autocast: x and the parameters are float32."""
    wide = _call(Make(dtype=torch.float32, device=make.device, seed=3), shape, scale=0.5)
    return wide | {"update": make.normal(*shape)} | more


TABLE = OpTable(
    op="add_norm",
    samples=(
        Sample("btc", lambda m: _call(m, (4, 2, 11)), thorough=True),
        Sample("half of the update", lambda m: _call(m, (4, 2, 12), scale=0.5), thorough=True),
        Sample("rms", lambda m: _of_rms(m, 4, 2, 12), thorough=True),
        Sample(
            "rms, limited", lambda m: _of_rms(m, 5, 3, 24, update_limit=1.317, limit=1.713), thorough=True
        ),
        Sample("rms of the sum alone", lambda m: _of_rms(m, 9, 40, update_weight=None, limit=1.317)),
        Sample("rms of the update alone", lambda m: _of_rms(m, 9, 40, kind="layer", bias=m.normal(40))),
        Sample("rms, block", lambda m: _of_rms(m, 50, 2, 512)),
        Sample("rms, stream in float32", lambda m: _of_stream(m, 30, 2, 256, kind="rms", limit=1e39)),
        Sample("rms, no rows", lambda m: _of_rms(m, 0, 3, 8)),
        Sample("no bias", lambda m: _call(m, (11, 40), bias=None)),
        Sample("odd channels", lambda m: _call(m, (11, 193))),
        Sample("block", lambda m: _call(m, (40, 4, 512), scale=0.5)),
        Sample("wide", lambda m: _call(m, (3, 2070))),
        Sample("vector", lambda m: _call(m, (40,)), exact=False),
        Sample("five channels", lambda m: _call(m, (300, 5), eps=0.1)),
        Sample("no epsilon", lambda m: _call(m, (3, 40), eps=0.0)),
        Sample("large values", lambda m: _call(m, (5, 3, 24), size=300.0)),
        Sample("no rows", lambda m: _call(m, (0, 3, 8))),
        Sample("rows of zeros", lambda m: _call(m, (4, 8), size=0.0), exact=False),
        Sample("stream in float32", lambda m: _of_stream(m, 30, 2, 256)),
        Sample(
            "a slice of a projection", lambda m: _call(m, (6, 3, 16), update=m.normal(6, 3, 40)[..., 9:25])
        ),
    ),
    # With few channels and a small eps, LayerNorm may divide by a number that is only rounding error
    random=lambda m, shape: shape.choice((_of_rms, _of_layer))(
        m, *shape(), 1 + shape.size(), eps=shape.choice((0.1, 1.0)), limit=shape.choice((0.0, 1.3125))
    ),
)


# --- the benchmark


def _case(*shape: int, make: Callable[..., dict] = _of_layer) -> Case:
    n = math.prod(shape)
    return case(
        "add_norm", shape, lambda m: make(m, *shape, scale=0.5), costs((4 * n, 0), (6 * n, 0)), copy=True
    )


def sized(T: int = 375, B: int = 20, C: int = 512) -> Case:
    return _case(B, T, C)


CASES = ON_DEVICE = (_case(20, 375, 512), _case(1, 750, 1024, make=_of_rms))
WATCH = "the mean in two parts; two results each way; it uses residual_norm's tiles"
