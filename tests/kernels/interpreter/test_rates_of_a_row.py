# SPDX-License-Identifier: Apache-2.0
"""The tables of a row's rates, the move of recordings, and means over frames, by kernels and by their formulas."""

import pytest
import torch

from fastasr import backend
from fastasr.kernels import _recordings
from fastasr.ops import _row

LENGTHS = [[1], [0], [5, 0, 0], [0, 0, 90, 200, 64, 3, 0, 64], [1] * 40]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("factors", [(1,), (1, 2, 4, 8)])
def test_tables_of_rates(lengths, factors):
    """They are those of the formula, and frames of nobody between recordings see nothing."""
    lengths = torch.tensor(lengths)
    slots = (lengths + 7) // 8 * 8
    begins, frames = slots.cumsum(0) - slots, int(slots.sum()) + 16
    with backend("triton"):
        found = _row.tables(lengths.float(), begins, begins + lengths, frames, factors)
    with backend("eager"):
        expected = _row.tables(lengths.float(), begins, begins + lengths, frames, factors)
    for ours, theirs, factor in zip(found, expected, factors, strict=True):
        assert all(map(torch.equal, ours[:-1], theirs[:-1]))
        assert ours.gaps
        first, end = _recordings.bounds(ours.starts, frames // factor)
        there = ~theirs.hidden[0]
        begin, behind = (t.index_select(0, theirs.recording) for t in theirs.starts.view(-1, 2).unbind(1))
        assert torch.equal(first[there].long(), begin[there])
        assert torch.equal(end[there].long(), behind[there])
        assert torch.equal(first[~there], end[~there])
        assert (first.diff() >= 0).all()
        assert (end.diff() >= 0).all()


def means_agree(found, product, dtype):
    """Asserts that (y, d rows, d weights) of the formula in float64 and of kernels agree. ``product``: the gradient's
    norm times that of the rows."""
    expected, ours = found
    assert [t.dtype for t in ours] == [torch.float32, dtype, torch.float32]
    sizes = expected[0].norm(), expected[1].norm(), 0.1 * product  # the last one's terms cancel
    for exact, t, size in zip(expected, ours, sizes, strict=True):
        assert exact.shape == t.shape
        assert (t - exact).norm() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[t.dtype] * size


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("factor", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means(lengths, factor, dtype):
    """Frames of nobody count for nothing, whatever they hold, and get no gradient."""
    lengths = torch.tensor(lengths)
    slots = (lengths + factor - 1) // factor * factor
    begins, frames = slots.cumsum(0) - slots, int(slots.sum()) + 2 * factor
    with backend("triton"):
        (table,) = _row.tables(lengths.float(), begins, begins + lengths, frames, (1,))
    hidden = table.hidden[0]
    rows, weights = torch.randn(frames, 1, 130).to(dtype), torch.randn(factor).softmax(0)
    g = torch.randn(frames // factor, 1, 130)
    found = []
    for name, fill in (("eager", 0.0), ("triton", float("nan"))):
        x = rows.clone()
        x[hidden] = fill
        leaves = [t.double() for t in (x, weights)] if name == "eager" else [x, weights]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with backend(name):
            y = _row.averaged(leaves[0], table.left, leaves[1])
            grads = torch.autograd.grad(y, leaves, g.to(y.dtype))
        assert not grads[0][hidden].any()
        found.append((y, *grads))
    means_agree(found, g.norm() * rows.norm(), dtype)


@pytest.mark.parametrize("frames", [0, 1, 40, 67])
@pytest.mark.parametrize("factor", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_a_padded_batch(frames, factor, dtype):
    """The last frame counts again for those that the last group lacks. Programs share many columns."""
    rows, weights = torch.randn(frames, 3, 130).to(dtype), torch.randn(factor).softmax(0)
    g = torch.randn(-(-frames // factor), 3, 130)
    found = []
    for name in ("eager", "triton"):
        leaves = [t.double() if name == "eager" else t for t in (rows, weights)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with backend(name):
            y = _row.averaged(leaves[0], None, leaves[1])
            found.append((y, *torch.autograd.grad(y, leaves, g.to(y.dtype))))
    means_agree(found, g.norm() * rows.norm(), dtype)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves(lengths, dtype):
    """From a padded batch to a row, with frames of nobody between recordings and behind them, and back."""
    lengths, longest = torch.tensor(lengths), max(1, *lengths)
    padded = torch.arange(len(lengths)) * longest
    slots = lengths + torch.arange(len(lengths)) % 3
    begins, frames = slots.cumsum(0) - slots, int(slots.sum()) + 20
    x = torch.randn(len(lengths) * longest, 5, 30).to(dtype).requires_grad_()
    found = []
    for name in ("eager", "triton"):
        with backend(name):
            y = _row.moved(x, padded, begins, lengths, frames)
            back = _row.moved(y, begins, padded, lengths, len(x))
            found.append((y, back, *torch.autograd.grad(back.square().sum(), x)))
    assert all(map(torch.equal, *found))
