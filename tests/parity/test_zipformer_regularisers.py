# SPDX-License-Identifier: Apache-2.0
"""Schedules, regularisers and other small parts against the ``zipformer`` package."""

import random

import pytest
import torch
from steps import draws, moved, numbers, seeded, set_batch_count

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from zipformer.modules import scaling as theirs
from zipformer.modules import zipformer as their_zipformer

from fastasr.models import zipformer as ours
from fastasr.models.zipformer.balancer import CutoffEstimator
from fastasr.testing import seeds

# --------------------------------------------------------------------------- schedules
_POINTS = st.lists(
    st.tuples(st.integers(-50, 50), st.floats(-3, 3)),
    min_size=1,
    max_size=5,
    unique_by=lambda point: point[0],
).map(sorted)


@settings(max_examples=60, deadline=None)
@given(_POINTS, _POINTS, st.floats(-3, 3))
def test_piecewise_linear(points, other, number):
    mine, upstream = ours.PiecewiseLinear(*points), theirs.PiecewiseLinear(*points)
    my_other, their_other = ours.PiecewiseLinear(*other), theirs.PiecewiseLinear(*other)
    pairs = [
        (mine, upstream),
        (ours.PiecewiseLinear(mine), upstream),
        (mine * number, upstream * number),
        (mine + number, upstream + number),
        (mine + my_other, upstream + their_other),
        (mine.max(number), upstream.max(number)),
        (mine.min(number), upstream.min(number)),
        (mine.max(my_other), upstream.max(their_other)),
        (mine.min(my_other), upstream.min(their_other)),
    ]
    for a, b in pairs:
        for x in (-60, *(x for x, _ in points), *(x for x, _ in other), 0.3, 17.25, 60):
            assert a(x) == pytest.approx(b(x), abs=1e-12)
    assert [mine(x) for x, _ in points] == [upstream(x) for x, _ in points]
    assert (mine == my_other) == (upstream == their_other)


@pytest.mark.parametrize("count", [None, 0, 123.0, 4000, 10**6])
@pytest.mark.parametrize("training", [True, False])
def test_scheduled_float(count, training):
    def values(module):
        schedule = module.ScheduledFloat((0.0, 0.5), (4000.0, 0.05), default=0.3)
        other = module.ScheduledFloat((100.0, 0.2), (3000.0, 0.4), default=0.1)
        found = []
        random.seed(torch.initial_seed())
        for x in (schedule, schedule + 1.5, schedule + other, schedule.max(0.25), schedule.max(other)):
            x.train(training).batch_count = count
            found.append(float(x))
        return found, random.getstate()

    found, state = values(ours)
    expected, expected_state = values(theirs)
    assert found == pytest.approx(expected, abs=1e-15)
    assert state == expected_state


def test_cutoff_estimator():
    mine, upstream = CutoffEstimator(0.05), theirs.CutoffEstimator(0.05)
    generator = random.Random(seeds.seeded(0))
    for _ in range(300):
        x = generator.gauss(10, 3)
        assert mine(x) == upstream(x)
        assert mine.cutoff == upstream.cutoff


# --------------------------------------------------------------------------- regularisers
def _gradient(module, x, grad, seed=0):
    seeded(seed)
    x = x.clone().requires_grad_()
    y = module(x)
    assert torch.equal(y, x)
    y.backward(grad)
    return x.grad, draws()


BALANCERS = {
    "mean too low": ({"min_positive": 0.6}, 0.0, 1.0),
    "mean too high": ({"max_positive": 0.3}, 0.5, 1.0),
    "too small": ({"min_abs": 2.0}, 0.3, 1.0),
    "too large": ({"max_abs": 0.5}, -0.2, 1.0),
    "both": ({"min_positive": 0.7, "max_abs": 0.5}, -0.2, 1.0),
    "within": ({"min_positive": 0.1, "max_positive": 0.9, "min_abs": 0.1, "max_abs": 3.0}, 0.1, 1.0),
    "limits at 0 and 1": ({"min_positive": 0.0, "max_positive": 1.0, "min_abs": 0.0}, 1.0, 1.0),
    "schedules": ({"min_abs": "schedule", "prob": 0.5}, 0.1, 1.0),
    "far from 0": ({"max_positive": 0.7, "max_abs": 0.5}, 8.0, 1.0),
}


@pytest.mark.parametrize(("options", "shift", "scale"), BALANCERS.values(), ids=BALANCERS)
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_balancer(options, shift, scale, channel_dim):
    x = torch.randn(13, 6, 7, 6, generator=numbers(0)) * scale + shift
    grad = torch.randn(x.shape, generator=numbers(1))

    def build(module):
        arguments = {"prob": 1.0, **options}
        if "schedule" in arguments.values():
            arguments["min_abs"] = module.ScheduledFloat((0.0, 2.0), (100.0, 1.0))
        balancer = module.Balancer(6, channel_dim, **arguments)
        return set_batch_count(balancer, 50.0)

    for seed in range(3):
        found, state = _gradient(build(ours), x, grad, seed)
        expected, expected_state = _gradient(build(theirs), x, grad, seed)
        assert state == expected_state
        # the change is a 25th of the gradient: compared by itself
        change, expected_change = found - grad, expected - grad
        assert (change - expected_change).abs().max() <= 2e-5 * expected_change.abs().max() + 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_balancer_dtypes(dtype):
    x, grad = torch.randn(9, 4, 6).to(dtype), torch.randn(9, 4, 6).to(dtype)
    found, _ = _gradient(ours.Balancer(6, -1, max_abs=0.5, prob=1.0), x, grad)
    expected, _ = _gradient(theirs.Balancer(6, -1, max_abs=0.5, prob=1.0), x, grad)
    assert found.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=4 * eps)


def test_balancer_where_means_dwarf_deviations():
    """The test compares the error against fp64 with upstream's own."""
    generator = numbers(0)
    x = 0.02 * torch.randn(50, 4, 8, generator=generator) + torch.linspace(-4, 4, 8)
    grad = torch.randn(x.shape, generator=generator)
    options = {"max_positive": 0.55, "min_positive": 0.45, "max_abs": 0.5, "prob": 1.0}
    truth, _ = _gradient(ours.Balancer(8, -1, **options), x.double(), grad.double())
    found, _ = _gradient(ours.Balancer(8, -1, **options), x, grad)
    upstream, _ = _gradient(theirs.Balancer(8, -1, **options), x, grad)
    assert (found - truth).abs().max() <= 1.1 * (upstream - truth).abs().max()


def test_balancer_on_constant_channels():
    x, grad = torch.ones(8, 3, 4), torch.randn(8, 3, 4)
    found, _ = _gradient(ours.Balancer(4, -1, max_positive=0.5, prob=1.0), x, grad)
    expected, _ = _gradient(theirs.Balancer(4, -1, max_positive=0.5, prob=1.0), x, grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("limit", [1.0, 2.0, 50.0])
@pytest.mark.parametrize("shape", [(40, 2, 12), (5, 2, 12)], ids=str)
def test_whiten(groups, limit, shape):
    generator = numbers(0)
    x = torch.randn(shape, generator=generator) + 2 * torch.randn(*shape[:2], 1, generator=generator) + 1.0
    grad = torch.randn(shape, generator=generator)
    mine, upstream = (module.Whiten(groups, limit, (0.3, 1.0), 0.1) for module in (ours, theirs))
    for seed in range(4):
        found, state = _gradient(mine, x, grad, seed)
        expected, expected_state = _gradient(upstream, x, grad, seed)
        assert state == expected_state
        assert mine.prob == upstream.prob
        change, expected_change = found - grad, expected - grad
        assert (change - expected_change).abs().max() <= 1e-4 * expected_change.abs().max() + 3e-7


def test_whiten_with_schedules():
    x, grad = torch.randn(30, 2, 8).cumsum(-1), torch.randn(30, 2, 8)

    def build(module):
        limit = module.ScheduledFloat((0.0, 4.0), (20000.0, 8.0), default=4.0)
        scale = module.ScheduledFloat((0.0, 0.1), (20000.0, 0.2), default=0.1)
        return set_batch_count(module.Whiten(1, limit, 1.0, scale), 10.0)

    mine, upstream = build(ours), build(theirs)
    for seed in range(3):
        found, state = _gradient(mine, x, grad, seed)
        expected, expected_state = _gradient(upstream, x, grad, seed)
        assert state == expected_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_penalties_and_losses():
    x = (30 * torch.randn(4, 3, 9)).double()
    loss_shape = torch.randn(5)

    def gradients(module):
        seeded(0)
        leaf, aside = x.clone().requires_grad_(), loss_shape.clone().requires_grad_()
        y = module.penalize_abs_values_gt(leaf, limit=25.0, penalty=1e-4, name="x")
        y = module.with_loss(y, (aside**2).sum(0, keepdim=True) * 3, "loss")
        module_scale = module.scale_grad(y * y, 0.3)
        module_scale.sum().backward()
        return leaf.grad, aside.grad, draws()

    for found, expected in zip(gradients(ours), gradients(theirs), strict=True):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, expected)
        else:
            assert found == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["Dropout2", "Dropout3", "ScaleGrad", "Identity"])
def test_small_modules(name, training):
    arguments = {"Dropout2": (0.3,), "Dropout3": (0.3, 1), "ScaleGrad": (0.2,), "Identity": ()}[name]
    x, grad = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    results = []
    for module in (ours, theirs):
        seeded(0)
        leaf = x.clone().requires_grad_()
        y = getattr(module, name)(*arguments).train(training)(leaf)
        y.backward(grad)
        results.append((y, leaf.grad, draws()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_softmax_and_channels():
    x, grad = 5 * torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((ours, theirs), leaves, strict=True):
        module.softmax(leaf, dim=-1).backward(grad)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for channels in (4, 7, 9):
        found, expected = (module.convert_num_channels(x, channels) for module in (ours, theirs))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(3, 0), (1, 0), (7, 5), (1200, 0), (4, 2000)], ids=str)
def test_positional_encoding(shape):
    frames, left = shape
    mine = ours.CompactRelPositionalEncoding(16, 0.0).eval()
    upstream = their_zipformer.CompactRelPositionalEncoding(16, 0.0).eval()
    x = torch.zeros(frames, 2, 8)
    for _ in range(2):
        assert torch.equal(mine(x, left), upstream(x, left))
    assert mine(x.double(), left).dtype == torch.float64


@pytest.mark.parametrize("frames", [1, 4, 5, 11])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_resampling(frames, factor):
    x = torch.randn(frames, 2, 6)
    downs = [module.SimpleDownsample(6, factor, 0.0, False) for module in (ours, their_zipformer)]
    for down in downs:
        torch.nn.init.normal_(down.bias, generator=numbers(0))
    found, expected = (down(x) for down in downs)
    torch.testing.assert_close(found, expected)
    ups = [module.SimpleUpsample(6, factor) for module in (ours, their_zipformer)]
    assert torch.equal(*(up(x) for up in ups))


@pytest.mark.parametrize("chunk_size", [-1, 1, 3, 4, 16, 100])
@pytest.mark.parametrize("frames", [1, 4, 10])
@pytest.mark.parametrize("bias", [True, False])
def test_chunk_causal_convolution(frames, chunk_size, bias):
    models = []
    for module in (ours, theirs):
        seeded(0)
        models.append(module.ChunkCausalDepthwiseConv1d(6, 7, initial_scale=0.5, bias=bias))
    mine, upstream = (moved(model, 0.05, 3) for model in models)
    x = torch.randn(2, 6, frames)
    torch.testing.assert_close(mine(x, chunk_size), upstream(x, chunk_size))
    cache = torch.randn(2, 6, 3)
    torch.testing.assert_close(mine.streaming_forward(x, cache), upstream.streaming_forward(x, cache))
