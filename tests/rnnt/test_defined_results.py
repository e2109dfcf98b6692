# SPDX-License-Identifier: Apache-2.0
"""Results where upstream asserts, divides by zero or gives wrong gradients; errors that say what is wrong."""

import math

import pytest
import torch
from problems import TYPES

from fastasr import rnnt


def scores(batch=2, frames=4, length=3, classes=5):
    am = torch.randn(batch, frames, classes, dtype=torch.float64).requires_grad_()
    lm = torch.randn(batch, length + 1, classes, dtype=torch.float64).requires_grad_()
    return lm, am, torch.randint(1, classes, (batch, length)), 0


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_an_empty_transcript_is_blanks(rnnt_type):
    lm, am, symbols, blank = scores(length=0)
    expected = -(am + lm).log_softmax(-1)[..., blank].sum(1)
    loss, occupation = rnnt.rnnt_loss_simple(
        lm, am, symbols, blank, rnnt_type=rnnt_type, reduction="none", return_grad=True
    )
    torch.testing.assert_close(loss, expected)
    boundary = torch.tensor([[0, 0, 0, 4], [0, 0, 0, 2]])
    ranges = rnnt.get_rnnt_prune_ranges(*occupation, boundary, 5)
    assert ranges.shape == (2, 4, 1)
    logits = (am + lm).unsqueeze(2)
    pruned = rnnt.rnnt_loss_pruned(logits, symbols, ranges, blank, boundary, rnnt_type, reduction="none")
    torch.testing.assert_close(pruned[0], expected[0])
    weight = torch.randn(5, 5, dtype=torch.float64)
    for hat in (False, True):
        fused = rnnt.pruned_joiner_loss(
            am.detach(),
            lm.detach(),
            weight,
            None,
            symbols,
            ranges,
            blank,
            boundary,
            rnnt_type,
            use_hat_loss=hat,
        )
        assert math.isfinite(fused)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_a_sequence_without_frames(rnnt_type):
    lm, am, symbols, blank = scores()
    boundary = torch.tensor([[0, 0, 0, 0], [0, 0, 2, 0]])
    loss, occupation = rnnt.rnnt_loss_smoothed(
        lm, am, symbols, blank, boundary=boundary, rnnt_type=rnnt_type, reduction="none", return_grad=True
    )
    assert loss.tolist() == [0.0, math.inf]
    ranges = rnnt.get_rnnt_prune_ranges(*occupation, boundary, 3)
    assert ranges.shape == (2, 4, 3)
    loss.sum().backward()
    assert not am.grad.any()
    assert not lm.grad.any()


@pytest.mark.parametrize("rnnt_type", ["modified", "constrained"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_sequence_that_cannot_be_aligned(rnnt_type, reduction):
    lm, am, symbols, blank = scores(frames=5, length=3)
    boundary = torch.tensor([[0, 0, 3, 5], [0, 0, 3, 2]])
    alone = rnnt.rnnt_loss_simple(lm[:1], am[:1], symbols[:1], blank, rnnt_type=rnnt_type)
    alone_grads = torch.autograd.grad(alone, (lm, am))
    alone = float(alone.detach())
    parts = {"boundary": boundary, "rnnt_type": rnnt_type, "reduction": reduction}
    for zero_infinity in (False, True):
        loss = rnnt.rnnt_loss_simple(lm, am, symbols, blank, **parts, zero_infinity=zero_infinity)
        lost = 0.0 if zero_infinity else math.inf
        if reduction == "none":
            assert loss.tolist() == [alone, lost]
        else:
            assert float(loss.detach()) == pytest.approx((alone + lost) / (2 if reduction == "mean" else 1))
        grads = torch.autograd.grad(loss.sum(), (lm, am))
        for found, expected in zip(grads, alone_grads, strict=True):
            torch.testing.assert_close(found, expected / (2 if reduction == "mean" else 1))


def test_windows_too_narrow_for_the_symbols():
    _, _, symbols, blank = scores(frames=3, length=3)
    ranges = (torch.tensor([0, 0, 0]).view(1, 3, 1) + torch.arange(2)).expand(2, -1, -1)
    logits = torch.randn(2, 3, 2, 5).requires_grad_()
    loss = rnnt.rnnt_loss_pruned(logits, symbols, ranges, blank)
    assert float(loss.detach()) == math.inf
    loss.backward()
    assert not logits.grad.any()
    assert rnnt.rnnt_loss_pruned(logits, symbols, ranges, blank, zero_infinity=True) == 0


def test_more_symbols_than_windows_can_reach_widens_them():
    lm, am, symbols, blank = scores(frames=2, length=3)
    boundary = torch.tensor([[0, 0, 3, 2], [0, 0, 3, 1]])
    _, occupation = rnnt.rnnt_loss_simple(lm, am, symbols, blank, boundary, return_grad=True)
    with pytest.warns(UserWarning, match="s_range 2 cannot reach all symbols of a sequence: 4 is taken"):
        assert rnnt.get_rnnt_prune_ranges(*occupation, boundary, 2).shape == (2, 2, 4)


def test_nothing_is_printed(capfd):
    lm, am, symbols, blank = scores(frames=2)
    boundary = torch.tensor([[0, 0, 3, 2], [0, 0, 2, 2]])
    loss, occupation = rnnt.rnnt_loss_simple(lm, am, symbols, blank, boundary, "modified", return_grad=True)
    rnnt.get_rnnt_prune_ranges(*occupation, boundary, 9)
    loss.backward()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rnnt_type": "regluar"},
            "rnnt_type: expected one of regular, modified, constrained, got 'regluar'",
        ),
        ({"reduction": "avg"}, "reduction: expected one of none, mean, sum, got 'avg'"),
        ({"reduction": None}, "reduction: expected one of none, mean, sum, got None"),
        ({"termination_symbol": 5}, r"termination_symbol: expected a class in \[0, 5\), got 5"),
        (
            {"symbols": torch.tensor([[1, 2, 5], [1, 1, 1]])},
            r"symbols: expected classes in \[0, 5\), got values in \[1, 5\]",
        ),
        ({"symbols": torch.ones(2, 4, dtype=torch.int64)}, r"symbols: expected shape \(2, 3\), got \(2, 4\)"),
        (
            {"boundary": torch.tensor([[0, 0, 4, 4], [0, 0, 3, 4]])},
            "boundary: expected rows .* within S = 3 and T = 4",
        ),
        ({"boundary": torch.tensor([[0, 0, 3, 5], [0, 0, 3, 4]])}, "boundary: expected rows"),
        ({"boundary": torch.tensor([[2, 0, 1, 4], [0, 0, 3, 4]])}, "boundary: expected rows"),
        ({"boundary": torch.tensor([[0, -1, 1, 4], [0, 0, 3, 4]])}, "boundary: expected rows"),
        ({"boundary": torch.tensor([0, 0, 3, 4])}, r"boundary: expected shape \(2, 4\), got \(4,\)"),
        ({"delay_penalty": -0.1}, "delay_penalty: expected a number of at least 0, got -0.1"),
        ({"fastemit_lambda": -1.0}, "fastemit_lambda: expected a number of at least 0"),
    ],
)
def test_wrong_values(change, message):
    lm, am, symbols, blank = scores()
    arguments = {"symbols": symbols, "termination_symbol": blank, **change}
    with pytest.raises(ValueError, match=f"fastasr.rnnt.rnnt_loss_simple: {message}"):
        rnnt.rnnt_loss_simple(lm, am, **arguments)
    logits = (am.unsqueeze(2) + lm.unsqueeze(1)).detach()
    with pytest.raises(ValueError, match=f"fastasr.rnnt.rnnt_loss: {message}"):
        rnnt.rnnt_loss(logits, **arguments)
    if "symbols" in change and change["symbols"].shape[1] == 4:
        return  # its length is what symbols say
    ranges = torch.arange(4).expand(2, 4, 4)
    with pytest.raises(ValueError, match=f"fastasr.rnnt.rnnt_loss_pruned: {message}"):
        rnnt.rnnt_loss_pruned(logits, ranges=ranges, **arguments)


@pytest.mark.parametrize("starts", [[0, 2, 1, 3], [0, 0, 3, 3], [-1, 0, 0, 1]])
def test_wrong_ranges(starts):
    lm, am, symbols, blank = scores()
    ranges = (torch.tensor(starts).view(1, 4, 1) + torch.arange(2)).expand(2, -1, -1)
    weight = torch.randn(5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="ranges: expected"):
        rnnt.pruned_joiner_loss(am, lm, weight, None, symbols, ranges, blank)
    with pytest.raises(ValueError, match="ranges: expected"):
        rnnt.rnnt_loss_pruned(torch.randn(2, 4, 2, 5), symbols, ranges, blank)


def test_ranges_with_gaps_or_of_another_width():
    _, _, symbols, blank = scores()
    gaps = torch.tensor([0, 2]).expand(2, 4, 2)
    with pytest.raises(ValueError, match="ranges: expected neighbouring positions"):
        rnnt.rnnt_loss_pruned(torch.randn(2, 4, 2, 5), symbols, gaps, blank)
    with pytest.raises(ValueError, match=r"logits: expected shape \(2, 4, 3, C\), got \(2, 4, 2, 5\)"):
        rnnt.rnnt_loss_pruned(torch.randn(2, 4, 2, 5), symbols, torch.arange(3).expand(2, 4, 3), blank)


def test_a_constrained_lattice_needs_windows_of_two():
    _, _, symbols, blank = scores()
    ranges = torch.tensor([0, 1, 2, 3]).view(1, 4, 1).expand(2, -1, -1)
    logits = torch.randn(2, 4, 1, 5)
    with pytest.raises(ValueError, match="windows of at least 2 positions for a constrained lattice, got 1"):
        rnnt.rnnt_loss_pruned(logits, symbols, ranges, blank, rnnt_type="constrained")
    assert torch.isfinite(rnnt.rnnt_loss_pruned(logits, symbols, ranges, blank, rnnt_type="modified"))


def test_wrong_types():
    lm, am, symbols, blank = scores()
    with pytest.raises(
        TypeError, match=r"rnnt_loss_simple: symbols: expected an integer tensor, got torch.float32"
    ):
        rnnt.rnnt_loss_simple(lm, am, symbols.float(), blank)
    with pytest.raises(TypeError, match=r"rnnt_loss_simple: am: expected a torch.Tensor, got list"):
        rnnt.rnnt_loss_simple(lm, [1], symbols, blank)
    with pytest.raises(
        TypeError, match="get_rnnt_prune_ranges: boundary: expected an integer tensor, got None"
    ):
        rnnt.get_rnnt_prune_ranges(torch.rand(2, 3, 5), torch.rand(2, 4, 4), None, 2)
    with pytest.raises(ValueError, match="s_range: expected at least 2 for a regular lattice, got 1"):
        rnnt.get_rnnt_prune_ranges_deprecated(
            torch.rand(2, 3, 5), torch.rand(2, 4, 4), torch.tensor([[0, 0, 3, 4]] * 2), 1
        )
    with pytest.raises(TypeError, match="mutual_information_recursion: py: expected px's dtype"):
        rnnt.mutual_information_recursion(torch.rand(2, 3, 5), torch.rand(2, 4, 4).double())


def test_both_orders_of_the_joint_log_probabilities_arguments():
    """k2 has (rnnt_type, boundary), fast_rnnt (boundary, rnnt_type)."""
    logits, symbols = torch.randn(2, 4, 4, 5), torch.randint(0, 5, (2, 3))
    boundary = torch.tensor([[0, 0, 2, 4], [0, 0, 3, 3]])
    expected = rnnt.get_rnnt_logprobs_joint(logits, symbols, 0, "modified", boundary)
    for order in (("modified", boundary), (boundary, "modified")):
        for found, wanted in zip(
            rnnt.get_rnnt_logprobs_joint(logits, symbols, 0, *order), expected, strict=True
        ):
            assert torch.equal(found, wanted)
    (px, _), (other, _) = (
        rnnt.get_rnnt_logprobs_joint(logits, symbols, 0, *order)
        for order in ((boundary,), ("regular", boundary))
    )
    assert torch.equal(px, other)
