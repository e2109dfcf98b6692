# SPDX-License-Identifier: Apache-2.0
"""Values weighted by attention weights in memory: the kernel for few columns, and the cases that leave it out."""

import pytest
import torch
from steps import relative, seeded

import fastasr
from fastasr.models.zipformer import self_attention
from fastasr.models.zipformer.self_attention import weighted


def _eager(weights, values):
    heads = weights.shape[0]
    sources, batch, channels = values.shape
    values = values.reshape(sources, batch, heads, channels // heads).permute(2, 1, 0, 3)
    return (weights @ values).permute(2, 1, 0, 3).flatten(2)


@pytest.mark.parametrize(
    ("heads", "batch", "targets", "sources", "columns"),
    [(4, 3, 70, 70, 12), (1, 2, 9, 300, 40), (2, 1, 1, 17, 3), (8, 2, 16, 144, 12)],
)
def test_values(heads, batch, targets, sources, columns):
    ours, eager, draws = 0.0, 0.0, 8  # with few numbers the error of one draw is luck
    for seed in range(draws):
        seeded(seed)
        weights = torch.randn(heads, batch, targets, sources + 3).softmax(-1)[..., :sources]  # rows apart
        values = torch.randn(sources, batch, heads * columns)
        exact = _eager(weights.double(), values.double())
        assert self_attention._is_native(weights, values)
        y = weighted(weights, values)
        assert y.shape == exact.shape
        ours, eager = ours + relative(y, exact), eager + relative(_eager(weights, values), exact)
    assert ours / draws <= 1.1 * eager / draws + 1e-8
    first = weighted(weights[:1], values[..., :columns])
    assert torch.equal(first, y[..., :columns])
    by_rows = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(weighted(weights, by_rows), y)


@pytest.mark.parametrize(
    ("heads", "batch", "targets", "sources", "columns"),
    [(4, 3, 70, 70, 12), (2, 1, 300, 300, 32), (2, 1, 1, 17, 3), (8, 2, 16, 144, 12)],
)
def test_gradients(heads, batch, targets, sources, columns):
    ours, eager, draws = [0.0, 0.0], [0.0, 0.0], 8
    for seed in range(draws):
        seeded(seed)
        weights = torch.randn(heads, batch, targets, sources + 3).softmax(-1)[..., :sources]  # rows apart
        values = torch.randn(sources, batch, heads * columns)
        grad = torch.randn(targets, batch, heads * columns)

        def gradients(f, dtype, of=(weights, values), grad=grad):
            of = [t.to(dtype).requires_grad_() for t in of]
            y = f(*of)
            assert f is _eager or type(y.grad_fn).__name__ == "_WeightedBackward"
            return torch.autograd.grad(y, of, grad.to(dtype))

        exact = gradients(_eager, torch.float64)
        for total, f in ((ours, weighted), (eager, _eager)):
            for i, (g, e) in enumerate(zip(gradients(f, torch.float32), exact, strict=True)):
                assert g.shape == e.shape
                total[i] += relative(g, e) / draws
    assert all(mine <= 1.1 * theirs + 1e-8 for mine, theirs in zip(ours, eager, strict=True))


def test_nothing_to_weigh():
    assert weighted(torch.ones(2, 3, 0, 5), torch.ones(5, 3, 8)).shape == (0, 3, 8)
    assert weighted(torch.ones(2, 0, 4, 5), torch.ones(5, 0, 8)).shape == (4, 0, 8)
    assert not weighted(torch.ones(2, 3, 4, 0), torch.ones(0, 3, 8)).any()


def test_an_infinity_and_a_nan_stay_in_their_columns():
    weights, values = torch.full((2, 1, 5, 6), 0.5), torch.ones(6, 1, 8)
    values[2, 0, 1], values[3, 0, 6] = float("inf"), float("nan")
    y = weighted(weights, values)
    assert (y[..., 1] == float("inf")).all()
    assert y[..., 6].isnan().all()
    assert (y[..., [0, 2, 3, 4, 5, 7]] == 3.0).all()


def test_where_it_is_left_out():
    weights, values = torch.rand(2, 1, 4, 4), torch.randn(4, 1, 6)
    assert not self_attention._is_native(weights.double(), values.double())
    assert not self_attention._is_native(weights.transpose(2, 3), values)
    with torch.autocast("cpu", torch.bfloat16):
        assert not self_attention._is_native(weights, values)
    with fastasr.backend("eager"):
        assert not self_attention._is_native(weights, values)
    many = torch.randn(4, 1, 2 * self_attention.MOST_CHANNELS + 2, requires_grad=True)
    assert type(weighted(weights, many).grad_fn).__name__ != "_WeightedBackward"
    compiled = torch.compile(lambda w, v: weighted(w, v), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(weights, values), weighted(weights, values))
