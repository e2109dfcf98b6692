# SPDX-License-Identifier: Apache-2.0
"""segment_attention is what ``_EmformerAttention`` of torchaudio computes between its projections."""

import math

import pytest
import torch
from steps import seeded

from fastasr import ops

emformer = pytest.importorskip("torchaudio.models.emformer")

CASES = {
    "memory": {"segment": 4, "left": 5, "right": 2, "memory": 3, "lengths": (21, 13, 4)},
    "full": {"segment": 4, "left": 9, "right": 1, "memory": 0, "lengths": (21, 21, 21)},
    "no right context": {"segment": 5, "left": 3, "right": 0, "memory": 2, "lengths": (18, 21, 21)},
    "no left context": {"segment": 4, "left": 0, "right": 3, "memory": 0, "lengths": (20, 17, 16)},
    "one sequence": {"segment": 6, "left": 4, "right": 2, "memory": 2, "lengths": (15,)},
}


@pytest.mark.parametrize(
    "function", [ops.segment_attention.definition, ops.segment_attention], ids=("definition", "op")
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_between_the_projections(case, function, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t)  # upstream's softmax rounds to float32
    seeded(1)
    frames, width, heads = 21, 12, 3
    segment, left, right, memory = (case[k] for k in ("segment", "left", "right", "memory"))
    context = {"left_context_length": left, "right_context_length": right, "max_memory_size": memory}
    model = emformer.Emformer(width, heads, 8, 1, segment, **context).double()
    attention = model.emformer_layers[0].attention
    for linear in (attention.emb_to_query, attention.emb_to_key_value, attention.out_proj):
        torch.nn.init.normal_(linear.weight, std=0.3)
    segments, lengths = math.ceil(frames / segment), torch.tensor(case["lengths"])
    batch = len(lengths)

    def rows(n):
        return torch.randn(n, batch, width, dtype=torch.float64)

    utterance, blocks = rows(frames), rows(segments * right)
    summary, mems = rows(segments if memory else 0), rows(segments - 1 if memory else 0)
    mask = model._gen_attention_mask(utterance)
    expected, expected_mems, _, _ = attention._forward_impl(utterance, lengths, blocks, summary, mems, mask)

    query = attention.emb_to_query(torch.cat([blocks, utterance, summary]))
    key, value = attention.emb_to_key_value(torch.cat([mems, blocks, utterance])).chunk(2, -1)
    effective = lengths + frames - lengths.max() if batch > 1 else torch.full((1,), frames)
    y = function(
        query,
        key,
        value,
        num_heads=heads,
        frames=frames,
        segment_length=segment,
        **context,
        lengths=effective,
    )
    out = attention.out_proj(y)
    rows_out = segments * right + frames
    seen = torch.ones(rows_out, batch, dtype=torch.bool)
    seen[segments * right :] = torch.arange(frames)[:, None] < effective  # a padded query may see nothing
    difference = (out[:rows_out] - expected)[seen].abs().max()
    assert difference < 1e-12, difference
    if memory:
        used = torch.arange(segments)[:, None] * segment < effective
        summaries = out[rows_out:].clamp(-10, 10)
        assert (summaries - expected_mems)[used].abs().max() < 1e-12
