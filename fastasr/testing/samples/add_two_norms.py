# SPDX-License-Identifier: Apache-2.0
"""Samples of add_two_norms, and its benchmark at the sizes of a FastConformer of 110M parameters."""

from typing import Any

import torch

from fastasr.testing.speed import Case, case, costs
from fastasr.testing.table import Make, OpTable, Sample


def _call(make: Make, *shape: int, size: float = 1.0, **more: Any) -> dict:
    def parameters(name: str) -> dict:
        return {
            f"{name}weight": make.normal(shape[-1], scale=0.3, mean=1.0),
            f"{name}bias": make.normal(shape[-1], scale=0.2),
        }

    rows = {"x": make.normal(*shape, scale=size), "update": make.normal(*shape, scale=size)}
    return rows | parameters("") | parameters("next_") | {"scale": 0.5} | more


def _of_stream(make: Make, *shape: int) -> dict:
    """Makes a call under autocast: x and the parameters are float32."""
    wide = _call(Make(dtype=torch.float32, device=make.device, seed=3), *shape)
    return wide | {"update": make.normal(*shape)}


TABLE = OpTable(
    op="add_two_norms",
    samples=(
        Sample("btc", lambda m: _call(m, 4, 2, 11), thorough=True),
        Sample("the whole update", lambda m: _call(m, 4, 2, 12, scale=1.0), thorough=True),
        Sample("odd channels", lambda m: _call(m, 11, 193)),
        Sample("block", lambda m: _call(m, 40, 4, 512)),
        Sample("wide", lambda m: _call(m, 3, 2070)),
        Sample("vector", lambda m: _call(m, 40), exact=False),
        Sample("five channels", lambda m: _call(m, 300, 5, eps=0.1, next_eps=0.2)),
        Sample("no epsilon", lambda m: _call(m, 3, 40, eps=0.0, next_eps=0.0)),
        Sample("large values", lambda m: _call(m, 5, 3, 24, size=300.0)),
        Sample("no rows", lambda m: _call(m, 0, 3, 8)),
        Sample("rows of zeros", lambda m: _call(m, 4, 8, size=0.0), exact=False),
        Sample("stream in float32", lambda m: _of_stream(m, 30, 2, 256)),
    ),
    thread_invariant=False,  # torch's LayerNorm on a CPU adds up its parameters' gradients by thread.
    # With few channels and a small eps, LayerNorm may divide by a number that is only rounding error
    random=lambda m, shape: _call(
        m, *shape(), 1 + shape.size(), eps=shape.choice((0.1, 1.0)), next_eps=shape.choice((0.1, 1.0))
    ),
)


def sized(T: int = 375, B: int = 20, C: int = 512) -> Case:
    n = B * T * C
    return case(
        "add_two_norms",
        (B, T, C),
        lambda m: _call(m, B, T, C),
        costs((4 * n, 0), (6 * n, 0)),  # x, update; t, y. Also both gradients; dx, dupdate
        copy=True,
    )


CASES = ON_DEVICE = (sized(),)
WATCH = "two means in two parts, and the registers of four sums over rows; it uses residual_norm's tiles"
