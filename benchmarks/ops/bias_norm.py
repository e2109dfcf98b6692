# SPDX-License-Identifier: Apache-2.0
"""bias_norm at the sizes of Zipformer-M's stacks 0 and 3."""

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


def _upstream(x, bias, log_scale) -> Implementation:
    module = upstream_module("scaling.BiasNorm")(x.shape[-1]).to(x)
    module.bias = torch.nn.Parameter(bias.detach())
    module.log_scale = torch.nn.Parameter(log_scale.detach())
    return Implementation(lambda: module(x), parameters(x, module.bias, module.log_scale))


def _make(shape: tuple[int, ...], device: str, dtype: torch.dtype):
    x = torch.randn(shape, device=device, dtype=dtype)
    bias = torch.randn(shape[-1], device=device, dtype=dtype) * 0.1
    log_scale = torch.tensor(0.5, device=device, dtype=dtype)
    return {
        "eager": lambda: simple(ops.bias_norm.definition, x, bias, log_scale),
        "compile": lambda: simple(compiled(ops.bias_norm.definition), x, bias, log_scale),
        "upstream": lambda: _upstream(x, bias, log_scale),
        "fastasr": lambda: simple(ops.bias_norm, x, bias, log_scale),
    }


def _costs(elements: int, size: int) -> dict[str, Cost]:
    return costs_of(
        Cost(2 * elements * size),  # x; y
        Cost(3 * elements * size),  # x, dy; dx
    )


def _case(*shape: int) -> Case:
    name = "x".join(map(str, shape))
    costs = partial(_costs, torch.Size(shape).numel())
    return Case("bias_norm", name, name, partial(_make, shape), costs, copy=True)


CASES = (_case(796, 4, 192), _case(100, 4, 512))
ON_DEVICE = (*(_case(FRAMES, BATCH, c) for c in (192, 512, 768)), _case(188, BATCH, 512))
