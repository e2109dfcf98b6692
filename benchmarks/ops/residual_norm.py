# SPDX-License-Identifier: Apache-2.0
"""gated_residual_norm and residual_norm at the sizes of ESPnet's MEGA decoder."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    Case,
    Cost,
    Implementation,
    compiled,
    costs_of,
    parameters,
)

SIZE, BETWEEN, EPS = 512, 1152, 1e-12


def _gated(function, x, update, candidate, hidden, weight, bias):
    return function(x, update, candidate, hidden, weight, bias, EPS)


def _plain(function, x, update, weight, bias):
    return function(x, update, weight, bias, EPS)


def _make(gated: bool, length: int, batch: int, device: str, dtype: torch.dtype):
    like = {"device": device, "dtype": dtype}
    x, hidden = torch.randn(length, batch, SIZE, **like), torch.randn(length, batch, SIZE, **like)
    weight, bias = torch.rand(SIZE, **like) + 0.5, torch.randn(SIZE, **like)
    if gated:  # update and candidate are the ends of one projection
        mixed = torch.randn(length, batch, 2 * SIZE + BETWEEN, **like)
        inputs = x, mixed[..., :SIZE], mixed[..., -SIZE:], hidden, weight, bias
        call, formula, op = _gated, ops.gated_residual_norm.definition, ops.gated_residual_norm
    else:
        inputs = x, hidden, weight, bias
        call, formula, op = _plain, ops.residual_norm.definition, ops.residual_norm

    def build(function) -> Implementation:
        return Implementation(lambda: call(function, *inputs), parameters(*inputs))

    return {
        "eager": lambda: build(formula),
        "compile": lambda: build(compiled(formula)),
        "fastasr": lambda: build(op),
    }


def _costs(gated: bool, elements: int, size: int) -> dict[str, Cost]:
    forward, backward = (5, 8) if gated else (3, 4)
    return costs_of(
        Cost(forward * elements * size),
        Cost(backward * elements * size),
    )


def _case(gated: bool, length: int, batch: int) -> Case:
    name = f"{length}x{batch}x{SIZE}"
    costs = partial(_costs, gated, length * batch * SIZE)
    op = "gated_residual_norm" if gated else "residual_norm"
    return Case(op, name, name, partial(_make, gated, length, batch), costs, copy=True)


CASES = (_case(True, 200, 4), _case(True, 1024, 4), _case(False, 200, 4), _case(False, 1024, 4))
ON_DEVICE = CASES
