# SPDX-License-Identifier: Apache-2.0
"""zipformer_attention_weights at the sizes of Zipformer-M's stacks 0, 1 and 3 (16 s of speech, 4 utterances), and at
60 s of one utterance."""

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
    upstream_module,
)

definition = ops.zipformer_attention_weights.definition

QUERY_DIM, POS_DIM = 32, 4


def _upstream(x, pos, heads: int, padding) -> Implementation:
    """Returns upstream's module without its projections: the rest is what the op computes."""
    cls = upstream_module("zipformer.RelPositionMultiheadAttentionWeights")
    module = cls(8, pos_dim=8, num_heads=heads, query_head_dim=QUERY_DIM, pos_head_dim=POS_DIM).eval()
    module.in_proj = module.linear_pos = torch.nn.Identity()
    return Implementation(lambda: module(x, pos, padding), parameters(x, pos))


def _make(frames: int, batch: int, heads: int, device: str, dtype: torch.dtype):
    width = heads * (2 * QUERY_DIM + POS_DIM)
    x = torch.randn(frames, batch, width, device=device, dtype=dtype) * 0.5
    pos = torch.randn(1, 2 * frames - 1, heads * POS_DIM, device=device, dtype=dtype)
    lengths = torch.linspace(frames, frames * 0.7, batch, device=device).long()
    padding = torch.arange(frames, device=device) >= lengths[:, None]

    def made(function):
        call = partial(function, num_heads=heads, query_head_dim=QUERY_DIM, key_padding_mask=padding)
        return Implementation(lambda: call(x, pos), parameters(x, pos))

    return {
        "eager": lambda: made(definition),
        "compile": lambda: made(compiled(definition)),
        "upstream": lambda: _upstream(x, pos, heads, padding),
        "fastasr": lambda: made(ops.zipformer_attention_weights),
    }


def _costs(frames: int, batch: int, heads: int, size: int) -> dict[str, Cost]:
    scores = heads * batch * frames * frames
    operands = frames * batch * heads * (2 * QUERY_DIM + POS_DIM)
    product = 2 * scores * (QUERY_DIM + POS_DIM)
    return costs_of(
        Cost((scores + operands) * size, product),  # W; x
        Cost((2 * scores + 2 * operands) * size, 2 * product),  # W, dW; x, dx
    )


def _case(frames: int, batch: int, heads: int) -> Case:
    name = f"{frames}x{batch}, {heads} heads"
    make, costs = partial(_make, frames, batch, heads), partial(_costs, frames, batch, heads)
    return Case(
        "zipformer_attention_weights", name, name, make, costs, quick=frames * frames * batch < 4_000_000
    )


CASES = (_case(796, 4, 4), _case(398, 4, 4), _case(100, 4, 8), _case(2998, 1, 4))
ON_DEVICE = (_case(FRAMES, BATCH, 4), _case(188, BATCH, 8))
