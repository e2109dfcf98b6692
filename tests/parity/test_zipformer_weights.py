# SPDX-License-Identifier: Apache-2.0
"""Relative-position attention weights against upstream's: values, gradients, random draws, streaming."""

import random

import pytest
import torch
from steps import seeded

from fastasr import ops
from fastasr.models.zipformer import attention

zipformer = pytest.importorskip("zipformer.modules.zipformer")

OURS = attention.RelPositionMultiheadAttentionWeights


def upstream(heads=4, **options):
    seeded(0)
    return zipformer.RelPositionMultiheadAttentionWeights(
        64, pos_dim=48, num_heads=heads, query_head_dim=32, pos_head_dim=4, **{"dropout": 0.0, **options}
    ).eval()


def call(forward, module, *args, seed=5):
    random.seed(seed)
    seeded(seed)
    return forward(module, *args), random.random()


def gradients(forward, module, x, pos_emb, *args, seed=5):
    """Returns the weights, the gradients of a fixed function of them, and the next random draws."""
    leaves = x.clone().requires_grad_(), pos_emb.clone().requires_grad_()
    weights, draw = call(forward, module, *leaves, *args, seed=seed)
    seeded(7)
    wanted = *leaves, *module.parameters()
    found = torch.autograd.grad(weights, wanted, torch.randn(weights.shape), allow_unused=True)
    return weights, found, draw


def same_gradients(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            rtol, atol = tolerance(e)
            torch.testing.assert_close(a, e, rtol=rtol, atol=atol)


def inputs(frames, batch, left=0):
    seeded(3)
    return torch.randn(frames, batch, 64), torch.randn(1, 2 * frames - 1 + left, 48)


def masks(frames, batch, attn_dims):
    padding = torch.zeros(batch, frames, dtype=torch.bool)
    padding[-1, (frames + 1) // 2 :] = True
    if attn_dims is None:
        return padding, None
    return padding, torch.rand((frames, frames) if attn_dims == 2 else (batch, frames, frames)) > 0.6


@pytest.mark.parametrize("attn_dims", [None, 2, 3])
@pytest.mark.parametrize(("frames", "batch"), [(1, 2), (7, 1), (50, 3), (131, 2)])
def test_equals_upstream(frames, batch, attn_dims):
    module = upstream()
    x, pos_emb = inputs(frames, batch)
    padding, mask = masks(frames, batch, attn_dims)
    for key_padding_mask in (None, padding):
        with torch.no_grad():
            expected, expected_draw = call(type(module).forward, module, x, pos_emb, key_padding_mask, mask)
            actual, draw = call(OURS.forward, module, x, pos_emb, key_padding_mask, mask)
        assert draw == expected_draw
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-7)
        assert torch.equal(actual == 0, expected == 0)


def test_positions_of_each_sequence():
    module = upstream()
    x, _ = inputs(12, 3)
    pos_emb = torch.randn(3, 23, 48)
    expected, actual = (call(f, module, x, pos_emb)[0] for f in (type(module).forward, OURS.forward))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_a_mask_of_chunks(chunk):
    """The window given by numbers is the mask that upstream's encoder makes."""
    frames, left = 37, 2
    module = upstream()
    x, pos_emb = inputs(frames, 2)
    index = torch.arange(frames) // chunk
    mask = (index > index[:, None]) | (index < index[:, None] - left)
    with torch.no_grad():
        expected, _ = call(type(module).forward, module, x, pos_emb, None, mask)
        actual = ops.zipformer_attention_weights(
            module.in_proj(x), module.linear_pos(pos_emb), 4, 32, chunk_size=chunk, left_context_chunks=left
        )
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("attn_dims", [None, 2])
@pytest.mark.parametrize(("frames", "batch"), [(1, 2), (30, 3), (75, 2)])
def test_gradients_are_upstreams(frames, batch, attn_dims):
    module = upstream()
    x, pos_emb = inputs(frames, batch)
    padding, mask = masks(frames, batch, attn_dims)
    expected, expected_grads, _ = gradients(type(module).forward, module, x, pos_emb, padding, mask)
    actual, grads, _ = gradients(OURS.forward, module, x, pos_emb, padding, mask)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-7)
    same_gradients(grads, expected_grads, lambda e: (1e-4, 2e-5 * max(1.0, e.abs().max().item())))


def test_training_draws_and_gradients_are_upstreams():
    """Over many seeds, Balancer and Whiten act on the keys, positions are skipped, and scores are penalised."""
    module = upstream(pos_emb_skip_rate=0.3).train()
    x, pos_emb = inputs(20, 3)
    x = x * 6  # scores beyond 25
    padding, _ = masks(20, 3, None)
    kept = 0
    for seed in range(25):
        expected, expected_grads, expected_draw = gradients(
            type(module).forward, module, x, pos_emb, padding, seed=seed
        )
        before, joined = torch.cat, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch, "cat", lambda *a, before=before, joined=joined: joined.append(1) or before(*a)
            )
            actual, grads, draw = gradients(OURS.forward, module, x, pos_emb, padding, seed=seed)
        kept += not joined
        assert draw == expected_draw
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
        same_gradients(grads, expected_grads, lambda e: (2e-3, 2e-4 * e.abs().max().item() + 1e-6))
    assert kept > 10, "the projection was copied on most calls"


def test_dropout_draws_as_upstream():
    module = upstream(dropout=0.25).train()
    x, pos_emb = inputs(16, 2)
    expected, actual = (call(f, module, x, pos_emb)[0] for f in (type(module).forward, OURS.forward))
    assert torch.equal(actual == 0, expected == 0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("left", [0, 5, 64])
def test_streaming(left):
    module = upstream()
    frames, batch = 16, 2
    x, pos_emb = inputs(frames, batch, left)
    cached_key = torch.randn(left, batch, 128)
    padding = torch.zeros(batch, left + frames, dtype=torch.bool)
    padding[1, : left // 2] = True
    arguments = x, pos_emb, cached_key, left, padding
    if left == 0:  # upstream's cache of nothing is everything
        arguments = x, pos_emb, cached_key, left, None
    with torch.no_grad():
        expected, expected_cache = type(module).streaming_forward(module, *arguments)
        actual, cache = OURS.streaming_forward(module, *arguments)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-7)
    if left:
        assert torch.equal(cache, expected_cache)


def test_a_fully_masked_row_is_uniform_and_has_no_gradient():
    module = upstream()
    x, pos_emb = inputs(6, 2)
    padding = torch.ones(2, 6, dtype=torch.bool)
    weights, grads, _ = gradients(OURS.forward, module, x, pos_emb, padding)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))
    assert all(g is None or not g.any() for g in grads)


def test_autocast():
    module = upstream()
    x, pos_emb = inputs(40, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, _ = call(type(module).forward, module, x, pos_emb)
        actual, _ = call(OURS.forward, module, x, pos_emb)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.1, atol=2e-3)


def test_float64():
    module = upstream().double()
    x, pos_emb = (t.double() for t in inputs(21, 2))
    expected, actual = (call(f, module, x, pos_emb)[0] for f in (type(module).forward, OURS.forward))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


def test_the_log_of_the_penalty(caplog, monkeypatch):
    module = upstream().train()
    module.name = "encoder.0"
    x, pos_emb = inputs(8, 2)
    monkeypatch.setattr(attention.random, "random", lambda: 0.0)
    with caplog.at_level("DEBUG"):
        OURS.forward(module, x * 8, pos_emb)
    assert "encoder.0" in caplog.text
