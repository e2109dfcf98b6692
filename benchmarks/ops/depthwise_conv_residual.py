# SPDX-License-Identifier: Apache-2.0
"""depthwise_conv_residual as E-Branchformer's merge calls it: both branches of a layer of 512 channels, with the 3 taps
that ESPnet and RETURNN use by default and the 31 of ESPnet's large recipes.

Upstream is ESPnet's code of the merge: a torch.nn.Conv1d between two transpositions, and the sum.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    FRAMES,
    PASSES,
    Case,
    Cost,
    Implementation,
    compiled,
    costs_of,
    parameters,
    simple,
)


def _upstream(x, weight, bias) -> Implementation:
    channels, _, taps = weight.shape
    conv = torch.nn.Conv1d(channels, channels, taps, padding=taps // 2, groups=channels).to(x)
    conv.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})

    def merge():
        return x + conv(x.transpose(1, 2)).transpose(1, 2)

    return Implementation(merge, parameters(x, *conv.parameters()))


def _make(shape, taps: int, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    inputs = make(shape), 0.3 * make(shape[-1], 1, taps), make(shape[-1])
    return {
        "eager": lambda: simple(ops.depthwise_conv_residual.definition, *inputs),
        "compile": lambda: simple(compiled(ops.depthwise_conv_residual.definition), *inputs),
        "upstream": lambda: _upstream(*inputs),
        "fastasr": lambda: simple(ops.depthwise_conv_residual, *inputs),
    }


def _costs(shape, taps: int, size: int) -> dict[str, Cost]:
    elements = torch.Size(shape).numel()
    products = 2 * elements * taps
    return costs_of(
        Cost(2 * elements * size, products),  # x; y
        Cost(3 * elements * size, 2 * products),  # x, dy; dx
    )


def _case(shape, taps: int) -> Case:
    name = "x".join(map(str, shape)) + f", {taps} taps"
    costs = partial(_costs, shape, taps)
    return Case("depthwise_conv_residual", name, name, partial(_make, shape, taps), costs, passes=PASSES)


CASES = (_case((4, 400, 1024), 3), _case((4, 400, 1024), 31))
ON_DEVICE = (_case((BATCH, FRAMES // 2, 1024), 3),)
