# SPDX-License-Identifier: Apache-2.0
"""Samples of whitening_gradient, and its benchmark at the sizes of Zipformer-M's stacks 0 and 3 and of the keys of
stack 0. It is not the gradient of a function: it has tests of its own too."""

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


def _call(make: Make, shape: tuple[int, ...], groups: int = 1) -> dict:
    # Channels of different sizes put w above 1, so every call changes the gradient.
    x = make.normal(*shape) * make.uniform(shape[-1], low=0.2, high=1.0)
    return {"grad": make.normal(*shape), "x": x, "num_groups": groups, "limit": 1.0, "grad_scale": 0.02}


def _padded(make: Make, *options: Any, share: float = 0.3) -> dict:
    """Makes a call whose padding is NaN in x: nothing reads it."""
    call = _call(make, *options)
    mask = make.uniform(*call["x"].shape[:-1]) < share
    return call | {"x": call["x"].masked_fill(mask.unsqueeze(-1), math.nan), "padding_mask": mask}


TABLE = OpTable(
    op="whitening_gradient",
    samples=(
        Sample("matrix", lambda m: _call(m, (30, 8))),
        Sample("tbc", lambda m: _call(m, (20, 2, 24)), thorough=True),
        Sample("groups", lambda m: _call(m, (20, 2, 24), 3), thorough=True),
        Sample("padded", lambda m: _padded(m, (60, 1, 24), 3), thorough=True),
        Sample("every frame is padding", lambda m: _padded(m, (9, 1, 8), share=2.0)),
        Sample("white", lambda m: _call(m, (20, 2, 24)) | {"limit": 100.0}),
    ),
    invalid=(
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


def _case(*shape: int, groups: int = 1) -> Case:
    def costs(size: int) -> dict[str, Cost]:
        # x twice, grad twice; y. Both products
        return {FORWARD: Cost(5 * math.prod(shape) * size, 4 * math.prod(shape) * shape[-1] // groups)}

    options: dict[str, Any] = {
        "copy": True,
        "passes": (FORWARD,),
        "differentiable": (),
        "others": {"upstream": _upstream},
    }
    return case("whitening_gradient", shape, lambda m: _call(m, shape, groups), costs, **options)


def sized(T: int = 796, B: int = 4, D: int = 192, num_groups: int = 1) -> Case:
    return _case(T, B, D, groups=num_groups)


CASES = (_case(796, 4, 192), _case(100, 4, 512), _case(796, 4, 128, groups=4))
ON_DEVICE = (_case(FRAMES, BATCH, 192), _case(188, BATCH, 512), _case(FRAMES, BATCH, 128, groups=4))
WATCH = "float32 products without TF32; w of channels whose mean is tens of times their deviation; padding"
