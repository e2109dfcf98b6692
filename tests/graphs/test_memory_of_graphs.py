# SPDX-License-Identifier: Apache-2.0
"""How many graphs a module keeps, what they share, and what copies of it and threads see."""

import copy
import gc
import threading
import time
import weakref

import pytest
import torch
from recorded import graphed, reasons
from recorded_encoder import batch, encoder, kinds, recorded, step

import fastasr
from fastasr.asr.recipe import batches
from fastasr.benchmarks.models import ragged
from fastasr.graphs import module as graphs
from fastasr.testing.tape import TapeRecorder


def test_the_graph_used_longest_ago_goes_first():
    model = encoder().eval()
    recorded(model, most=(1, 2))
    with torch.no_grad():
        for frames in (40, 48, 40, 56, 40, 48):  # 56 comes in place of 48, which was recorded after 40
            model(*batch(frames))
    assert len(graphs.of(model).graphs) == 2
    assert [kind.recorded for kind in kinds(model)] == [1, 2, 1]


def test_a_kind_that_was_dropped_twice_is_not_recorded_again():
    model = encoder().eval()
    recorded(model, most=(1, 1))
    with torch.no_grad():
        for frames in (40, 48, 40, 48, 40, 48):
            model(*batch(frames))
    first, second = kinds(model)
    assert "it was dropped for other kinds" in first.reason
    assert (first.recorded, first.dropped, first.replayed) == (2, 2, 2)
    assert (second.recorded, second.dropped, second.replayed, second.reason) == (2, 1, 3, None)
    assert "it was dropped for other kinds" in str(fastasr.why(model))


def test_memory_is_limited():
    model = encoder().eval()
    recorded(model, memory=1)
    with torch.no_grad():
        for frames in (40, 48, 40):
            model(*batch(frames))
    assert len(graphs.of(model).graphs) == 1


def test_kinds_share_gradients():
    """The bytes of eight kinds are those of their buffers and outputs: no kind holds gradients of its own."""
    model = encoder().train()
    recorded(model)
    for i in range(8):
        step(model, *batch(40 + 8 * i))
        model.zero_grad()
    found = graphs.of(model)
    assert len(found.graphs) == 8
    assert len({id(graph.gradients) for graph in found.graphs.values()}) == 1
    sizes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sizes <= found.gradients.bytes <= 1.5 * sizes + 64 * 4 * len(list(model.parameters()))


def cast_steps(model, optimizer):
    """Yields outputs and gradients of steps of three kinds in turn under autocast, the first in inference mode."""
    for seed in range(9):
        x, mask = batch(40 + 8 * (seed % 3), seed)
        model.train(seed % 3 > 0)
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(not model.training):
            y = model(x, mask)[0]
        yield y
        if not model.training:
            continue
        y.float().square().mean().backward()
        yield from [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()


def test_kinds_share_casts():
    """All kinds cast a weight to the same place, anew in each call, and its bytes count once."""
    models = encoder(), encoder()
    recorded(models[0])
    ours, theirs = (cast_steps(model, torch.optim.SGD(model.parameters(), lr=0.1)) for model in models)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [kind.replayed for kind in kinds(models[0])] == [3, 3, 3]
    found = graphs.of(models[0])
    casts = [graph.casts for graph in found.graphs.values()]
    places = [{p: leaf.data_ptr() for p, leaf in zip(c.parameters, c.leaves, strict=True)} for c in casts]
    assert len(places) == 3
    assert len(places[0]) > 20
    assert places[0].items() <= places[1].items()  # in training those of a convolution too
    assert places[1] == places[2]
    size = kinds(models[0])[1].casts
    weights = sum(2 * p.numel() for p in places[1])
    assert weights <= size <= weights + 2 * 64 * len(places[1])
    assert found._held() == size + sum(kind.bytes for kind in kinds(models[0]))


def test_casts_count_for_the_limit_of_memory():
    model, again = encoder().eval(), encoder().eval()

    def run(model, **options):
        recorded(model, **options)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for frames in (40, 48):
                model(*batch(frames))
        return len(graphs.of(model).graphs)

    assert run(model) == 2
    needed = sum(kind.bytes for kind in kinds(model)) + kinds(model)[0].casts
    assert run(again, memory=needed) == 2
    assert run(again, memory=needed - 1) == 1


def test_kinds_with_other_casts_share_what_they_can():
    """A weight that one kind also reads as it is has no cast there, and a frozen one has a cast without gradient."""

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x, penalty=False):
            y = self.last(self.first(x))
            return y + self.last.weight.square().sum() if penalty else y

    torch.manual_seed(0)
    ours = Reads()
    theirs = copy.deepcopy(ours)
    found = graphed(ours, after=0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    for i in range(8):
        results = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.first.requires_grad_(i < 4)
            x = batch(8, i)[0][..., :8].clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x, penalty=i % 2 == 0)
            y.float().square().mean().backward()
            results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
            results[-1] = [t.clone() for t in results[-1]]
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not reasons(found)
    assert [kind.replayed for kind in found.kinds.values()] == [2, 2, 2, 2]
    casts = [graph.casts for graph in found.graphs.values()]
    assert [len(c.leaves) for c in casts] == [3, 4, 3, 4]
    places = [{id(p): leaf.data_ptr() for p, leaf in zip(c.parameters, c.leaves, strict=True)} for c in casts]
    assert len({place for known in places for place in known.values()}) == 4
    assert [len(c.bytes) for c in casts] == [1, 2, 1, 2]


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_of_inputs_of_a_frozen_encoder(trained):
    """The parameters need no gradient, in the first training step or from a later one on."""
    ours, theirs = encoder().train(), encoder().train()
    recorded(ours)
    if trained:
        step(ours, *batch())
    for model in (ours, theirs):
        model.requires_grad_(False)
    for seed in (1, 2):
        x, mask = batch(seed=seed)
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        for model, leaf in zip((ours, theirs), leaves, strict=True):
            step(model, leaf, mask, seed=seed)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert sum(kind.replayed for kind in kinds(ours)) == 2 + trained


def test_copies_run_as_they_are():
    model = encoder().eval()
    recorded(model)
    with torch.no_grad():
        model(*batch())
        other = copy.deepcopy(model)
        for p in other.parameters():
            p.mul_(2)
        torch.testing.assert_close(
            other(*batch())[0], type(other).forward(other, *batch())[0], rtol=0, atol=0
        )
    assert kinds(model)[0].seen == 1
    assert fastasr.graph_state(other) == {}
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class LateRecorder(TapeRecorder):
    """Its replays give other threads a turn behind the copies of their inputs."""

    def record(self, function, recording):
        replay, found = super().record(function, recording)

        def late():
            time.sleep(0.005)
            replay()

        return late, found


def test_threads_take_turns():
    model, theirs = encoder().eval(), encoder().eval()
    recorded(model, recorder=LateRecorder)
    found, expected = {}, {}

    def call(seed):
        with torch.no_grad():
            for _ in range(5):
                found[seed] = model(*batch(seed=seed))[0]

    call(0)  # calls of other threads run as they are while one is recorded
    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for seed in range(3):
            expected[seed] = theirs(*batch(seed=seed))[0]
            torch.testing.assert_close(found[seed], expected[seed], rtol=0, atol=0)
    (kind,) = fastasr.graph_state(model)[""]
    assert (kind.recorded, kind.replayed) == (1, 20)


def test_batches_of_buckets_are_recorded_once_for_each_shape():
    seconds = ragged.seconds(ragged.LIBRISPEECH, 600, ordered=False)
    frames = [round(5 * s) for s in seconds]  # a twentieth of the frames, for the time of this test
    epochs = [batches.epoch_batches(frames, 480, 1, epoch, shapes="buckets") for epoch in range(2)]
    model = encoder(layers=1).train()
    recorded(model, most=batches.BUCKETS + 1)
    for indices, longest in epochs[0]:
        x, lengths = batches.collate([torch.randn(frames[i], 80) for i in indices], longest)
        step(model, x, torch.arange(longest) < lengths[:, None])
    found = kinds(model)
    assert 20 <= len(found) <= batches.BUCKETS + 1
    assert all((kind.recorded, kind.replayed, kind.dropped) == (1, kind.seen, 0) for kind in found)
    shapes = [{(len(indices), longest) for indices, longest in epoch} for epoch in epochs]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == len(found)
    padded = sum(len(indices) * longest for indices, longest in epochs[0])
    assert 1 - sum(frames) / padded < 0.05
