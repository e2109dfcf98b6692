# SPDX-License-Identifier: Apache-2.0
"""Samples of linear, and its benchmark against F.linear: training sizes, and the few rows of a streaming step.

With few rows a product is as fast as its weight can be read. A model has many layers, so its weights do not
stay in the caches between calls: those cases go through a ring of weights that is larger than the caches.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fastasr import ops
from fastasr.testing.speed import BOTH, FORWARD, Case, Cost, Implementation, case, parameters
from fastasr.testing.table import Make, OpTable, Sample


def affine(make: Make, shape: tuple[int, ...], n: int, bias: bool = True) -> dict:
    """Makes x of this shape and a weight for n outputs with the scale of an initialised layer."""
    k = shape[-1]
    scale = max(k, 1) ** -0.5
    return {
        "x": make.normal(*shape),
        "weight": make.normal(n, k, scale=scale),
        "bias": make.normal(n, scale=scale) if bias else None,
    }


TABLE = OpTable(
    op="linear",
    samples=(
        Sample("tbc", lambda m: affine(m, (6, 2, 16), 12), thorough=True),
        Sample("no bias", lambda m: affine(m, (7, 9), 5, bias=False), thorough=True),
        Sample("vector", lambda m: affine(m, (16,), 8)),
        Sample("one row", lambda m: affine(m, (1, 64), 48)),
        Sample("one output", lambda m: affine(m, (5, 64), 1)),
        Sample("one channel", lambda m: affine(m, (5, 1), 3)),
        Sample("skinny", lambda m: affine(m, (14, 384), 512)),
        Sample("feed-forward", lambda m: affine(m, (200, 4, 192), 128)),
        Sample("strided bias", lambda m: affine(m, (5, 64), 32) | {"bias": m.normal(64)[::2]}),
        Sample("no rows", lambda m: affine(m, (0, 3, 8), 5)),
        Sample("no outputs", lambda m: affine(m, (4, 8), 0)),
        Sample("no channels", lambda m: affine(m, (4, 0), 5)),
    ),
    rows=("x",),
    thread_invariant=False,
    random=lambda m, shape: affine(m, shape() or (3,), shape.size()),
)


# --- the benchmark

INPUT_GRADIENT, WEIGHT_GRADIENT = "input gradient", "weight gradient"
RING_BYTES = 96 * 2**20
RING_MOST = 24  # A ring has at most this many weights.


def _ring(function: Callable, make: Make, rows: int, inputs: int, outputs: int) -> Implementation:
    size = inputs * outputs * make.dtype.itemsize
    count = min(RING_MOST, max(2, RING_BYTES // size))
    call = affine(make, (rows, inputs), outputs)
    weights = [call["weight"], *(make.normal(outputs, inputs, scale=inputs**-0.5) for _ in range(count - 1))]
    turn = itertools.cycle(weights)
    wanted = parameters(call["x"], *weights, call["bias"])
    return Implementation(lambda: function(call["x"], next(turn), call["bias"]), wanted)


def _costs(rows: int, inputs: int, outputs: int, size: int) -> dict[str, Cost]:
    one = Cost((rows * inputs + inputs * outputs + rows * outputs) * size, 2 * rows * inputs * outputs)
    both = Cost(3 * one.bytes, 3 * one.flops)
    return {FORWARD: one, INPUT_GRADIENT: one, WEIGHT_GRADIENT: one, BOTH: both}


def _case(
    rows: int, inputs: int, outputs: int, wanted: Any = ("x", "weight", "bias"), passes: Any = (FORWARD, BOTH)
) -> Case:
    """Returns the case with gradients of the arguments that are ``wanted``."""
    return case(
        "linear",
        f"{rows}x{inputs}->{outputs}",
        lambda m: affine(m, (rows, inputs), outputs),
        partial(_costs, rows, inputs, outputs),
        shape=f"{rows}x{inputs}",
        compiles=False,
        differentiable=wanted,
        passes=passes,
    )


def _step_case(rows: int, inputs: int, outputs: int) -> Case:
    """Returns the case of a streaming step, which has a forward only."""
    functions = {"eager": F.linear, "fastasr": ops.linear}

    def make(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Implementation]]:
        return {
            name: partial(_ring, function, Make(dtype, device), rows, inputs, outputs)
            for name, function in functions.items()
        }

    name, costs = f"{rows}x{inputs}->{outputs}", partial(_costs, rows, inputs, outputs)
    return Case("linear", name, f"{rows}x{inputs}", make, costs, passes=(FORWARD,))


def _cases(*sizes: int) -> list[Case]:
    """Returns one case per set of gradients."""
    gradients = (("x",), (INPUT_GRADIENT,)), (("weight",), (WEIGHT_GRADIENT,))
    case: Callable[..., Case] = partial(_case, *sizes)
    return [case(), *(case(wanted, passes) for wanted, passes in gradients)]


def sized(T: int = 796, B: int = 4, K: int = 192, N: int = 512) -> Case:
    return _case(T * B, K, N)


CASES = (
    *_cases(3184, 192, 512),
    *_cases(3184, 512, 192),
    *_cases(400, 512, 1536),
    _step_case(20, 512, 2048),
    _step_case(16, 384, 1024),
    _step_case(4, 512, 2048),
)
