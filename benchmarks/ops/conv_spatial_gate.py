# SPDX-License-Identifier: Apache-2.0
"""conv_spatial_gate at the sizes of ESPnet's E-Branchformers: 3072 linear units of the large one, 1024 of a small one.

Upstream is ESPnet's ConvolutionalSpatialGatingUnit.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    PASSES,
    Case,
    Cost,
    Implementation,
    Unavailable,
    compiled,
    costs_of,
    parameters,
    simple,
)

EPS = 1e-12


def _upstream(x, norm_weight, norm_bias, weight, bias) -> Implementation:
    try:
        from espnet2.asr.layers.cgmlp import ConvolutionalSpatialGatingUnit
    except ImportError as error:
        raise Unavailable(f"espnet is not installed: {error}") from None
    unit = ConvolutionalSpatialGatingUnit(2 * weight.shape[0], weight.shape[-1], 0.0, False, "identity").to(x)
    named = {"norm.weight": norm_weight, "norm.bias": norm_bias, "conv.weight": weight, "conv.bias": bias}
    unit.load_state_dict({name: value.detach() for name, value in named.items()})
    return Implementation(lambda: unit(x), parameters(x, *unit.parameters()))


def _make(shape, taps: int, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    batch, frames, channels = shape
    inputs = [make(batch, frames, 2 * channels), 1 + 0.2 * make(channels), 0.1 * make(channels)]
    inputs += [0.2 * make(channels, 1, taps), 1 + 0.1 * make(channels)]

    def call(function):
        return lambda *tensors: function(*tensors, EPS)

    return {
        "eager": lambda: simple(call(ops.conv_spatial_gate.definition), *inputs),
        "compile": lambda: simple(call(compiled(ops.conv_spatial_gate.definition)), *inputs),
        "upstream": lambda: _upstream(*inputs),
        "fastasr": lambda: simple(call(ops.conv_spatial_gate), *inputs),
    }


def _costs(shape, taps: int, size: int) -> dict[str, Cost]:
    elements = torch.Size(shape).numel()
    products = elements * taps
    return costs_of(
        Cost(3 * elements * size, 2 * products),
        Cost(5 * elements * size, 6 * products),
    )


def _case(shape, taps: int) -> Case:
    name = "x".join(map(str, shape)) + f", {taps} taps"
    costs = partial(_costs, shape, taps)
    return Case("conv_spatial_gate", name, name, partial(_make, shape, taps), costs, passes=PASSES)


CASES = (_case((4, 400, 1536), 31), _case((4, 400, 512), 31))
ON_DEVICE = tuple(_case((BATCH, 750, channels), 31) for channels in (1536, 512))
