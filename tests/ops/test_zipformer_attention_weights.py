# SPDX-License-Identifier: Apache-2.0
"""Scores that are infinite, NaN or extreme, against the definition in float64: the same rows become NaN."""

import itertools

import pytest
import torch

from fastasr.ops import zipformer_attention_weights
from fastasr.testing import seeded

INF, NAN = float("inf"), float("nan")
MASKS = ("none", "padding", "all padding", "chunks", "mask")


def arguments(frames: int, dtype: torch.dtype, masks: str) -> dict:
    generator = torch.Generator().manual_seed(seeded(frames))
    x = torch.randn(frames, 2, 2 * (2 * 3 + 2), generator=generator).to(dtype)
    pos = torch.randn(1, 2 * frames - 1, 2 * 2, generator=generator).to(dtype)
    call = {"x": x, "pos": pos, "num_heads": 2, "query_head_dim": 3}
    if "padding" in masks:
        call["key_padding_mask"] = torch.arange(frames)[None] >= torch.tensor([[frames // 2], [1]])
        if "all" in masks:
            call["key_padding_mask"] = torch.ones(2, frames, dtype=torch.bool)
    if masks == "chunks":
        call |= {"chunk_size": 4, "left_context_chunks": 1}
    if masks == "mask":
        call["attn_mask"] = torch.rand(frames, frames, generator=generator) > 0.5
    return call


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_scores(dtype, masks):
    places = (("x", 0), ("x", 6), ("x", 12), ("pos", 1))  # query, key, position query, position
    for frames, value in itertools.product((1, 5, 40), (INF, -INF, NAN, 6e4, -6e4)):
        for name, channel in places:
            call = arguments(frames, dtype, masks)
            rows = call[name].flatten(0, 1)
            rows[len(rows) // 2, channel] = value
            weights = zipformer_attention_weights(**call)
            wide = {k: v.double() if k in ("x", "pos") else v for k, v in call.items()}
            torch.testing.assert_close(
                weights.double(), zipformer_attention_weights.definition(**wide), rtol=0, equal_nan=True,
                atol={torch.float64: 1e-14, torch.float32: 1e-2, torch.bfloat16: 2e-2}[dtype],
                msg=lambda text, at=(frames, value, name, channel): f"{at}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("frames", [1, 16, 33])
def test_a_row_of_negative_infinities_is_nan(frames):
    """The padding behind the last key does not take part in the row's softmax."""
    x = torch.zeros(frames, 1, 2)
    x[:, :, 0], x[:, :, 1] = 1, -INF
    assert zipformer_attention_weights(x, None, 1, 1).isnan().all()
    hidden = torch.ones(1, frames, dtype=torch.bool)
    even = zipformer_attention_weights(x, None, 1, 1, key_padding_mask=hidden)
    torch.testing.assert_close(even, torch.full_like(even, 1 / frames))


@pytest.mark.parametrize("score", [-3.3e38, 3.3e38, -999.5, -1000.0, -1e4])
def test_a_row_of_one_extreme_score_is_even(score):
    x = torch.zeros(19, 1, 2)
    x[:, :, 0], x[:, :, 1] = 1, score
    weights = zipformer_attention_weights(x, None, 1, 1)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 19))
