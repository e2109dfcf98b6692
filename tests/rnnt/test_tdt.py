# SPDX-License-Identifier: Apache-2.0
"""Losses of token-and-duration transducers: against transformers' loss, and the fused joiner against its logits."""

import math

import pytest
import torch
from steps import seeded

from fastasr import rnnt

DURATIONS = [0, 1, 2, 3, 4]


def problem(batch=3, frames=12, length=5, classes=7, durations=DURATIONS, dtype=torch.float64):
    tokens = torch.randn(batch, frames, length + 1, classes, dtype=dtype, requires_grad=True)
    steps = torch.randn(batch, frames, length + 1, len(durations), dtype=dtype, requires_grad=True)
    targets = torch.randint(0, classes - 1, (batch, length))
    lengths = torch.tensor([frames, frames - 3, frames - 5]), torch.tensor([length, 2, 3])
    return tokens, steps, targets, *lengths, classes - 1, durations


@pytest.mark.parametrize("reduction", ["mean_volume", "mean_batch", "mean", "sum", "none"])
@pytest.mark.parametrize("durations", [DURATIONS, [2, 1, 0], [0, 1]], ids=str)
def test_the_loss_is_transformers(durations, reduction):
    upstream = pytest.importorskip("transformers.loss.loss_tdt").tdt_loss
    call = problem(durations=durations, dtype=torch.float32)
    ours, theirs = (f(*call, sigma=0.05, reduction=reduction) for f in (rnnt.tdt_loss, upstream))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(loss, call[:2], weights) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_joiner_gives_the_loss_of_its_logits(activation, keep_logits, bias):
    *_, targets, frames, symbols, blank, durations = problem()
    shapes = (3, 12, 16), (3, 6, 16), (12, 16), (12,)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    am, lm, weight, b = leaves
    b = b if bias else None
    logits = torch.nn.functional.linear(getattr(torch, activation)(am[:, :, None] + lm[:, None]), weight, b)
    end = targets, frames, symbols, blank, durations, 0.05
    expected = rnnt.tdt_loss(logits[..., :7], logits[..., 7:], *end)
    loss = rnnt.tdt_joiner_loss(am, lm, weight, b, *end, activation=activation, keep_logits=keep_logits)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    wanted = leaves[: 3 + bias]
    for a, t in zip(*(torch.autograd.grad(x, wanted) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, t, rtol=1e-9, atol=1e-11)


def test_dropout_drops_its_share_and_follows_torchs_generator():
    *_, targets, frames, symbols, blank, durations = problem()
    am, lm, weight = torch.randn(3, 12, 64), torch.randn(3, 6, 64), torch.randn(12, 64) / 8
    call = am, lm, weight, None, targets, frames, symbols, blank, durations
    without = rnnt.tdt_joiner_loss(*call)
    losses = []
    for seed in (1, 1, 2):
        seeded(seed)
        losses.append(rnnt.tdt_joiner_loss(*call, dropout_p=0.3))
    assert losses[0] == losses[1]
    assert len({float(x) for x in (without, *losses)}) == 3


def test_what_cannot_be_aligned_is_infinite_with_gradients_of_zero():
    tokens, steps, targets, _, symbols, blank, _ = problem(durations=[2, 4])
    frames = torch.tensor([12, 9, 8])  # an odd number of frames
    call = tokens, steps, targets, frames, symbols, blank, [2, 4]
    loss = rnnt.tdt_loss(*call, reduction="none")
    assert loss[1] == math.inf
    assert loss[[0, 2]].isfinite().all()
    for g in torch.autograd.grad(loss.sum(), (tokens, steps)):
        assert g.isfinite().all()
        assert not g[1].any()
        assert g[0].any()
    assert rnnt.tdt_loss(*call, reduction="none", zero_infinity=True)[1] == 0


def test_one_frame_and_no_symbols():
    tokens, steps = torch.randn(2, 1, 1, 4, dtype=torch.float64), torch.randn(2, 1, 1, 3, dtype=torch.float64)
    ones, none = torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    targets = torch.zeros(2, 0, dtype=torch.int64)
    loss = rnnt.tdt_loss(tokens, steps, targets, ones, none, 3, [0, 1, 2], reduction="none")
    expected = -(tokens.log_softmax(-1)[:, 0, 0, 3] + steps.log_softmax(-1)[:, 0, 0, 1])
    torch.testing.assert_close(loss, expected)


def test_fastemit_scales_the_gradients_of_symbols_alone():
    call = problem()
    plain, more = (rnnt.tdt_loss(*call, fastemit_lambda=x) for x in (0.0, 0.5))
    assert plain == more
    blank, found = call[5], [torch.autograd.grad(x, call[0])[0] for x in (plain, more)]
    assert not torch.allclose(*found)
    assert blank == 6


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({2: torch.full((3, 5), 7)}, "symbols"),
        ({3: torch.tensor([12, 13, 1])}, "logit_lengths"),
        ({4: torch.tensor([5, 6, 1])}, "target_lengths"),
        ({4: torch.tensor([5.0, 2, 1])}, "target_lengths"),
        ({5: 7}, "blank_token_id"),
        ({6: [0, 1, 2, 3]}, "duration_logits"),
        ({6: [0, 1, 1, 2, 3]}, "durations"),
        ({6: [0, 1, -1, 2, 3]}, "durations"),
    ],
)
def test_wrong_arguments(changed, argument):
    call = [changed.get(i, value) for i, value in enumerate(problem())]
    with pytest.raises((ValueError, TypeError), match=rf"fastasr.rnnt.tdt_loss: {argument}: expected"):
        rnnt.tdt_loss(*call)


def test_a_wrong_reduction():
    with pytest.raises(ValueError, match=r"fastasr.rnnt.tdt_loss: reduction: expected one of mean_volume"):
        rnnt.tdt_loss(*problem(), reduction="average")
