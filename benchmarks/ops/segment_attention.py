# SPDX-License-Identifier: Apache-2.0
"""segment_attention at the size of torchaudio's base RNN-T: 400 frames, 8 heads of 64 channels, left context 30."""

from collections.abc import Callable
from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import Case, costs, simple, upstream_member, versions
from fastasr.ops.segment_attention import rows_of

FRAMES, BATCH, HEADS, WIDTH, LEFT = 400, 4, 8, 64, 30


def upstream(segment: int, right: int, device: str) -> Callable:
    """Does what torchaudio's layer does between its projections: dense scores and a mask, built once per forward."""
    emformer = upstream_member("torchaudio.models.emformer.Emformer")
    context = {"left_context_length": LEFT, "right_context_length": right}
    model = emformer(HEADS * WIDTH, HEADS, 8, 1, segment, **context)
    attention = model.emformer_layers[0].attention
    mask = model._gen_attention_mask(torch.empty(FRAMES, BATCH, 1, device=device))

    def run(query, key, value):
        rows = query.shape[0]
        q, k, v = (t.contiguous().view(-1, BATCH * HEADS, WIDTH).transpose(0, 1) for t in (query, key, value))
        scores = torch.bmm(q * attention.scaling, k.transpose(1, 2))
        mixed = torch.bmm(attention._gen_attention_probs(scores, mask, None), v)
        return mixed.transpose(0, 1).contiguous().view(rows, BATCH, HEADS * WIDTH)

    return run


def _make(segment: int, right: int, device: str, dtype: torch.dtype):
    like = {"device": device, "dtype": dtype}
    queries, keys = rows_of(FRAMES, segment, right, 0)
    both = torch.randn(keys, BATCH, 2 * HEADS * WIDTH, **like)
    inputs = torch.randn(queries, BATCH, HEADS * WIDTH, **like), *both.chunk(2, -1)
    sizes = {
        "num_heads": HEADS,
        "frames": FRAMES,
        "segment_length": segment,
        "left_context_length": LEFT,
        "right_context_length": right,
    }

    others = {"upstream": lambda: simple(upstream(segment, right, device), *inputs)}
    return versions(ops.segment_attention, *inputs, options=sizes, others=others)


def _case(segment: int, right: int) -> Case:
    queries, keys = rows_of(FRAMES, segment, right, 0)
    row, pairs = BATCH * HEADS * WIDTH, 0
    for start in range(0, FRAMES, segment):
        end = min(start + segment, FRAMES)
        pairs += BATCH * HEADS * (right + end - start) * (right + end - max(0, start - LEFT))
    passes = costs(
        ((2 * queries + 2 * keys) * row, 4 * WIDTH * pairs),
        ((3 * queries + 4 * keys) * row, 10 * WIDTH * pairs),
    )
    name, shape = f"{FRAMES}x{BATCH}, segment {segment}, right {right}", f"{FRAMES}x{BATCH}x{HEADS * WIDTH}"
    return Case("segment_attention", name, shape, partial(_make, segment, right), passes)


CASES = (_case(16, 4), _case(4, 1))
ON_DEVICE = CASES
