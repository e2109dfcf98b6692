# SPDX-License-Identifier: Apache-2.0
"""swoosh_l and swoosh_r against the formula, torch.compile, upstream's modules and a copy of the same
bytes.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    FRAMES,
    Case,
    Cost,
    Implementation,
    compiled,
    costs_of,
    parameters,
    simple,
    upstream_module,
)

FORMULAS = {name: getattr(ops, name).definition for name in ("swoosh_l", "swoosh_r")}
UPSTREAM = {"swoosh_l": "scaling.SwooshL", "swoosh_r": "scaling.SwooshR"}


def _upstream(op: str, x: torch.Tensor) -> Implementation:
    module = upstream_module(UPSTREAM[op])()
    return Implementation(lambda: module(x), parameters(x))


def _make(op: str, shape: tuple[int, ...], device: str, dtype: torch.dtype):
    x = torch.randn(shape, device=device, dtype=dtype) * 3
    return {
        "eager": lambda: simple(FORMULAS[op], x),
        "compile": lambda: simple(compiled(FORMULAS[op]), x),
        "upstream": lambda: _upstream(op, x),
        "fastasr": lambda: simple(getattr(ops, op), x),
    }


def _costs(elements: int, size: int) -> dict[str, Cost]:
    return costs_of(
        Cost(2 * elements * size),  # x; y
        Cost(3 * elements * size),  # x, dy; dx
    )


def _case(op: str, *shape: int, quick: bool = True) -> Case:
    name = "x".join(map(str, shape))
    elements = torch.Size(shape).numel()
    return Case(op, name, name, partial(_make, op, shape), partial(_costs, elements), copy=True, quick=quick)


CASES = (
    _case("swoosh_l", 4, 1600, 512),
    _case("swoosh_r", 4, 1600, 512),
    # the first activations of Zipformer-M's front end: 16 s, after the first convolution
    _case("swoosh_r", 4, 8, 1598, 80, quick=False),
)
ON_DEVICE = tuple(_case(op, FRAMES, BATCH, c) for c in (512, 768, 1536) for op in ("swoosh_l", "swoosh_r"))
