# SPDX-License-Identifier: Apache-2.0
"""Relative-position attention weights in inference against upstream's, in place and in pieces."""

import random

import pytest
import torch

from fastasr.models.zipformer import attention

zipformer = pytest.importorskip("zipformer.modules.zipformer")


def upstream(heads=4):
    torch.manual_seed(0)
    return zipformer.RelPositionMultiheadAttentionWeights(
        64, pos_dim=48, num_heads=heads, query_head_dim=32, pos_head_dim=4, dropout=0.0
    ).eval()


def call(forward, module, *args):
    random.seed(5)
    with torch.no_grad():
        weights = forward(module, *args)
    return weights, random.random()


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("attn_dims", [None, 2, 3])
@pytest.mark.parametrize(("frames", "batch"), [(1, 2), (7, 1), (50, 3), (131, 2)])
def test_equals_upstream(monkeypatch, frames, batch, attn_dims, pieces):
    if pieces:
        monkeypatch.setattr(attention, "WHOLE_BYTES", 0)
        monkeypatch.setattr(attention, "PIECE_BYTES", 8192)
    module = upstream()
    x, pos_emb = torch.randn(frames, batch, 64), torch.randn(1, 2 * frames - 1, 48)
    padding = torch.zeros(batch, frames, dtype=torch.bool)
    padding[-1, (frames + 1) // 2 :] = True
    mask = None
    if attn_dims is not None:
        mask = torch.rand((frames, frames) if attn_dims == 2 else (batch, frames, frames)) > 0.6
    ours = attention.RelPositionMultiheadAttentionWeights.forward
    for key_padding_mask in (None, padding):
        expected, expected_draw = call(type(module).forward, module, x, pos_emb, key_padding_mask, mask)
        actual, draw = call(ours, module, x, pos_emb, key_padding_mask, mask)
        assert draw == expected_draw
        assert actual.stride() == expected.stride()
        if pieces:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(actual, expected)


def test_a_fully_masked_row_is_uniform():
    module = upstream()
    x, pos_emb = torch.randn(6, 2, 64), torch.randn(1, 11, 48)
    padding = torch.ones(2, 6, dtype=torch.bool)
    weights, _ = call(attention.RelPositionMultiheadAttentionWeights.forward, module, x, pos_emb, padding)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


def test_elsewhere_upstream_runs():
    """With gradients, in training and in float64 the result is upstream's, and gradients flow."""
    module = upstream()
    ours = attention.RelPositionMultiheadAttentionWeights.forward
    x, pos_emb = torch.randn(9, 2, 64, requires_grad=True), torch.randn(1, 17, 48)
    torch.testing.assert_close(
        ours(module, x, pos_emb), type(module).forward(module, x, pos_emb), rtol=0, atol=0
    )
    ours(module, x, pos_emb).square().sum().backward()
    assert x.grad.abs().sum() > 0
    module.train()
    results = []
    for forward in (ours, type(module).forward):
        random.seed(1)
        torch.manual_seed(1)
        results.append(forward(module, x, pos_emb))
    assert torch.equal(*results)
    module.double().eval()
    expected, _ = call(type(module).forward, module, x.double(), pos_emb.double())
    actual, _ = call(ours, module, x.double(), pos_emb.double())
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 100, 796, 3000, 20000])
def test_pieces_stay_small(frames):
    rows = attention._rows_per_piece(frames, frames, 4)
    assert 1 <= rows <= frames
    assert rows <= 16 or rows * (frames + rows - 1) * 4 <= attention.PIECE_BYTES
