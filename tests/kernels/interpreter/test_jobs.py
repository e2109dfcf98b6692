# SPDX-License-Identifier: Apache-2.0
"""Kernels that serve many calls in one launch give what those of one call give, bit for bit."""

import pytest
import torch

from fastasr import backend
from fastasr.kernels import _decided, _jobs, _parts
from fastasr.kernels import whitening_gradient as kernels
from fastasr.ops.balancer_gradient import Balanced, balance_, sums_of
from fastasr.ops.whitening_gradient import Whitened, moments_of, whiten_

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(7, 16), (300, 48), (1, 32), (2100, 32)]  # frames and channels
ON, OFF = torch.ones(1), torch.zeros(1)


pytestmark = pytest.mark.usefixtures("by_triton")


def table(rows):
    return torch.tensor(rows, dtype=torch.int64)


def drawn(dtype, padded):
    """Yields (x, its gradient, whether it acts, hidden frames), of several sizes, the second one inside of wider x."""
    generator = torch.Generator().manual_seed(0)
    for i, (frames, channels) in enumerate(SIZES):
        wide = torch.randn(frames, 1, 16 + channels, generator=generator) * 2.0 + 1.0
        x = wide.to(dtype)[..., 16:] if i == 1 else wide[..., 16:].to(dtype).contiguous()
        grad = torch.randn(x.shape, generator=generator).to(dtype)
        hidden = torch.rand(frames, 1, generator=generator) > 0.6 if padded else None
        yield x, grad, OFF if i == 3 else ON, hidden


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_for_balancers(dtype, padded, monkeypatch):
    launches = []
    monkeypatch.setattr(
        _jobs, "run", lambda *a, run=_jobs.run, **options: launches.append(a) or run(*a, **options)
    )
    cases = list(drawn(dtype, padded))
    limits = torch.tensor([-0.1, 0.1, 0.2, 1.0, 0.04])
    found = sums_of([Balanced(x, -1, act, hidden) for x, _, act, hidden in cases], table)
    for (x, grad, act, hidden), sums in zip(cases, found, strict=True):
        assert sums is not None
        alone, ahead = grad.clone(), grad.clone()
        balance_(alone, x, -1, limits, act, hidden)
        balance_(ahead, x, -1, limits, act, hidden, sums)
        assert torch.equal(ahead, alone)
        assert torch.equal(ahead, grad) == (act is OFF)
    assert len(launches) < len(cases)


@pytest.mark.parametrize("scratch", [0, 1 << 30])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_for_whitens(dtype, padded, scratch, monkeypatch):
    monkeypatch.setattr(kernels, "SCRATCH", scratch)
    cases = [(*case, groups) for case in drawn(dtype, padded) for groups in (1, 2)]
    limits = torch.tensor([1.01, 0.05])
    found = moments_of([Whitened(x, groups, act, hidden) for x, _, act, hidden, groups in cases], table)
    changed = 0
    for (x, grad, act, hidden, groups), moments in zip(cases, found, strict=True):
        assert (moments is None) == (x.shape[2] // groups % 16 != 0)  # widths of jobs are multiples of 16
        alone, ahead = grad.clone(), grad.clone()
        white, as_white = torch.zeros(2, dtype=torch.bool).unbind()
        whiten_(alone, x, groups, limits, act, white, hidden)
        whiten_(ahead, x, groups, limits, act, as_white, hidden, moments)
        assert torch.equal(ahead, alone)
        assert white == as_white
        changed += not torch.equal(ahead, grad)
    assert changed >= 2


def test_calls_that_are_no_jobs():
    x = torch.randn(9, 1, 32)
    calls = [
        Balanced(t, dim, ON, None)
        for t, dim in ((x[..., 1:17], -1), (x[..., :24], -1), (x, 0), (x.double(), -1))
    ]
    with backend("auto"):
        assert sums_of(calls, table) == [None] * 4
    assert sums_of(calls[:3], table) == [None] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_many_tables(dtype):
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for parts, columns in ((3, 16), (200, 48), (1100, 16), (5, 512)):
        pairs.append(
            (torch.randn(parts, columns, generator=generator), torch.full((columns,), 9.0, dtype=dtype))
        )
    _parts.add_parts_of_jobs(pairs, table)
    for parts, out in pairs:
        alone = torch.empty_like(out)
        _parts.add_parts(parts, alone)
        assert torch.equal(out, alone)
        torch.testing.assert_close(out.float(), parts.sum(0).to(dtype).float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_of_parameters(dtype):
    rate, works, pairs = torch.tensor([0.5]), [], []
    for i, shape in enumerate([(), (5,), (48,), (1300,)]):
        for rows in ((), (4,)) if shape else ((),):
            limits = torch.tensor([float(i != 2), -0.5, 0.5])
            numbers = (torch.rand(4, 1).to(dtype), rate) if rows else (None, None)
            x, of_call = 2 * torch.randn(shape), (limits, *numbers)
            grad = torch.randn((*rows, *shape))
            late = _decided.limited(grad, x, *of_call, lambda out, do, work: works.append(work) or True)
            pairs.append((late, _decided.limited(grad, x, *of_call)))
    assert len(works) == len(pairs)
    _decided.limited_of_jobs(works, table)
    for late, at_once in pairs:
        assert torch.equal(late, at_once)
