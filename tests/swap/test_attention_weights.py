# SPDX-License-Identifier: Apache-2.0
"""Upstream's attention weights by the op: which are bound, compared, declined; a whole encoder in chunks.
``tests/parity/test_zipformer_weights.py`` has their values, gradients and draws."""

import copy

import pytest
import torch
from steps import seeded

import fastasr
from fastasr.models.zipformer import RelPositionMultiheadAttentionWeights as Ours
from fastasr.swap import binding

zipformer = pytest.importorskip("zipformer.modules.zipformer")

FRAMES, BATCH, CHANNELS = 18, 2, 24


def attention(cls=None, **options):
    seeded(0)
    cls = cls or zipformer.RelPositionMultiheadAttentionWeights
    module = cls(CHANNELS, pos_dim=16, num_heads=2, query_head_dim=8, pos_head_dim=4, **options)
    return torch.nn.ModuleDict({"weights": module})


def inputs(left=0, scale=1.0):
    seeded(1)
    return torch.randn(FRAMES, BATCH, CHANNELS) * scale, torch.randn(1, 2 * FRAMES - 1 + left, 16)


def test_methods_bound_and_undone():
    model = attention()
    report = fastasr.accelerate(model)
    assert report.replaced[0].kernels == ("zipformer_attention_weights",)
    assert binding.bound_forward(model["weights"]) is Ours.forward
    assert binding.bound_function(model["weights"], "streaming_forward") is Ours.streaming_forward
    fastasr.restore(model)
    assert not {"forward", "streaming_forward"} & set(vars(model["weights"]))


def test_streaming_is_compared_by_verify():
    left = 12
    model = attention().eval()
    fastasr.accelerate(model)
    x, pos_emb = inputs(left)
    report = fastasr.verify(
        model, lambda m: m["weights"].streaming_forward(x, pos_emb, torch.randn(left, BATCH, 16), left, None)
    )
    row = next(row for row in report.replaced if row.path == "weights")
    assert {"values", "gradients"} <= set(row.errors)


def encoders(**options):
    """Returns upstream's causal encoder of two rates and its copy, swapped with these options."""
    theirs = zipformer.Zipformer(
        output_downsampling_factor=2, downsampling_factor=(1, 2), encoder_dim=(24, 32), num_encoder_layers=(1, 1),
        encoder_unmasked_dim=(24, 24), query_head_dim=(8,), pos_head_dim=(4,), value_head_dim=(6,), num_heads=(2, 2),
        feedforward_dim=(32, 48), cnn_module_kernel=(7, 7), pos_dim=16, causal=True, chunk_size=(8,),
        left_context_frames=(16,), warmup_batches=4000.0,
    ).eval()  # fmt: skip
    ours = copy.deepcopy(theirs)
    assert fastasr.accelerate(ours, **options).replaced
    return theirs, ours


@torch.no_grad()
def test_chunks_of_the_whole_encoder():
    """Upstream's encoder makes a mask of chunks. The inner rate's is every second row and column of the outer one.
    Layers that have measured their products compute the second call in another way."""
    theirs, ours = encoders(exclude=zipformer.Zipformer)
    seeded(2)
    x, lengths = torch.randn(50, BATCH, 24), torch.arange(50, 50 - 9 * BATCH, -9)
    hidden = torch.arange(50) >= lengths[:, None]
    expected, expected_lengths = theirs(x, lengths, hidden)
    for _ in range(2):
        y, y_lengths = ours(x, lengths, hidden)
        assert torch.equal(y_lengths, expected_lengths)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


class OtherStreaming(zipformer.RelPositionMultiheadAttentionWeights):
    def streaming_forward(self, x, pos_emb, cached_key, left_context_len, key_padding_mask):
        return super().streaming_forward(x, pos_emb, cached_key, left_context_len, key_padding_mask)


def test_a_subclass_that_streams_otherwise_is_declined():
    report = fastasr.accelerate(attention(OtherStreaming))
    row = next(row for row in report.rows if row.path == "weights")
    assert row not in report.replaced
    assert "streaming_forward" in row.reason
