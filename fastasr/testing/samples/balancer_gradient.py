# SPDX-License-Identifier: Apache-2.0
"""Samples of balancer_gradient, and its benchmark at the sizes of Zipformer-M's stack 0 and of its front-end, where
channels are in the middle. tests/ops/test_regularisers.py holds the formula itself."""

import math
from functools import partial
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


LIMITS = {
    "the mean alone": (-0.1, 0.1, 0.0, 9.0),
    "the size alone": (-9.0, 9.0, 2.0, 3.0),
    "both": (0.3, 0.4, 0.2, 0.5),
    "nothing": (-99.0, 99.0, 0.0, 99.0),
}


def _mixed(make: Make, shape: tuple[int, ...], channel_dim: int = -1, limits: str = "both") -> dict:
    """Makes a call whose channels have several means and sizes, one of them constant."""
    call, channels = _call(make, shape, channel_dim), shape[channel_dim]
    broadcast = [1] * len(shape)
    broadcast[channel_dim] = channels
    mean, size = (make.normal(channels).view(broadcast) for _ in range(2))
    x = call["x"] * size + 3 * mean
    x.select(channel_dim, -1).fill_(0.75)
    names = ("min_mean", "max_mean", "min_rms", "max_rms")
    return call | {"x": x} | dict(zip(names, LIMITS[limits], strict=True))


def _distant(make: Make, *arguments: Any) -> dict:
    """Makes a call where all channels are far from 0 beside their size."""
    call = _mixed(make, *arguments)
    return call | {"x": 1000.0 + 0.1 * make.normal(*call["x"].shape), "min_mean": 0.6, "max_mean": 0.7}


def transposed_in_memory(call: dict) -> dict:
    """Puts dimension 1 last in x's memory."""
    return call | {"x": call["x"].transpose(1, -1).contiguous().transpose(1, -1)}


def few_visible(call: dict) -> dict:
    """Shows a frame in 35, which is behind those that a kernel looks at first. Padding is NaN in x."""
    x, dim = call["x"], call.get("channel_dim", -1)
    shape = x.select(dim, 0).shape
    mask = (torch.arange(math.prod(shape), device=x.device) % 35 != 33).view(shape)
    return call | {"x": x.masked_fill(mask.unsqueeze(dim), math.nan), "padding_mask": mask}


def _in_tensors(call: dict, act: float | None) -> dict:
    names = ("min_mean", "max_mean", "min_rms", "max_rms", "grad_scale")
    numbers = torch.tensor([call[name] for name in names])
    return (
        call | dict.fromkeys(names) | {"limits": numbers, "act": None if act is None else torch.tensor(act)}
    )


def _not_finite(make: Make) -> dict:
    call = _mixed(make, (30, 6))
    call["x"][3, 2], call["x"][5, 4] = math.nan, math.inf
    return call


def padded(make: Make, call: dict, share: float = 0.3) -> dict:
    """Adds padding, which is NaN in x: nothing reads it."""
    x, dim = call["x"], call.get("channel_dim", -1)
    mask = make.uniform(*x.select(dim, 0).shape) < share
    return call | {"x": x.masked_fill(mask.unsqueeze(dim), math.nan), "padding_mask": mask}


def _padded(make: Make, *options: Any, **share: float) -> dict:
    return padded(make, _call(make, *options), **share)


TABLE = OpTable(
    op="balancer_gradient",
    samples=(
        Sample("matrix", lambda m: _call(m, (2, 8))),
        Sample("tbc", lambda m: _call(m, (6, 2, 16)), thorough=True),
        Sample("channels first", lambda m: _call(m, (3, 12, 5), 1), thorough=True),
        Sample("padded", lambda m: _padded(m, (40, 1, 16)), thorough=True),
        Sample("channels first, padded", lambda m: _padded(m, (2, 12, 30), 1), thorough=True),
        Sample("every frame is padding", lambda m: _padded(m, (9, 1, 8), share=2.0)),
        *(Sample(name, partial(_mixed, shape=(40, 3, 24), limits=name)) for name in LIMITS),
        Sample("a map", lambda m: _mixed(m, (2, 5, 6, 7), 1)),
        Sample("channels first, few", lambda m: _mixed(m, (9, 4), 0)),
        Sample("many frames", lambda m: _mixed(m, (700, 33), 1)),
        Sample("many channels", lambda m: _mixed(m, (20, 600))),
        Sample("one frame", lambda m: _call(m, (1, 6))),
        Sample("one channel", lambda m: _call(m, (17, 1))),
        Sample("no frames", lambda m: _call(m, (0, 6))),
        Sample("distant channels", lambda m: _distant(m, (300, 6))),
        Sample("distant channels, few frames", lambda m: few_visible(_distant(m, (1, 70, 70), 1))),
        Sample("a map, padded", lambda m: _padded(m, (2, 8, 9, 11), 1)),
        Sample("channels last in memory", lambda m: transposed_in_memory(_mixed(m, (2, 8, 9, 11), 1))),
        Sample(
            "channels last in memory, padded", lambda m: transposed_in_memory(_padded(m, (2, 8, 9, 11), 1))
        ),
        Sample("few frames", lambda m: few_visible(_mixed(m, (700, 33)))),
        Sample("numbers in tensors", lambda m: _in_tensors(_mixed(m, (40, 3, 24)), None), exact=False),
        Sample("numbers in tensors, act", lambda m: _in_tensors(_padded(m, (40, 3, 24)), 1.0), exact=False),
        Sample(
            "numbers in tensors, do not act",
            lambda m: _in_tensors(_padded(m, (4, 24, 9), 1), 0.0),
            exact=False,
        ),
        Sample("not finite", _not_finite, exact=False),
        Sample("large", lambda m: _mixed(m, (3000, 64)), large=True),
        Sample("large, channels first", lambda m: _mixed(m, (6, 40, 300), 1), large=True),
    ),
    invalid=(
        Invalid(
            "no limits",
            lambda m: _call(m, (3, 5)) | {"max_rms": None},
            ValueError,
            "limits: expected a tensor (5,), or five numbers, got None",
        ),
        Invalid(
            "limits given twice",
            changed(lambda m: _call(m, (3, 5)), limits=torch.zeros(5)),
            ValueError,
            "limits: expected either a tensor or five numbers, got both",
        ),
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
