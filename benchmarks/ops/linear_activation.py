# SPDX-License-Identifier: Apache-2.0
"""linear_activation: the first projections of the cgMLP (GELU) and of the feed-forward blocks (SiLU) of an
E-Branchformer layer of 512 channels."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import BACKWARD, BATCH, BOTH, FORWARD, FRAMES, Case, Cost, versions


def _case(shape: tuple[int, ...], outputs: int, activation: str) -> Case:
    text, width, rows = "x".join(map(str, shape)), shape[-1], torch.Size(shape[:-1]).numel()

    def make(device: str, dtype: torch.dtype):
        like = {"device": device, "dtype": dtype}
        x, weight = torch.randn(shape, **like), torch.randn(outputs, width, **like) / width**0.5
        inputs = x, weight, torch.randn(outputs, **like)
        return versions(ops.linear_activation, *inputs, options={"activation": activation})

    def costs(size: int) -> dict[str, Cost]:
        product, moved = 2 * rows * width * outputs, (rows * width + width * outputs + rows * outputs) * size
        return {
            FORWARD: Cost(moved, product),
            BACKWARD: Cost(2 * moved, 2 * product),
            BOTH: Cost(3 * moved + rows * outputs * size, 3 * product),  # z is kept
        }

    return Case("linear_activation", f"{text}->{outputs}, {activation}", text, make, costs)


CASES = (_case((4, 400, 512), 3072, "gelu"), _case((4, 400, 512), 1024, "silu"))
ON_DEVICE = (_case((BATCH, FRAMES // 2, 512), 3072, "gelu"),)
