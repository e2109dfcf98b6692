# SPDX-License-Identifier: Apache-2.0
"""The lattices' kernels in the interpreter against float64: boundaries, blocks of columns, writes and reads."""

import pytest
import torch

from fastasr import ops
from fastasr.kernels import rnnt_lattice, rnnt_pruned_lattice

INF = float("inf")


def _whole(batch, symbols, frames, modified, boundary=None):
    torch.manual_seed(0)
    x, y = (
        torch.randn(batch, symbols, frames + (not modified)) - 1,
        torch.randn(batch, symbols + 1, frames) - 1,
    )
    return x, y, None if boundary is None else torch.tensor(boundary)


def _run(x, y, boundary, grad=None):
    scores, shares = rnnt_lattice.rnnt_lattice_forward(x, y, boundary, True)
    sizes = (x.shape[1], x.shape[2], y.shape[2])
    return scores, *rnnt_lattice.rnnt_lattice_backward(grad, scores, shares, boundary, *sizes)


def _close(found, truth):
    for a, t in zip(found, truth, strict=True):
        finite = t.isfinite()
        assert torch.equal(a.isfinite(), finite)
        assert torch.equal(a.isnan(), t.isnan())
        assert (a.double() - t)[finite].abs().max() < 5e-6 if finite.any() else True


@pytest.mark.parametrize("modified", [False, True], ids=["regular", "modified"])
@pytest.mark.parametrize("lanes", [1024, 4])
def test_blocks_of_columns(lanes, modified, monkeypatch):
    monkeypatch.setattr(rnnt_lattice, "MAX_LANES", lanes)
    boundary = [[0, 0, 3, 13], [1, 2, 3, 10], [0, 0, 0, 4], [3, 13, 3, 13]]
    x, y, boundary = _whole(4, 3, 13, modified, boundary)
    x[0, 1, :2] = -INF
    truth = ops.rnnt_lattice.definition(x.double(), y.double(), boundary, return_occupation=True)
    _close(_run(x, y, boundary), truth)
    grad = torch.tensor([2.0, 0.0, -1.0, 0.5])
    scaled = (truth[0], *(t * grad[:, None, None] for t in truth[1:]))
    _close(_run(x, y, boundary, grad), scaled)


@pytest.mark.parametrize("modified", [False, True], ids=["regular", "modified"])
@pytest.mark.parametrize("where", [(0, 0), (2, 1), (1, 5)])
def test_a_nan_reaches_its_sequence_alone(where, modified):
    x, y, _ = _whole(2, 3, 6, modified)
    x[1][where] = float("nan")
    truth = ops.rnnt_lattice.definition(x.double(), y.double(), None, return_occupation=True)
    _close(_run(x, y, None), truth)


def test_a_boundary_outside_is_moved_inside(guarded):
    x, y, _ = _whole(2, 3, 6, False)
    boundary = torch.tensor([[-5, -1, 99, 1 << 40], [2, 3, 1, 2]])
    inside = torch.tensor([[0, 0, 3, 6], [2, 3, 1, 2]])
    scores, dx, dy = _run(guarded(x), guarded(y), guarded(boundary))
    assert scores[1] == -INF
    assert not dx[1].any()
    assert not dy[1].any()
    truth = ops.rnnt_lattice.definition(x.double(), y.double(), inside, return_occupation=True)
    _close((scores, dx, dy), truth)


@pytest.mark.parametrize("modified", [False, True], ids=["regular", "modified"])
def test_no_address_is_stored_twice(modified, writes, guarded):
    x, y, boundary = _whole(2, 3, 6, modified, [[0, 0, 3, 6], [1, 1, 2, 5]])
    _run(guarded(x), guarded(y), boundary)
    assert writes.clashes == 0


def _band(batch, frames, window, step):
    torch.manual_seed(frames)
    x, y = torch.randn(batch, frames, window) - 1, torch.randn(batch, frames, window) - 1
    moves = torch.randint(0, step + 1, (batch, frames))
    return x, y, moves.cumsum(1) - moves[:, :1]


def _run_band(x, y, starts, boundary, modified):
    scores, shares = rnnt_pruned_lattice.rnnt_pruned_lattice_forward(x, y, starts, boundary, modified, True)
    sizes = (x.shape[2], modified)
    backward = rnnt_pruned_lattice.rnnt_pruned_lattice_backward
    return scores, *backward(None, scores, shares, starts, boundary, *sizes)


@pytest.mark.parametrize("modified", [False, True], ids=["regular", "modified"])
@pytest.mark.parametrize(("window", "step"), [(1, 1), (3, 0), (3, 2), (4, 6)])
def test_bands(window, step, modified, writes, guarded):
    x, y, starts = _band(4, 6, window, step)
    last = starts[:, -1] + window // 2
    boundary = torch.stack(
        [torch.zeros_like(last), torch.zeros_like(last), last, torch.full_like(last, 6)], 1
    )
    boundary[1, 2:] = torch.tensor([int(starts[1, 3]) + window - 1, 4])
    boundary[2, :2] = torch.tensor([int(starts[2, 2]), 2])
    boundary[3] = torch.tensor([2, 3, 2, 3])
    truth = ops.rnnt_pruned_lattice.definition(
        x.double(), y.double(), starts, boundary, modified=modified, return_occupation=True
    )
    _close(_run_band(guarded(x), guarded(y), guarded(starts), guarded(boundary), modified), truth)
    assert writes.clashes == 0
    truth = ops.rnnt_pruned_lattice.definition(
        x.double(), y.double(), starts, modified=modified, return_occupation=True
    )
    _close(_run_band(x, y, starts, None, modified), truth)


def test_starts_are_believed_and_nothing_outside_is_read(guarded):
    x, y, _ = _band(2, 4, 3, 1)
    starts = torch.tensor([[5, -7, 1 << 40, 0], [0, 9, 3, -(1 << 50)]])
    _run_band(guarded(x), guarded(y), guarded(starts), None, False)
