# SPDX-License-Identifier: Apache-2.0
"""Every function against fast_rnnt on random lattices in float64: values, occupations, gradients, ranges."""

import pytest
import torch
from problems import TYPES, random_problem
from steps import numbers

from fastasr import rnnt

SEEDS = range(12)
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# fast_rnnt rounds the penalty to float32 when there is a boundary; this one has no rounding error
DELAY = 0.125


def compare(ours, theirs, *inputs):
    """Compares results and gradients of two calls, whose keyword arguments are bound."""
    results = []
    for call in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(*leaves)
        loss, occupation = out if isinstance(out, tuple) else (out, ())
        occupation = [x.detach().clone() for x in occupation]  # fast_rnnt's backward scales them in place
        factors = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)
        gradients = torch.autograd.grad((loss * factors).sum(), leaves)
        results.append((loss.detach(), *occupation, *gradients))
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "whole"])
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_losses(fast_rnnt, rnnt_type, ragged, reduction):
    for seed in SEEDS:
        p = random_problem(seed, ragged=ragged)
        delay = DELAY * (seed % 2)
        rest = {"symbols": p.symbols, "termination_symbol": p.blank, "boundary": p.boundary}
        rest |= {"rnnt_type": rnnt_type, "delay_penalty": delay, "reduction": reduction}

        def both(name, rest=rest, **more):
            return [
                lambda *x, module=module: getattr(module, name)(*x, **rest, **more, return_grad=True)
                for module in (rnnt, fast_rnnt)
            ]

        compare(*both("rnnt_loss_simple"), p.lm, p.am)
        compare(*both("rnnt_loss_smoothed", lm_only_scale=0.25, am_only_scale=0.0), p.lm, p.am)
        compare(*both("rnnt_loss_smoothed", lm_only_scale=0.0, am_only_scale=0.5), p.lm, p.am)
        compare(*both("rnnt_loss_smoothed", lm_only_scale=0.1, am_only_scale=0.2), p.lm, p.am)
        compare(*both("rnnt_loss"), p.full)


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "whole"])
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_log_probabilities(fast_rnnt, rnnt_type, ragged):
    for seed in SEEDS:
        p = random_problem(seed, ragged=ragged)
        more = {"boundary": p.boundary, "rnnt_type": rnnt_type}
        ranges = some_ranges(p, rnnt_type)
        logits = p.full.gather(2, ranges.unsqueeze(-1).expand(-1, -1, -1, p.full.shape[-1]))
        for name, head in {
            "get_rnnt_logprobs": (p.lm, p.am, p.symbols, p.blank),
            "get_rnnt_logprobs_smoothed": (p.lm, p.am, p.symbols, p.blank, 0.1, 0.3),
            "get_rnnt_logprobs_joint": (p.full, p.symbols, p.blank),
            "get_rnnt_logprobs_pruned": (logits, p.symbols, ranges, p.blank),
        }.items():
            ours = getattr(rnnt, name)(*head, **more)
            theirs = getattr(fast_rnnt, name)(*head, **more)
            torch.testing.assert_close(ours, theirs, **EXACT)


def some_ranges(p, rnnt_type, s_range=3):
    _, occupation = rnnt.rnnt_loss_simple(
        p.lm, p.am, p.symbols, p.blank, p.boundary, rnnt_type, reduction="sum", return_grad=True
    )
    return rnnt.get_rnnt_prune_ranges(*occupation, p.whole(), s_range)


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "whole"])
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_pruned_losses(fast_rnnt, rnnt_type, ragged):
    for seed in SEEDS:
        p = random_problem(seed, ragged=ragged)
        ranges = some_ranges(p, rnnt_type, 2 + seed % 3)
        weight, bias = torch.randn(6, p.am.shape[2], dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        symbols = p.symbols % 6
        rest = {
            "symbols": symbols,
            "ranges": ranges,
            "termination_symbol": p.blank % 6,
            "boundary": p.boundary,
        }
        rest |= {"rnnt_type": rnnt_type, "delay_penalty": DELAY * (seed % 2), "reduction": "none"}

        def three_steps(am, lm, weight, bias, rest=rest, ranges=ranges):
            am, lm = fast_rnnt.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)
            logits = torch.nn.functional.linear(torch.tanh(am + lm), weight, bias)
            return fast_rnnt.rnnt_loss_pruned(logits=logits, **rest)

        inputs = p.am, p.lm, weight, bias
        compare(lambda *x, rest=rest: rnnt.pruned_joiner_loss(*x, **rest), three_steps, *inputs)
        am, lm = rnnt.do_rnnt_pruning(p.am, p.lm, ranges)
        logits = torch.nn.functional.linear(torch.tanh(am + lm), weight, bias)
        ours, theirs = (
            lambda x, f=module.rnnt_loss_pruned, rest=rest: f(x, **rest, return_grad=True)
            for module in (rnnt, fast_rnnt)
        )
        compare(ours, theirs, logits)
        compare(lambda x, rest=rest: rnnt.rnnt_loss_pruned(x, **rest), lambda x, f=theirs: f(x)[0], logits)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_whole_joiner(fast_rnnt, rnnt_type):
    for seed in SEEDS:
        p = random_problem(seed)
        weight, bias = torch.randn(6, p.am.shape[2], dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        rest = {"symbols": p.symbols % 6, "termination_symbol": p.blank % 6, "boundary": p.boundary}
        rest |= {"rnnt_type": rnnt_type, "delay_penalty": DELAY}

        def two_steps(am, lm, weight, bias, rest=rest):
            hidden = torch.relu(am.unsqueeze(2) + lm.unsqueeze(1))
            return fast_rnnt.rnnt_loss(torch.nn.functional.linear(hidden, weight, bias), **rest)

        ours = lambda *x, rest=rest: rnnt.joiner_loss(*x, **rest, activation="relu")  # noqa: E731
        compare(ours, two_steps, p.am, p.lm, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("modified", [False, True], ids=["regular", "modified"])
def test_ranges_are_equal_bit_for_bit(fast_rnnt, modified, dtype):
    for seed in range(60):
        g = numbers(seed)
        batch, length = int(torch.randint(1, 5, (), generator=g)), int(torch.randint(1, 40, (), generator=g))
        frames = length + int(torch.randint(0, 60, (), generator=g))
        px = torch.rand(batch, length, frames + (not modified), generator=g, dtype=dtype)
        py = torch.rand(batch, length + 1, frames, generator=g, dtype=dtype)
        if seed % 3 == 0:  # ties
            px, py = (px * 3).round() / 3, (py * 3).round() / 3
        ends = torch.randint(1, length + 1, (batch,), generator=g)
        times = (ends + (torch.rand(batch, generator=g) * (frames - ends + 1)).long()).clamp(max=frames)
        boundary = torch.stack((torch.zeros_like(ends), torch.zeros_like(ends), ends, times), 1)
        for s_range in (1 + (not modified), 5, length + 3):
            expected = fast_rnnt.get_rnnt_prune_ranges(px, py, boundary, s_range)
            found = rnnt.get_rnnt_prune_ranges(px, py, boundary, s_range)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*s_range 2 cannot reach")
def test_ranges_grow_as_upstream_s(fast_rnnt):
    px, py = torch.rand(2, 9, 5), torch.rand(2, 10, 4)
    boundary = torch.tensor([[0, 0, 9, 4], [0, 0, 5, 2]])
    expected = fast_rnnt.get_rnnt_prune_ranges(px, py, boundary, 2)
    assert expected.shape[2] == 4
    assert torch.equal(rnnt.get_rnnt_prune_ranges(px, py, boundary, 2), expected)


def test_recursion(fast_rnnt):
    both = rnnt, fast_rnnt
    for seed in SEEDS:
        g = numbers(seed)
        for modified in (False, True):
            px = torch.randn(3, 4, 7 + (not modified), generator=g, dtype=torch.float64)
            py = torch.randn(3, 5, 7, generator=g, dtype=torch.float64)
            for boundary in (None, torch.tensor([[1, 2, 4, 7], [0, 0, 3, 6], [0, 3, 2, 5]])):
                one = [lambda *t, m=m, b=boundary: m.mutual_information_recursion(*t, b, True) for m in both]
                joint = [
                    lambda *t, m=m, b=boundary: m.joint_mutual_information_recursion(t[:3], t[3:], b)
                    for m in both
                ]
                compare(*one, px, py)
                parts = [torch.randn(px.shape, generator=g, dtype=torch.float64) for _ in range(3)]
                parts += [torch.randn(py.shape, generator=g, dtype=torch.float64) for _ in range(3)]
                compare(*joint, *parts)


def test_pruning_selects_the_same(fast_rnnt):
    am, lm = torch.randn(2, 5, 4), torch.randn(2, 7, 4)
    ranges = torch.tensor([0, 0, 1, 3, 4]).view(1, 5, 1) + torch.arange(3)
    found, expected = (m.do_rnnt_pruning(am, lm, ranges.expand(2, -1, -1)) for m in (rnnt, fast_rnnt))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
