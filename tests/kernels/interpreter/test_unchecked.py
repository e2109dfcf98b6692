# SPDX-License-Identifier: Apache-2.0
"""On a GPU nobody reads indices before the kernels do: whatever they are, nothing outside of the tensors is touched."""

import math

import torch

from fastasr import ops
from fastasr.kernels import rnnt_joiner, rnnt_lattice, rnnt_pruned_lattice


def test_symbols_and_starts_of_the_joiner():
    batch, frames, length, d, v = 2, 9, 6, 20, 35
    am, lm, weight, bias = (torch.randn(s) for s in ((2, 9, d), (2, 7, d), (v, d), (v,)))
    symbols = torch.randint(1, v, (batch, length))
    symbols[1, 2], symbols[1, 3] = v, -1
    starts = (torch.arange(frames) * (length - 1) // (frames - 1)).expand(batch, frames).contiguous()
    starts[0, 1], starts[0, 2], starts[0, 3] = 7, -5, 1 << 62
    tensors, rest = (am, lm, weight, bias, symbols, starts, None, None), (3, 0, 3, False, 0, 0.0)
    px, py, _, normaliser, _ = rnnt_joiner.rnnt_joiner_forward(*tensors, *rest, True, False)
    grads = torch.randn(2, batch, frames, 3).unbind(0)
    found = rnnt_joiner.rnnt_joiner_backward(*grads, None, *tensors, *rest, normaliser, (True,) * 4, None)
    assert (px[0, 1:4] == -math.inf).all()
    assert (py[0, 1:4] == -math.inf).all()
    s = starts[1].unsqueeze(1) + torch.arange(3)
    unknown = (s == 2) | (s == 3)
    assert torch.equal(px[1].isnan(), unknown), "an unknown symbol is NaN"
    assert torch.equal(py[1].isfinite(), s <= 6)
    assert all(t.shape == u.shape for t, u in zip(found, tensors[:4], strict=True))


def test_a_boundary_outside_is_moved_inside():
    x, y = torch.randn(2, 3, 7) - 1, torch.randn(2, 4, 6) - 1
    boundary = torch.tensor([[-5, -1, 99, 1 << 40], [2, 3, 1, 2]])
    inside = torch.tensor([[0, 0, 3, 6], [2, 3, 1, 2]])
    scores, shares = rnnt_lattice.rnnt_lattice_forward(x, y, boundary, True)
    dx, dy = rnnt_lattice.rnnt_lattice_backward(None, scores, shares, boundary, 3, 7, 6)
    assert scores[1] == -math.inf
    assert not dx[1].any()
    assert not dy[1].any()
    truth = ops.rnnt_lattice.definition(x.double(), y.double(), inside, return_occupation=True)
    for a, t in zip((scores, dx, dy), truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=0, atol=5e-6)


def test_starts_of_the_pruned_lattice():
    x, y = torch.randn(2, 4, 3) - 1, torch.randn(2, 4, 3) - 1
    starts = torch.tensor([[5, -7, 1 << 40, 0], [0, 9, 3, -(1 << 50)]])
    scores, shares = rnnt_pruned_lattice.rnnt_pruned_lattice_forward(x, y, starts, None, False, True)
    rnnt_pruned_lattice.rnnt_pruned_lattice_backward(None, scores, shares, starts, None, 3, False)
