# SPDX-License-Identifier: Apache-2.0
"""The lattices against the sum over every path, and the pruned one against the whole one."""

import pytest
import torch

from fastasr import backend, ops

INF = float("inf")


def paths(x, y, boundary, regular: bool) -> torch.Tensor:
    """Returns the scores as sums over all paths."""
    scores = []
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(boundary.tolist()):
        found = []

        def walk(s, t, total, b=b, s_end=s_end, t_end=t_end, found=found):
            if (s, t) == (s_end, t_end):
                found.append(total)
            if s < s_end and t < t_end + regular:
                walk(s + 1, t + (not regular), total + x[b, s, t])
            if t < t_end:
                walk(s, t + 1, total + y[b, s, t])

        walk(s_begin, t_begin, x.new_zeros(()))
        scores.append(torch.logsumexp(torch.stack(found), 0) if found else x.new_tensor(-INF))
    return torch.stack(scores)


def gradients(scores, *tensors):
    kept = scores[scores.isfinite()].sum()
    if not kept.requires_grad:  # nothing is reached
        return [torch.zeros_like(t) for t in tensors]
    return torch.autograd.grad(kept, tensors, materialize_grads=True)


@pytest.mark.parametrize("name", ["auto", "eager"])
@pytest.mark.parametrize("regular", [True, False], ids=["regular", "modified"])
@pytest.mark.parametrize(("symbols", "frames"), [(0, 0), (0, 3), (2, 0), (1, 1), (3, 4), (4, 2), (5, 5)])
def test_scores_and_occupations_are_those_of_all_paths(symbols, frames, regular, name):
    x = torch.randn(3, symbols, frames + regular, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, symbols + 1, frames, dtype=torch.float64, requires_grad=True)
    whole = [0, 0, symbols, frames]
    part = [min(1, symbols), min(1, frames), symbols, frames]
    boundary = torch.tensor([whole, part, [0, 0, symbols // 2, max(frames - 1, 0)]])
    expected = paths(x, y, boundary, regular)
    with backend(name):
        scores, *occupation = ops.rnnt_lattice(x, y, boundary, return_occupation=True)
        found = gradients(scores, x, y)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    for truth, gradient, arc in zip(gradients(expected, x, y), found, occupation, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(arc, truth, rtol=1e-11, atol=1e-12)
        assert not arc.requires_grad


def scattered(x, y, starts, symbols: int, modified: bool):
    """Returns the band in whole lattices of -inf."""
    batch, frames, window = x.shape
    at = (starts[..., None] + torch.arange(window)).transpose(1, 2)  # (B, R, T)
    band = x if modified else torch.cat([x[..., :-1], torch.full_like(x[..., :1], -INF)], 2)
    whole_x = x.new_full((batch, symbols, frames), -INF).scatter(1, at, band.transpose(1, 2))
    whole_y = y.new_full((batch, symbols + 1, frames), -INF).scatter(1, at, y.transpose(1, 2))
    if not modified:
        whole_x = torch.cat([whole_x, whole_x.new_full((batch, symbols, 1), -INF)], 2)
    return whole_x, whole_y


@pytest.mark.parametrize("name", ["auto", "eager"])
@pytest.mark.parametrize("modified", [False, True], ids=["regular", "modified"])
@pytest.mark.parametrize("step", [0, 1, 2, 5])
@pytest.mark.parametrize(("frames", "window"), [(1, 1), (1, 4), (9, 1), (9, 3), (21, 5), (6, 17)])
def test_pruned_is_whole_with_the_band_scattered(frames, window, step, modified, name):
    batch = 24
    x, y = (torch.randn(batch, frames, window, dtype=torch.float64, requires_grad=True) for _ in "xy")
    starts = torch.randint(0, step + 1, (batch, frames)).cumsum(1)
    starts -= starts[:, :1] * (torch.arange(batch)[:, None] % 4 > 0)
    symbols = int(starts.max()) + window + 1
    t_end = torch.randint(1, frames + 1, (batch,))
    t_begin = torch.where(torch.arange(batch) % 3 == 0, t_end // 3, 0)
    last = starts.gather(1, t_end[:, None] - 1)[:, 0]
    s_begin = starts.gather(1, t_begin[:, None].clamp(max=frames - 1))[:, 0].minimum(last)
    s_begin = torch.where(torch.arange(batch) % 3 == 0, s_begin, 0)
    s_end = (last + torch.randint(0, window + 1, (batch,))).maximum(s_begin)
    boundary = torch.stack([s_begin, t_begin, s_end, t_end], 1)
    with backend("eager"):
        truth = ops.rnnt_lattice(*scattered(x, y, starts, symbols, modified), boundary)
        expected = gradients(truth, x, y)
    with backend(name):
        scores, *occupation = ops.rnnt_pruned_lattice(
            x, y, starts, boundary, modified=modified, return_occupation=True
        )
        found = gradients(scores, x, y)
    torch.testing.assert_close(scores, truth, rtol=1e-11, atol=1e-11)
    for t, gradient, arc in zip(expected, found, occupation, strict=True):
        torch.testing.assert_close(gradient, t, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(arc, t, rtol=1e-10, atol=1e-11)


def test_a_path_takes_every_symbol_and_every_frame_once():
    x, y = torch.randn(5, 40, 201) * 50 - 200, torch.randn(5, 41, 200) * 50 - 200
    boundary = torch.tensor([[0, 0, 40, 200], [0, 0, 1, 200], [3, 7, 40, 150], [0, 0, 0, 30], [5, 5, 5, 5]])
    _, symbols, blanks = ops.rnnt_lattice(x, y, boundary, return_occupation=True)
    length = (boundary[:, 2:] - boundary[:, :2]).float()
    torch.testing.assert_close(symbols.sum((1, 2)), length[:, 0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(blanks.sum((1, 2)), length[:, 1], rtol=1e-5, atol=1e-4)


def test_float32_is_right_far_below_what_logarithms_resolve():
    x, y = torch.randn(2, 60, 301) * 5 - 130, torch.randn(2, 61, 300) * 5 - 130
    truth, *expected = ops.rnnt_lattice(x.double(), y.double(), return_occupation=True)
    scores, *occupation = ops.rnnt_lattice(x, y, return_occupation=True)
    assert truth.max() < -40_000
    torch.testing.assert_close(scores.double(), truth, rtol=2e-7, atol=0)
    for found, right in zip(occupation, expected, strict=True):
        assert (found - right).abs().max() < 1e-5


@pytest.mark.parametrize("modified", [False, True], ids=["regular", "modified"])
def test_no_path_to_the_end_scores_minus_infinity_and_gives_zeros(modified):
    x = torch.full((2, 3, 5 + (not modified)), -1.0, requires_grad=True)
    y = torch.full((2, 4, 5), -1.0, requires_grad=True)
    with torch.no_grad():
        x[0, 1] = -INF
    scores = ops.rnnt_lattice(x, y)
    assert scores[0] == -INF
    assert scores[1].isfinite()
    (-scores).sum().backward()
    assert (x.grad[0] == 0).all()
    assert (y.grad[0] == 0).all()
    assert x.grad.isfinite().all()
    assert (x.grad[1] != 0).any()


def test_types():
    x, y = torch.randn(1, 2, 4), torch.randn(1, 3, 3)
    assert ops.rnnt_lattice(x.bfloat16(), y.bfloat16()).dtype is torch.float32
    assert ops.rnnt_lattice(x.half(), y).dtype is torch.float32
    assert ops.rnnt_lattice(x, y.double()).dtype is torch.float64
    x = x.bfloat16().requires_grad_()
    ops.rnnt_lattice(x, y).sum().backward()
    assert x.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("modified", [False, True], ids=["regular", "modified"])
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_an_end_that_is_a_cell_of_the_band_but_not_reached_gives_zeros(name, modified):
    """The beginning lies outside every window; the log-probabilities next to the end are finite."""
    x, y = (torch.randn(1, 4, 5, requires_grad=True) for _ in range(2))
    starts = torch.tensor([[0, 3, 6, 9]])
    boundary = torch.tensor([[1, 3, 10, 4]])
    with backend(name):
        scores = ops.rnnt_pruned_lattice(x, y, starts, boundary, modified=modified)
    assert scores.tolist() == [-INF]
    for grad in torch.autograd.grad(scores.sum(), (x, y)):
        assert torch.equal(grad, torch.zeros(1, 4, 5))


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 4, 3), (24,)], ids=str)
def test_blanks_of_as_many_elements_but_another_shape_are_refused(shape):
    x, starts = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"blank_logprobs: expected shape \(2, 3, 4\)"):
        ops.rnnt_pruned_lattice(x, torch.randn(shape), starts)
