# SPDX-License-Identifier: Apache-2.0
"""Every backend gives each stream what it would get alone, whichever streams come, go and restart beside it."""

import copy
import random

import pytest
import torch
from conftest import BINS, CHUNK, LEFT
from oracle import Alone
from steps import numbers, relative

import fastasr
from fastasr.asr.streaming import CudaGraphBackend, EagerBackend
from fastasr.asr.streaming.cuda_graph import bucket_sizes
from fastasr.asr.streaming.native import NativeBackend
from fastasr.testing import seeds

FRAMES = 2 * CHUNK + 13
SLOTS = 5
TOLERANCE = 5e-6


def _plainly(function):
    return function


def _cuda_graph(*options, **named):
    return CudaGraphBackend(*options, record=_plainly, **named)


BACKENDS = {"eager": EagerBackend, "graph of plain calls": _cuda_graph, "native": NativeBackend}
every_backend = pytest.mark.parametrize("kind", BACKENDS)


@every_backend
@pytest.mark.parametrize("seed", range(3))
def test_streams_at_random(model, kind, seed):
    """A random program sends chunks for random subsets in random order, resets streams, and moves one to
    another slot.
    """
    draw, generator = random.Random(seeds.seeded(seed)), numbers(seed)
    chunk, left = draw.choice([(8, 16), (8, 32), (16, 16)])
    backend = BACKENDS[kind](model, chunk, left, max_streams=SLOTS)
    alone = [Alone(model, chunk, left) for _ in range(SLOTS)]
    for _ in range(14):
        action = draw.random()
        slot = draw.randrange(SLOTS)
        if action < 0.15:
            backend.reset(slot)
            alone[slot].reset()
        elif action < 0.3:
            other = draw.randrange(SLOTS)
            backend.import_states(other, backend.export_states(slot))
            alone[other].states = copy.deepcopy(alone[slot].states)
        slots = draw.sample(range(SLOTS), draw.randint(1, SLOTS))
        x = torch.randn(len(slots), 2 * chunk + 13, BINS, generator=generator)
        y = backend.step(x, slots)
        assert y.shape == (len(slots), chunk // 2, 48)
        for row, slot in enumerate(slots):
            assert relative(y[row], alone[slot].step(x[row])) < TOLERANCE, (kind, slot)


@every_backend
def test_states_are_upstreams(model, kind):
    """Exported states are those of the wrapper, and either continues from the other's."""
    backend, alone = BACKENDS[kind](model, CHUNK, LEFT, max_streams=2), Alone(model, CHUNK, LEFT)
    x = torch.randn(4, FRAMES, BINS, generator=numbers(1))
    for chunk in x[:2]:
        backend.step(chunk[None], [1])
        alone.step(chunk)
    states = backend.export_states(1)
    assert [s.shape for s in states] == [s.shape for s in alone.states]
    for state, expected in zip(states, alone.states, strict=True):
        torch.testing.assert_close(state.to(expected.dtype), expected, rtol=1e-4, atol=1e-4)
    backend.import_states(0, alone.states)
    alone.states = states
    y = backend.step(x[2][None], [0])[0]
    assert relative(y, alone.step(x[2])) < TOLERANCE
    backend.import_states(0, states)  # a copy: the backend goes on with its own
    y = backend.step(x[3][None], [1])[0]
    torch.testing.assert_close(backend.export_states(0), states)
    assert y.isfinite().all()


@every_backend
def test_what_is_not_finite_stays_in_its_stream(model, kind):
    backend, alone = BACKENDS[kind](model, CHUNK, LEFT, max_streams=2), Alone(model, CHUNK, LEFT)
    x = torch.randn(3, 2, FRAMES, BINS, generator=numbers(2))
    bad = x[0].clone()
    bad[1, 3, 4] = float("nan")
    y = backend.step(bad, [0, 1])
    assert relative(y[0], alone.step(x[0, 0])) < TOLERANCE
    assert y[1].isnan().any()
    y = backend.step(x[1], [0, 1])
    assert relative(y[0], alone.step(x[1, 0])) < TOLERANCE
    backend.reset(1)
    alone.reset()
    assert relative(backend.step(x[2], [0, 1])[1], alone.step(x[2, 1])) < TOLERANCE


@every_backend
@pytest.mark.parametrize("weights", ["bf16", "fp16", "int8"])
def test_rounded_weights(model, kind, weights):
    before = copy.deepcopy(model.state_dict())
    backend, alone = BACKENDS[kind](model, CHUNK, LEFT, weights=weights), Alone(model, CHUNK, LEFT)
    x = torch.randn(FRAMES, BINS, generator=numbers(3))
    assert 1e-6 < relative(backend.step(x[None], [0])[0], alone.step(x)) < 0.02
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_upstream_and_swapped_models(model, upstream_model):
    swapped = copy.deepcopy(upstream_model)
    assert len(fastasr.accelerate(swapped).replaced) > 50
    backends = [EagerBackend(m, CHUNK, LEFT) for m in (model, upstream_model, swapped)]
    for x in torch.randn(3, FRAMES, BINS, generator=numbers(4)):
        ours, theirs, fast = (backend.step(x[None], [0]) for backend in backends)
        assert relative(ours, theirs) < TOLERANCE
        assert relative(fast, theirs) < TOLERANCE


def test_graphs_are_recorded_once_per_size(model):
    recorded = []

    def record(function):
        recorded.append(function)
        return function

    backend = CudaGraphBackend(model, CHUNK, LEFT, max_streams=5, record=record)
    x = torch.randn(5, FRAMES, BINS)
    for slots in ([0], [1], [2, 0], [3, 1, 4], [4, 3, 2, 1], [0, 1, 2, 3, 4], [2]):
        backend.step(x[: len(slots)], slots)
    assert backend.recorded == bucket_sizes(5) == [1, 2, 4, 5]
    assert len(recorded) == 4


@pytest.mark.gpu
def test_graphs_on_a_gpu(model):
    graphs = CudaGraphBackend(copy.deepcopy(model).cuda(), CHUNK, LEFT, max_streams=4)
    plain = EagerBackend(copy.deepcopy(model).cuda(), CHUNK, LEFT, max_streams=4)
    generator = numbers(5)
    for slots in ([0], [1, 0], [3, 1, 2], [2], [0, 1, 2, 3], [3, 0]):
        x = torch.randn(len(slots), FRAMES, BINS, generator=generator)
        assert relative(graphs.step(x, slots), plain.step(x, slots)) < 1e-4
