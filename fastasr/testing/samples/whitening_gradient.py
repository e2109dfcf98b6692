# SPDX-License-Identifier: Apache-2.0
"""Samples of whitening_gradient, and its benchmark at the sizes of Zipformer-M's stacks 0 and 3 and of the keys of
stack 0. tests/ops/test_regularisers.py holds the formula itself."""

import math
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.samples.balancer_gradient import few_visible, padded, transposed_in_memory
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


def _call(make: Make, shape: tuple[int, ...], groups: int = 1) -> dict:
    # Channels of different sizes put w above 1, so every call changes the gradient.
    x = 2.0 + make.normal(*shape) * make.uniform(shape[-1], low=0.2, high=1.0)
    return {"grad": make.normal(*shape), "x": x, "num_groups": groups, "limit": 1.0, "grad_scale": 0.02}


def _distant(make: Make, *arguments: Any) -> dict:
    call = _call(make, *arguments)
    return call | {"x": call["x"] + 100.0}


def _not_a_number(make: Make) -> dict:
    call = _call(make, (40, 8))
    call["x"][3, 2] = math.nan
    return call


def _in_tensors(call: dict, act: float | None) -> dict:
    numbers = torch.tensor([call["limit"], call["grad_scale"]])
    more = {"limits": numbers, "act": None if act is None else torch.tensor([act])}
    return call | {"limit": None, "grad_scale": None} | more


def _padded(make: Make, *options: Any, **share: float) -> dict:
    return padded(make, _call(make, *options), **share)


TABLE = OpTable(
    op="whitening_gradient",
    samples=(
        Sample("matrix", lambda m: _call(m, (30, 8))),
        Sample("tbc", lambda m: _call(m, (20, 2, 24)), thorough=True),
        Sample("groups", lambda m: _call(m, (20, 2, 24), 3), thorough=True),
        Sample("padded", lambda m: _padded(m, (60, 1, 24), 3), thorough=True),
        Sample("every frame is padding", lambda m: _padded(m, (9, 1, 8), share=2.0)),
        Sample("white", lambda m: _call(m, (20, 2, 24)) | {"limit": 100.0}, thorough=True),
        Sample("a map", lambda m: _call(m, (2, 9, 7, 30), 5)),
        Sample("many frames", lambda m: _call(m, (700, 33))),
        Sample("several tiles", lambda m: _call(m, (300, 200)), thorough=True),  # of both kinds
        Sample("one frame", lambda m: _call(m, (1, 1, 8), 2) | {"limit": 1.5}),
        Sample("no frames", lambda m: _call(m, (0, 3, 8), 2)),
        Sample("a map, padded", lambda m: _padded(m, (2, 8, 9, 12), 3)),
        Sample("channels first in memory", lambda m: transposed_in_memory(_call(m, (2, 9, 11, 8), 2))),
        Sample(
            "channels first in memory, padded", lambda m: transposed_in_memory(_padded(m, (2, 9, 11, 8), 2))
        ),
        Sample("few frames", lambda m: few_visible(_call(m, (700, 33)))),
        Sample("distant channels, few frames", lambda m: few_visible(_distant(m, (300, 24)))),
        Sample("numbers in tensors", lambda m: _in_tensors(_call(m, (40, 3, 20), 2), None), exact=False),
        Sample(
            "numbers in tensors, act", lambda m: _in_tensors(_padded(m, (40, 3, 20), 2), 1.0), exact=False
        ),
        Sample(
            "numbers in tensors, do not act",
            lambda m: _in_tensors(_padded(m, (40, 3, 20), 2), 0.0),
            exact=False,
        ),
        Sample("not a number", _not_a_number, exact=False),
        Sample("large", lambda m: _call(m, (3000, 64), 2), large=True),
    ),
    invalid=(
        Invalid(
            "no limits",
            lambda m: _call(m, (4, 6)) | {"limit": None},
            ValueError,
            "limits: expected a tensor (2,), or two numbers, got None",
        ),
        Invalid(
            "limits given twice",
            changed(lambda m: _call(m, (4, 6)), limits=torch.zeros(2)),
            ValueError,
            "limits: expected either a tensor or two numbers, got both",
        ),
        Invalid(
            "no channels",
            lambda m: _call(m, (4, 0)),
            ValueError,
            "x: expected at least one channel, got (4, 0)",
        ),
        Invalid(
            "groups that do not divide",
            changed(lambda m: _call(m, (4, 6)), num_groups=4),
            ValueError,
            "num_groups",
        ),
    ),
)


# --- the benchmark


def _upstream(grad: Tensor, x: Tensor, num_groups: int, limit: float, grad_scale: float) -> Implementation:
    whiten = upstream_member("zipformer.modules.scaling.Whiten")(num_groups, limit, 1.0, grad_scale)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = whiten(leaf)
    return Implementation(lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0], parameters())


def sized(T: int = 796, B: int = 4, D: int = 192, num_groups: int = 1) -> Case:
    shape = (T, B, D)

    def costs(size: int) -> dict[str, Cost]:
        # x twice, grad twice; y. Both products
        return {FORWARD: Cost(5 * math.prod(shape) * size, 4 * math.prod(shape) * D // num_groups)}

    options: dict[str, Any] = {
        "copy": True,
        "passes": (FORWARD,),
        "differentiable": (),
        "others": {"upstream": _upstream},
    }
    return case("whitening_gradient", shape, lambda m: _call(m, shape, num_groups), costs, **options)


CASES = (sized(796, 4, 192), sized(100, 4, 512), sized(796, 4, 128, 4))
ON_DEVICE = (sized(FRAMES, BATCH, 192), sized(188, BATCH, 512), sized(FRAMES, BATCH, 128, 4))
WATCH = "float32 products without TF32; w of channels whose mean is tens of times their deviation; padding"
