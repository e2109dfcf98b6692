# SPDX-License-Identifier: Apache-2.0
"""zipformer_attention for one self-attention of Zipformer-M's stack 0: 16 s of four utterances, 60 s of one."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import BATCH, FRAMES, Case, versions
from fastasr.benchmarks.ops.zipformer_attention_weights import POS_DIM, QUERY_DIM, attention_case, operands

VALUE_DIM = 12


def _case(frames: int, batch: int, heads: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        x, pos, options = operands(frames, batch, heads, device, dtype)
        value = torch.randn(frames, batch, heads * VALUE_DIM, device=device, dtype=dtype)
        return versions(ops.zipformer_attention, x, pos, value, options=options)

    scores, rows = heads * batch * frames * frames, frames * batch * heads
    values, result = rows * (2 * QUERY_DIM + POS_DIM + VALUE_DIM), rows * VALUE_DIM
    product, weighting = 2 * scores * (QUERY_DIM + POS_DIM), 2 * scores * VALUE_DIM
    forward = values + result, product + weighting
    backward = 2 * values + result, 3 * product + 2 * weighting
    return attention_case("zipformer_attention", make, forward, backward, frames, batch, heads)


CASES = (_case(796, 4, 4), _case(2998, 1, 4))
ON_DEVICE = (_case(FRAMES, BATCH, 4), _case(188, BATCH, 8))
