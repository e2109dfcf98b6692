# SPDX-License-Identifier: Apache-2.0
"""Samples of balancer_gradient, and its benchmark at the sizes of Zipformer-M's stack 0 and of its front-end, where
channels are in the middle. It is not the gradient of a function: it has tests of its own too."""

import math
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.speed import (
    BATCH,
    FORWARD,
    FRAMES,
    Case,
    Cost,
    Implementation,
    case,
    parameters,
    upstream_member,
)
from fastasr.testing.table import Invalid, Make, OpTable, Sample, changed


def _call(make: Make, shape: tuple[int, ...], channel_dim: int = -1) -> dict:
    # Random data leave both ranges.
    limits = {"min_mean": -0.05, "max_mean": 0.05, "min_rms": 0.2, "max_rms": 0.5, "grad_scale": 0.04}
    return {"grad": make.normal(*shape), "x": make.normal(*shape), **limits, "channel_dim": channel_dim}


def _padded(make: Make, *options: Any, share: float = 0.3) -> dict:
    """Makes a call whose padding is NaN in x: nothing reads it."""
    call = _call(make, *options)
    x, dim = call["x"], call["channel_dim"]
    mask = make.uniform(*x.select(dim, 0).shape) < share
    return call | {"x": x.masked_fill(mask.unsqueeze(dim), math.nan), "padding_mask": mask}


TABLE = OpTable(
    op="balancer_gradient",
    samples=(
        Sample("matrix", lambda m: _call(m, (2, 8))),
        Sample("tbc", lambda m: _call(m, (6, 2, 16)), thorough=True),
        Sample("channels first", lambda m: _call(m, (3, 12, 5), 1), thorough=True),
        Sample("padded", lambda m: _padded(m, (40, 1, 16)), thorough=True),
        Sample("channels first, padded", lambda m: _padded(m, (2, 12, 30), 1), thorough=True),
        Sample("every frame is padding", lambda m: _padded(m, (9, 1, 8), share=2.0)),
    ),
    invalid=(
        Invalid(
            "a padding mask of another shape",
            changed(lambda m: _call(m, (3, 12, 5), 1), padding_mask=torch.zeros(3, 12, dtype=torch.bool)),
            ValueError,
            "padding_mask: expected shape (3, 5), got (3, 12)",
        ),
    ),
)


# --- the benchmark


def _upstream(grad: Tensor, x: Tensor, channel_dim: int, **limits: Any) -> Implementation:
    function = upstream_member("zipformer.modules.scaling.BalancerFunction")
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = function.apply(leaf, *limits.values(), channel_dim)
    return Implementation(lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0], parameters())


def _case(channel_dim: int, *shape: int) -> Case:
    def costs(size: int) -> dict[str, Cost]:
        return {FORWARD: Cost(4 * math.prod(shape) * size)}  # x twice, grad; y

    options: dict[str, Any] = {
        "copy": True,
        "passes": (FORWARD,),
        "differentiable": (),
        "others": {"upstream": _upstream},
    }
    return case("balancer_gradient", shape, lambda m: _call(m, shape, channel_dim), costs, **options)


def sized(T: int = 796, B: int = 4, D: int = 192) -> Case:
    return _case(-1, T, B, D)


CASES = (_case(-1, 796, 4, 192), _case(1, 4, 32, 798, 39))
ON_DEVICE = (*(_case(-1, FRAMES, BATCH, c) for c in (192, 512)), _case(1, BATCH, 32, FRAMES, 39))
WATCH = "sums of channels whose mean is far larger than their deviation; maps with channels in the middle; padding"
