# SPDX-License-Identifier: Apache-2.0
"""The lattice of tokens and durations against the sum over every path, transformers' loss and the RNN-T lattice."""

import math

import pytest
import torch
from steps import cotangent
from test_rnnt_lattice import gradients

from fastasr import backend, ops

DURATIONS = [(0, 1, 2, 3, 4), (1,), (0, 1), (3, 1), (2, 0, 5), (0,), (2, 4), (0, 90)]


def paths(x, y, z, durations, boundary) -> torch.Tensor:
    """Returns the scores as sums over all paths."""
    scores = []
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(boundary.tolist()):
        found = []

        def walk(t, s, total, b=b, s_end=s_end, t_end=t_end, found=found):
            if (t, s) == (t_end, s_end):
                found.append(total)
            for i, d in enumerate(durations):
                if d and t + d <= t_end:
                    walk(t + d, s, total + y[b, t, s] + z[b, t, s, i])
                if s < s_end and t + d < t_end:
                    walk(t + d, s + 1, total + x[b, t, s] + z[b, t, s, i])

        walk(t_begin, s_begin, x.new_zeros(()))
        scores.append(torch.logsumexp(torch.stack(found), 0) if found else x.new_tensor(-math.inf))
    return torch.stack(scores)


def problem(batch, frames, symbols, count, dtype=torch.float64, mean=-1.0):
    x, y = (torch.randn(batch, frames, symbols + n, dtype=dtype) + mean for n in range(2))
    z = torch.randn(batch, frames, symbols + 1, count, dtype=dtype) + mean
    return [t.requires_grad_() for t in (x, y, z)]


@pytest.mark.parametrize("name", ["auto", "eager"])
@pytest.mark.parametrize("durations", DURATIONS, ids=str)
@pytest.mark.parametrize(("symbols", "frames"), [(0, 0), (0, 3), (2, 0), (0, 1), (2, 1), (3, 4), (2, 5)])
def test_scores_and_gradients_are_those_of_all_paths(symbols, frames, durations, name):
    tensors = problem(3, frames, symbols, len(durations))
    part = [min(1, symbols), min(1, frames), symbols, frames]
    boundary = torch.tensor([[0, 0, symbols, frames], part, [0, 0, symbols // 2, max(frames - 1, 0)]])
    expected = paths(*tensors, durations, boundary)
    with backend(name):
        scores = ops.tdt_lattice(*tensors, torch.tensor(durations), boundary)
        found = torch.autograd.grad(scores, tensors, cotangent(scores))
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    for truth, gradient in zip(gradients(expected * cotangent(expected), *tensors), found, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-12)


def test_scores_are_transformers_losses():
    tdt_loss = pytest.importorskip("transformers.loss.loss_tdt").tdt_loss
    batch, frames, symbols, classes = 3, 12, 5, 7
    tokens = torch.randn(batch, frames, symbols + 1, classes, dtype=torch.float64)
    lengths = torch.tensor([12, 9, 7]), torch.tensor([5, 2, 3])
    targets = torch.randint(0, classes - 1, (batch, symbols))
    boundary = torch.stack((torch.zeros(batch), torch.zeros(batch), lengths[1], lengths[0]), 1).long()
    logprobs = tokens.log_softmax(-1)
    index = targets[:, None, :, None].expand(-1, frames, -1, 1)
    for durations in (0, 1, 2, 3, 4), (2, 1, 0), (1, 0):  # with others upstream's cells may be unreachable
        z = torch.randn(batch, frames, symbols + 1, len(durations), dtype=torch.float64)
        expected = tdt_loss(tokens, z, targets, *lengths, classes - 1, list(durations), 0.03, "none")
        x, y = logprobs[:, :, :-1].gather(-1, index)[..., 0] - 0.03, logprobs[..., -1] - 0.03
        scores = ops.tdt_lattice(x, y, z.log_softmax(-1), torch.tensor(durations), boundary)
        torch.testing.assert_close(-scores.float(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_durations_of_1_make_a_modified_rnnt_lattice_that_ends_with_a_blank(name):
    x, y, _ = problem(3, 9, 5, 1)
    z = torch.zeros(3, 9, 6, 1, dtype=torch.float64)
    boundary = torch.tensor([[0, 0, 5, 9], [0, 0, 2, 4], [1, 2, 4, 9]])
    symbols = x.transpose(1, 2)
    last = torch.arange(9) == boundary[:, 3:].unsqueeze(2) - 1
    expected = ops.rnnt_lattice(symbols.masked_fill(last, -math.inf), y.transpose(1, 2), boundary)
    with backend(name):
        scores = ops.tdt_lattice(x, y, z, torch.tensor([1]), boundary)
    torch.testing.assert_close(scores, expected)


def test_every_symbol_is_emitted_once_and_durations_add_up_to_the_frames():
    durations = torch.tensor([0, 1, 2, 3, 4])
    tensors = problem(4, 90, 25, 5, torch.float32, mean=-80.0)
    boundary = torch.tensor([[0, 0, 25, 90], [0, 0, 1, 90], [3, 7, 25, 80], [0, 0, 0, 30]])
    x, _, z = torch.autograd.grad(ops.tdt_lattice(*tensors, durations, boundary).sum(), tensors)
    length = (boundary[:, 2:] - boundary[:, :2]).float()
    torch.testing.assert_close(x.sum((1, 2)), length[:, 0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((z.sum((1, 2)) * durations).sum(1), length[:, 1], rtol=1e-5, atol=1e-4)


def test_float32_is_right_far_below_what_logarithms_resolve():
    tensors = [t.detach() * 5 for t in problem(2, 300, 60, 5, torch.float32, mean=-40.0)]
    durations = torch.tensor([0, 1, 2, 3, 4])
    found, exact = ([t.to(d).requires_grad_() for t in tensors] for d in (torch.float32, torch.float64))
    scores, truth = (ops.tdt_lattice(*leaves, durations) for leaves in (found, exact))
    assert truth.max() < -20_000
    torch.testing.assert_close(scores.double(), truth, rtol=2e-7, atol=0)
    for g, right in zip(
        *(torch.autograd.grad(y, x, cotangent(y)) for y, x in ((scores, found), (truth, exact))), strict=True
    ):
        assert (g - right).abs().max() < 5e-5  # an arc's x + z, some -400, is rounded to 1.5e-5


def test_no_path_to_the_end_scores_minus_infinity_and_gives_zeros():
    tensors = problem(2, 7, 3, 2, torch.float32)
    boundary = torch.tensor([[0, 0, 3, 7], [0, 0, 3, 6]])
    scores = ops.tdt_lattice(*tensors, torch.tensor([2, 4]), boundary)
    assert (scores == -math.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(scores.sum(), tensors))
