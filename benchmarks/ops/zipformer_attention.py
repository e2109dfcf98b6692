# SPDX-License-Identifier: Apache-2.0
"""zipformer_attention for one self-attention of Zipformer-M's stack 0: 16 s of four utterances, 60 s of one."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    FRAMES,
    Case,
    Cost,
    Implementation,
    compiled,
    costs_of,
    parameters,
)

definition = ops.zipformer_attention.definition

QUERY_DIM, POS_DIM, VALUE_DIM = 32, 4, 12


def _make(frames: int, batch: int, heads: int, device: str, dtype: torch.dtype):
    width = heads * (2 * QUERY_DIM + POS_DIM)
    x = torch.randn(frames, batch, width, device=device, dtype=dtype) * 0.5
    pos = torch.randn(1, 2 * frames - 1, heads * POS_DIM, device=device, dtype=dtype)
    value = torch.randn(frames, batch, heads * VALUE_DIM, device=device, dtype=dtype)
    lengths = torch.linspace(frames, frames * 0.7, batch, device=device).long()
    padding = torch.arange(frames, device=device) >= lengths[:, None]

    def made(function):
        call = partial(function, num_heads=heads, query_head_dim=QUERY_DIM, key_padding_mask=padding)
        return Implementation(lambda: call(x, pos, value), parameters(x, pos, value))

    return {
        "eager": lambda: made(definition),
        "compile": lambda: made(compiled(definition)),
        "fastasr": lambda: made(ops.zipformer_attention),
    }


def _costs(frames: int, batch: int, heads: int, size: int) -> dict[str, Cost]:
    scores = heads * batch * frames * frames
    operands = frames * batch * heads * (2 * QUERY_DIM + POS_DIM + VALUE_DIM)
    result = frames * batch * heads * VALUE_DIM
    product, weighting = 2 * scores * (QUERY_DIM + POS_DIM), 2 * scores * VALUE_DIM
    return costs_of(
        Cost((operands + result) * size, product + weighting),
        Cost((2 * operands + result) * size, 3 * product + 2 * weighting),
    )


def _case(frames: int, batch: int, heads: int) -> Case:
    name = f"{frames}x{batch}, {heads} heads"
    make, costs = partial(_make, frames, batch, heads), partial(_costs, frames, batch, heads)
    return Case("zipformer_attention", name, name, make, costs, quick=frames * frames * batch < 4_000_000)


CASES = (_case(796, 4, 4), _case(2998, 1, 4))
ON_DEVICE = (_case(FRAMES, BATCH, 4), _case(188, BATCH, 8))
