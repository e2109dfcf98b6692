# SPDX-License-Identifier: Apache-2.0
"""linear against F.linear: training sizes, and the few rows of a streaming step.

With few rows a product is as fast as its weight can be read. A model has many layers, so its weights do not
stay in the caches between calls: those cases go through a ring of weights that is larger than the caches.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F

from fastasr import ops
from fastasr.benchmarks.case import BOTH, FORWARD, Case, Cost, Implementation, parameters

INPUT_GRADIENT, WEIGHT_GRADIENT = "input gradient", "weight gradient"
FEW_ROWS = 64
RING_BYTES = 96 * 2**20
RING_MOST = 24  # weights

FUNCTIONS = {"eager": F.linear, "fastasr": ops.linear}


def _ring(function, x, weights, bias) -> Implementation:
    turn = itertools.cycle(weights)
    return Implementation(lambda: function(x, next(turn), bias), parameters(x, *weights, bias))


def _one(function, x, weight, bias, wanted) -> Implementation:
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    chosen = {"x": x, "weight": weight, "bias": bias}
    return Implementation(lambda: function(x, weight, bias), parameters(*(chosen[name] for name in wanted)))


def _make(rows: int, inputs: int, outputs: int, wanted: tuple[str, ...], device: str, dtype: torch.dtype):
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    bias = torch.randn(outputs, device=device, dtype=dtype)
    size = inputs * outputs * dtype.itemsize
    count = min(RING_MOST, max(2, RING_BYTES // size)) if rows < FEW_ROWS else 1
    weights = [torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5 for _ in range(count)]
    if count > 1:
        return {name: partial(_ring, function, x, weights, bias) for name, function in FUNCTIONS.items()}
    return {
        name: partial(_one, function, x, weights[0], bias, wanted) for name, function in FUNCTIONS.items()
    }


def _costs(rows: int, inputs: int, outputs: int, size: int) -> dict[str, Cost]:
    product = 2 * rows * inputs * outputs
    moved = (rows * inputs + inputs * outputs + rows * outputs) * size
    one = Cost(moved, product)
    return {FORWARD: one, INPUT_GRADIENT: one, WEIGHT_GRADIENT: one, BOTH: Cost(3 * moved, 3 * product)}


def _cases(rows: int, inputs: int, outputs: int) -> list[Case]:
    """Returns one case per set of gradients; a streaming step (few rows) has a forward only."""
    everything = (("x", "weight", "bias"), (FORWARD, BOTH))
    gradients = [everything, (("x",), (INPUT_GRADIENT,)), (("weight",), (WEIGHT_GRADIENT,))]
    if rows < FEW_ROWS:
        gradients = [((), (FORWARD,))]
    return [
        Case(
            "linear",
            f"{rows}x{inputs}->{outputs}",
            f"{rows}x{inputs}",
            partial(_make, rows, inputs, outputs, wanted),
            partial(_costs, rows, inputs, outputs),
            passes=passes,
        )
        for wanted, passes in gradients
    ]


CASES = (
    *_cases(3184, 192, 512),
    *_cases(3184, 512, 192),
    *_cases(400, 512, 1536),
    *_cases(20, 512, 2048),
    *_cases(16, 384, 1024),
    *_cases(4, 512, 2048),
)
