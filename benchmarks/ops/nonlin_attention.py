# SPDX-License-Identifier: Apache-2.0
"""nonlin_attention at the sizes of Zipformer-M's stacks 0 and 3, 16 s."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import BATCH, FRAMES, Case, costs, shaped, versions


def _case(frames: int, batch: int, width: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        weights = torch.softmax(torch.randn(batch, frames, frames, device=device), dim=-1).to(dtype)
        projected = torch.randn(frames, batch, 3 * width, device=device, dtype=dtype)
        return versions(ops.nonlin_attention, weights, projected)

    scores, rows = batch * frames * frames, frames * batch * width
    passes = costs(
        (scores + 8 * rows, 2 * scores * width),  # W; s, v, x, x, o, o, z, y
        (2 * scores + 20 * rows, 4 * scores * width),
    )
    return shaped("nonlin_attention", (frames, batch, width), make, passes)


CASES = (_case(796, 4, 144), _case(100, 4, 384))
ON_DEVICE = (_case(FRAMES, BATCH, 144), _case(188, BATCH, 384))
