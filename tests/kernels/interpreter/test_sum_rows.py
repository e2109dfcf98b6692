# SPDX-License-Identifier: Apache-2.0
"""The sum over rows, and the linear layers whose bias has it as its gradient."""

import pytest
import torch

from fastasr import backend, ops
from fastasr._recording import recorded_by
from fastasr.graphs.recording import Recording
from fastasr.kernels import _sum_rows
from fastasr.ops._linear import MANY_ROWS
from fastasr.testing.tolerance import compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (70, 64), (1300, 100), (513, 2, 65)], ids=str)
def test_the_sum(shape, dtype):
    x = torch.randn(shape).to(dtype)
    every = tuple(range(len(shape) - 1))
    comparison = compare(_sum_rows.sum_rows(x), x.sum(every), x.double().sum(every))
    assert comparison.ok, str(comparison)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize(("rows", "recorded"), [(600, True), (600, False), (200, True)])
def test_linear_adds_up_its_bias_gradient_in_a_recorded_call(rows, recorded, late, monkeypatch):
    """It does so from 512 rows on, and not elsewhere, where torch's node of autograd costs less."""
    calls, sums = [], _sum_rows.sum_rows
    monkeypatch.setattr(_sum_rows, "sum_rows", lambda x, later: calls.append(x) or sums(x, later))
    tensors = [torch.randn(s).requires_grad_() for s in ((rows, 2, 16), (32, 16), (32,))]
    grad, device = torch.randn(rows, 2, 32), torch.device("cpu")
    back = Recording(device)
    back.allow_late(tensors[2:] if late else ())
    ahead = Recording(device, back) if recorded else None
    with backend("triton" if recorded else "auto"), recorded_by(ahead):
        y = ops.linear(*tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = ops.linear.definition(*wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    found, truth = torch.autograd.grad(y, tensors, grad), torch.autograd.grad(expected, wide, grad.double())
    by_kernels = recorded and 2 * rows > MANY_ROWS
    if late and by_kernels:
        assert [*back.came_late(tensors, found)] == [(tensors[2], True)]
        assert [*back.came_late(tensors, [None, None, 2.0 * found[2]])] == [(tensors[2], False)]
        found[2].fill_(float("nan"))  # nothing is there yet
        assert [*back.came_late(tensors, found)] == [(tensors[2], False)]
    back.runs = True
    back.end()
    for a, t in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=1e-4)
    assert len(calls) == by_kernels
