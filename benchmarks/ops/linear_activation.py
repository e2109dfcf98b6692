# SPDX-License-Identifier: Apache-2.0
"""linear_activation: the first projections of the cgMLP (GELU) and of the feed-forward blocks (SiLU) of an
E-Branchformer layer of 512 channels."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BACKWARD,
    BATCH,
    BOTH,
    FORWARD,
    FRAMES,
    PASSES,
    Case,
    Cost,
    compiled,
    simple,
)


def _make(shape, outputs: int, activation: str, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    inputs = make(shape), make(outputs, shape[-1]) / shape[-1] ** 0.5, make(outputs)
    return {
        "eager": lambda: simple(partial(ops.linear_activation.definition, activation=activation), *inputs),
        "compile": lambda: simple(
            partial(compiled(ops.linear_activation.definition), activation=activation), *inputs
        ),
        "fastasr": lambda: simple(partial(ops.linear_activation, activation=activation), *inputs),
    }


def _costs(rows: int, inputs: int, outputs: int, size: int) -> dict[str, Cost]:
    product = 2 * rows * inputs * outputs
    forward = (rows * inputs + inputs * outputs + rows * outputs) * size
    backward = (2 * rows * inputs + 2 * inputs * outputs + 2 * rows * outputs) * size
    return {
        FORWARD: Cost(forward, product),
        BACKWARD: Cost(backward, 2 * product),
        BOTH: Cost(forward + backward + rows * outputs * size, 3 * product),  # z is kept
    }


def _case(shape: tuple[int, ...], outputs: int, activation: str) -> Case:
    text = "x".join(map(str, shape))
    rows = torch.Size(shape[:-1]).numel()
    return Case(
        "linear_activation",
        f"{text}->{outputs}, {activation}",
        text,
        partial(_make, shape, outputs, activation),
        partial(_costs, rows, shape[-1], outputs),
        passes=PASSES,
    )


CASES = (_case((4, 400, 512), 3072, "gelu"), _case((4, 400, 512), 1024, "silu"))
ON_DEVICE = (_case((BATCH, FRAMES // 2, 512), 3072, "gelu"),)
