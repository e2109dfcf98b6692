# SPDX-License-Identifier: Apache-2.0
"""nonlin_attention at the sizes of Zipformer-M's stacks 0 and 3, 16 s."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import BACKWARD, BATCH, BOTH, FORWARD, FRAMES, Case, Cost, compiled, simple

definition = ops.nonlin_attention.definition


def _make(frames: int, batch: int, width: int, device: str, dtype: torch.dtype):
    weights = torch.softmax(torch.randn(batch, frames, frames, device=device), dim=-1).to(dtype)
    projected = torch.randn(frames, batch, 3 * width, device=device, dtype=dtype)
    return {
        "eager": lambda: simple(definition, weights, projected),
        "compile": lambda: simple(compiled(definition), weights, projected),
        "fastasr": lambda: simple(ops.nonlin_attention, weights, projected),
    }


def _costs(frames: int, batch: int, width: int, size: int) -> dict[str, Cost]:
    scores, rows = batch * frames * frames, frames * batch * width
    forward = Cost((scores + 8 * rows) * size, 2 * scores * width)  # W; s, v, x, x, o, o, z, y
    backward = Cost((2 * scores + 20 * rows) * size, 4 * scores * width)
    return {
        FORWARD: forward,
        BACKWARD: backward,
        BOTH: Cost(forward.bytes + backward.bytes, forward.flops + backward.flops),
    }


def _case(frames: int, batch: int, width: int) -> Case:
    name = f"{frames}x{batch}x{width}"
    return Case(
        "nonlin_attention",
        name,
        name,
        partial(_make, frames, batch, width),
        partial(_costs, frames, batch, width),
    )


CASES = (_case(796, 4, 144), _case(100, 4, 384))
ON_DEVICE = (_case(FRAMES, BATCH, 144), _case(188, BATCH, 384))
