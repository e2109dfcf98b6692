# SPDX-License-Identifier: Apache-2.0
"""k2's own basic test input, in float64, and sums over all paths of tiny lattices."""

import pytest
import torch
from problems import TYPES, logits_loss, random_problem

from fastasr import rnnt

LM = torch.tensor([[[0, 0, 1], [0, 1, 1], [1, 0, 1], [2, 2, 0]]], dtype=torch.float64)
AM = torch.tensor([[[0, 1, 2], [0, 0, 0], [0, 2, 4], [0, 3, 3]]], dtype=torch.float64)
SYMBOLS = torch.tensor([[0, 1, 0]])
GOLDENS = {
    "simple": (7.5040133560, 6.5457850042, 9.6587693286),
    "smoothed": (7.2976970459, 6.2196078759, 9.3233539959),
    "am_smoothed": (6.8382603495, 6.6166099417, 9.2626572384),
    "delay": (7.5314226945, 6.5970260303, 9.7093595752),
    "full": (4.6665557031, 3.3411896150, 6.2675880411),
    "pruned": (6.8204093065, 3.3411896150, 6.8204093065),
}


@pytest.mark.parametrize("boundary", [None, torch.tensor([[0, 0, 3, 4]])], ids=["whole", "boundary"])
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_goldens(rnnt_type, boundary):
    expected = {name: values[TYPES.index(rnnt_type)] for name, values in GOLDENS.items()}
    head = LM, AM, SYMBOLS, 2
    simple, occupation = rnnt.rnnt_loss_simple(*head, boundary, rnnt_type, return_grad=True)
    ranges = rnnt.get_rnnt_prune_ranges(*occupation, torch.tensor([[0, 0, 3, 4]]), 2)
    assert ranges[0, :, 0].tolist() == [0, 0, 1, 2]
    am, lm = rnnt.do_rnnt_pruning(AM, LM, ranges)
    eye = torch.eye(3, dtype=torch.float64)
    got = {
        "simple": simple,
        "smoothed": rnnt.rnnt_loss_smoothed(*head, boundary=boundary, rnnt_type=rnnt_type),
        "am_smoothed": rnnt.rnnt_loss_smoothed(*head, 0.0, 0.333, boundary, rnnt_type),
        "delay": rnnt.rnnt_loss_simple(*head, boundary, rnnt_type, delay_penalty=0.1),
        "full": rnnt.rnnt_loss(
            torch.tanh(AM.unsqueeze(2) + LM.unsqueeze(1)), SYMBOLS, 2, boundary, rnnt_type
        ),
        "pruned": rnnt.rnnt_loss_pruned(torch.tanh(am + lm), SYMBOLS, ranges, 2, boundary, rnnt_type),
    }
    assert {name: float(loss) for name, loss in got.items()} == pytest.approx(expected, abs=1e-9)
    fused = rnnt.pruned_joiner_loss(AM, LM, eye, None, SYMBOLS, ranges, 2, boundary, rnnt_type)
    whole = rnnt.joiner_loss(AM, LM, eye, None, SYMBOLS, 2, boundary, rnnt_type)
    assert float(fused) == pytest.approx(expected["pruned"], abs=1e-9)
    assert float(whole) == pytest.approx(expected["full"], abs=1e-9)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_the_sum_over_all_paths(rnnt_type):
    for seed in range(6):
        problem = random_problem(seed, ragged=True)
        for b, (_, _, length, frames) in enumerate(problem.boundary.tolist()):
            length, frames = min(length, 3), min(frames, 5)
            logits = problem.full[b, :frames, : length + 1]
            symbols = problem.symbols[b : b + 1, :length]
            loss = rnnt.rnnt_loss(logits.unsqueeze(0), symbols, problem.blank, None, rnnt_type)
            expected = logits_loss(logits, symbols[0].tolist(), problem.blank, rnnt_type)
            assert float(loss) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_hat_sums_over_all_paths(rnnt_type):
    for blank in (0, 2):
        logits = torch.randn(1, 4, 3, 5, dtype=torch.float64)
        symbols = torch.tensor([[1, 3]])
        ranges = torch.arange(3).expand(1, 4, 3)
        loss = rnnt.rnnt_loss_pruned(logits, symbols, ranges, blank, None, rnnt_type, use_hat_loss=True)
        expected = logits_loss(logits[0], [1, 3], blank, rnnt_type, hat=True)
        assert float(loss) == pytest.approx(expected, abs=1e-9)
