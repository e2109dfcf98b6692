# SPDX-License-Identifier: Apache-2.0
"""bypass at the sizes of Zipformer-M's stacks 0 and 3."""

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

definition = ops.bypass.definition


def _upstream(x_orig, x, scale) -> Implementation:
    module = upstream_module("zipformer.BypassModule")(x.shape[-1]).to(x)
    module.bypass_scale = torch.nn.Parameter(scale.detach())
    return Implementation(lambda: module(x_orig, x), parameters(x_orig, x, module.bypass_scale))


def _make(shape: tuple[int, ...], device: str, dtype: torch.dtype):
    x_orig = torch.randn(shape, device=device, dtype=dtype)
    x = torch.randn(shape, device=device, dtype=dtype)
    scale = torch.rand(shape[-1], device=device, dtype=dtype)
    return {
        "eager": lambda: simple(definition, x_orig, x, scale),
        "compile": lambda: simple(compiled(definition), x_orig, x, scale),
        "upstream": lambda: _upstream(x_orig, x, scale),
        "fastasr": lambda: simple(ops.bypass, x_orig, x, scale),
    }


def _costs(elements: int, size: int) -> dict[str, Cost]:
    return costs_of(
        Cost(3 * elements * size),  # x_orig, x; y
        Cost(5 * elements * size),  # x_orig, x, dy; dx_orig, dx
    )


def _case(*shape: int) -> Case:
    name = "x".join(map(str, shape))
    costs = partial(_costs, torch.Size(shape).numel())
    return Case("bypass", name, name, partial(_make, shape), costs, copy=True)


CASES = (_case(796, 4, 192), _case(100, 4, 512))
ON_DEVICE = (*(_case(FRAMES, BATCH, c) for c in (192, 512, 768)), _case(188, BATCH, 512))
