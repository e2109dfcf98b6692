# SPDX-License-Identifier: Apache-2.0
"""A recorded Zipformer is the unrecorded one: the same random numbers, in the same order, decide the same things."""

import gc
import random

import pytest
import torch
from recorded import graphed, reasons
from steps import set_batch_count
from torch.multiprocessing.reductions import StorageWeakRef

from fastasr.models.zipformer import Conv2dSubsampling, Zipformer, attention
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.layer import ZipformerEncoderLayer
from fastasr.models.zipformer.schedules import PiecewiseLinear, ScheduledFloat
from fastasr.models.zipformer.whitening import Whiten

SIZES = {
    "downsampling_factor": (1, 2), "encoder_dim": (24, 32), "num_encoder_layers": (1, 2),
    "encoder_unmasked_dim": (16, 24),
    "query_head_dim": 8, "pos_head_dim": 4, "value_head_dim": 8, "num_heads": 2, "feedforward_dim": (24, 32),
    "cnn_module_kernel": (7, 5), "pos_dim": 8,
}  # fmt: skip


def at(model, batch):
    for m in set_batch_count(model, batch).modules():
        if hasattr(m, "mem_cutoff"):
            m.mem_cutoff = lambda _: False
    return model


def encoder(batch, train=True, **options):
    torch.manual_seed(0)
    dropout = ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
    model = at(Zipformer(**SIZES, dropout=dropout, **options), batch).train(train)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def inputs(frames, lengths, seed, dtype=torch.float32):
    x = (
        torch.randn(
            frames, len(lengths), SIZES["encoder_dim"][0], generator=torch.Generator().manual_seed(seed)
        )
        * 3
    )
    lengths = torch.tensor(lengths)
    return x.to(dtype), lengths, torch.arange(frames) >= lengths[:, None]


def run(model, arguments, steps, seed=0, wants=True):
    """Returns outputs, gradients, what Whiten keeps, and where the generators end."""
    random.seed(seed)
    torch.manual_seed(seed)
    found = []
    for step in range(steps):
        x, *rest = arguments(step)
        x.requires_grad_(wants and torch.is_grad_enabled())
        for p in model.parameters():
            p.grad = None
        y, lengths = model(x, *rest)
        if torch.is_grad_enabled():
            (y * torch.arange(y.numel()).cos().view_as(y)).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        probs = [m.prob for m in model.modules() if isinstance(m, Whiten)]
        found.append((y.detach().clone(), lengths, grads, x.grad, probs, random.random(), torch.rand(())))
    return found


def compare(found, expected, rtol=1e-5):
    names = ["output", "lengths", "grads", "x.grad", "whiten", "random", "generator"]
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, a, b in zip(names, ours, theirs, strict=True):
            if name == "grads":
                assert a.keys() == b.keys()
                for key in a:
                    # The products of all frames and channels cancel in the gradient of a rate's weights.
                    wider = 10 if key.endswith("downsample.bias") else 1
                    close(a[key], b[key], wider * rtol, f"{step} {key}")
            elif isinstance(a, torch.Tensor):
                close(a, b, rtol, f"{step} {name}")
            else:
                assert a == b, (step, name)


def close(a, b, rtol, name):
    atol = rtol * b.abs().max().item() if b.is_floating_point() else 0
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("batch", [5000, 20000, 60000])
def test_training_steps_make_the_same_decisions(batch):
    shapes = [(20, [20, 14]), (20, [20, 11]), (28, [28, 28])]

    def arguments(step):
        return inputs(*shapes[step % 3], seed=step)

    expected = run(encoder(batch), arguments, 9)
    ours = encoder(batch)
    graphs = graphed(ours, after=1)
    found = run(ours, arguments, 9)
    assert not reasons(graphs)
    assert len(graphs.graphs) == 2
    compare(found, expected)


def test_every_decision_is_taken_both_ways():
    """With all shares at a half, each flag is on and off within a few steps."""

    def often(model):
        for m in model.modules():
            if isinstance(m, Balancer):
                if isinstance(m.prob, float):
                    m.prob = 0.5
                else:
                    m.prob.schedule = PiecewiseLinear((0.0, 0.5))
            if isinstance(m, Whiten):
                m.prob, m.min_prob, m.max_prob = 0.6, 0.4, 0.6
            if isinstance(m, ZipformerEncoderLayer):
                m.const_attention_rate.schedule = PiecewiseLinear((0.0, 0.5))
        return model

    before, attention.PENALISED_CALLS = attention.PENALISED_CALLS, 0.5
    try:
        expected = run(often(encoder(20000)), lambda step: inputs(20, [20, 14], step), 12)
        ours = often(encoder(20000))
        graphs = graphed(ours, after=0)
        found = run(ours, lambda step: inputs(20, [20, 14], step), 12)
    finally:
        attention.PENALISED_CALLS = before
    assert not reasons(graphs)
    compare(found, expected)


def test_a_phase_that_ends_is_recorded_again():
    ours, theirs = encoder(15999.0), encoder(15999.0)
    graphs = graphed(ours, after=0)
    for batch in (15999.0, 16000.0, 49999.0, 50000.0):
        at(ours, batch), at(theirs, batch)
        compare(
            *(run(m, lambda step: inputs(20, [20, 14], step), 2, seed=int(batch)) for m in (ours, theirs))
        )
    assert not reasons(graphs)
    assert len(graphs.tapes) >= 6


def test_first_batches_run_as_they_are():
    """Then calls of the same shape are recorded."""
    ours, theirs = encoder(3999.0), encoder(3999.0)
    graphs = graphed(ours, after=0)

    def steps(batch):
        at(ours, batch), at(theirs, batch)
        compare(*(run(m, lambda step: inputs(20, [20, 14], step), 3) for m in (ours, theirs)))
        (kind,) = graphs.kinds.values()
        return kind.reason, kind.recorded, kind.replayed

    assert steps(3999.0) == ("position scores are skipped at random in the first batches", 0, 0)
    assert len(graphs.tapes) == 0
    assert steps(4000.0) == (None, 1, 3)


def test_inference():
    ours, theirs = encoder(None, train=False), encoder(None, train=False)
    graphs = graphed(ours, after=1)
    with torch.no_grad():
        compare(*(run(m, lambda step: inputs(20, [20, 14 - step], step), 4) for m in (ours, theirs)))
    assert len(graphs.graphs) == 1
    assert not reasons(graphs)


def front_end(batch):
    torch.manual_seed(0)
    return at(Conv2dSubsampling(80, 24, dropout=ScheduledFloat((0.0, 0.3), (20000.0, 0.1))), batch).train()


@pytest.mark.parametrize("batch", [100, 5000, 20000])
def test_front_end(batch):
    def arguments(step):
        x = torch.randn(2, 47, 80, generator=torch.Generator().manual_seed(step))
        return x, torch.tensor([47, 40 - step])

    ours, theirs = front_end(batch), front_end(batch)
    graphs = graphed(ours, after=1)
    compare(*(run(m, arguments, 8, wants=False) for m in (ours, theirs)), rtol=3e-5)
    assert not reasons(graphs)
    assert len(graphs.graphs) == 1


def chunked():
    return encoder(20000, causal=True, chunk_size=(4, 8, -1), left_context_frames=(8, -1))


def test_each_chunk_size_is_a_kind():
    ours, theirs = chunked(), chunked()
    graphs = graphed(ours, choice="get_chunk_info", after=1)
    compare(*(run(m, lambda step: inputs(20, [20, 14], step), 16) for m in (ours, theirs)))
    assert len(graphs.kinds) == 5
    assert len(graphs.graphs) >= 3
    assert not reasons(graphs)


def test_a_choice_outside_of_a_plan_is_refused():
    ours, theirs = chunked(), chunked()
    graphs = graphed(ours, after=0)
    compare(*(run(m, lambda step: inputs(20, [20, 14], step), 4) for m in (ours, theirs)))
    assert "draws from Python's random" in reasons(graphs)[0]


def test_bfloat16():
    def arguments(step):
        return inputs(20, [20, 14], step)

    ours, theirs = encoder(20000), encoder(20000)
    graphs = graphed(ours, after=1)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (run(m, arguments, 6) for m in (ours, theirs))
    assert len(graphs.graphs) == 1
    assert not reasons(graphs)
    for a, b in zip(found, expected, strict=True):
        assert a[4:] == b[4:]
        assert (a[0] - b[0]).norm() < 1e-2 * b[0].norm()
        assert a[2].keys() == b[2].keys()
        ours, theirs = (torch.cat([g.flatten() for g in grads.values()]) for grads in (a[2], b[2]))
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_gradients_in_another_precision_than_before():
    """Recordings share the gradients' buffer, which is in the parameters' dtype."""
    ours, theirs = encoder(20000), encoder(20000)
    graphs = graphed(ours, after=0)
    for model in (ours, theirs):
        run(model.to(torch.bfloat16), lambda step: inputs(20, [20, 14], step, torch.bfloat16), 1)
    compare(*(run(m.float(), lambda step: inputs(20, [20, 14], step), 2) for m in (ours, theirs)))
    assert len(graphs.graphs) == 2


def test_three_recordings_of_a_shape_in_a_training_run():
    model = encoder(4000.0)
    graphs = graphed(model, after=0)
    recordings = 0
    for count in range(4000, 60001, 500):
        at(model, float(count))
        if not graphs.graphs or not next(iter(graphs.graphs.values())).holds():
            run(model, lambda step: inputs(20, [20, 14], step), 1)
            recordings += 1
    assert not reasons(graphs)
    assert recordings == sum(kind.recorded for kind in graphs.kinds.values()) <= 3


def test_plans_are_few():
    """A Zipformer-M has 16 layers: 661 plans in a forward pass, 176 in a backward pass."""
    model = encoder(20000)
    graphs = graphed(model, after=0)
    run(model, lambda step: inputs(20, [20, 14], step), 1)
    (graph,) = graphs.graphs.values()
    layers = sum(isinstance(m, ZipformerEncoderLayer) for m in model.modules())
    assert len(graph.ahead.plans) <= 43 * layers
    assert len(graph.back.plans) <= 12 * layers


@torch.no_grad()
def test_longer_recordings_leave_the_tables_of_shorter_ones():
    """A longer call replaces the table of positions, which the graphs of shorter calls go on reading."""
    ours, theirs = (encoder(0.0, train=False) for _ in range(2))
    graphs = graphed(ours, after=0)
    short = inputs(40, [40, 30], seed=1)
    ours(*short)
    tables = [
        StorageWeakRef(m.pe.untyped_storage()) for m in ours.modules() if getattr(m, "pe", None) is not None
    ]
    ours(*inputs(1100, [1100], seed=2))
    torch.testing.assert_close(ours(*short)[0], theirs(*short)[0])
    assert [kind.replayed for kind in graphs.kinds.values()] == [2, 0]
    graphs.recorder.tapes.clear()
    graphs.clear(ours)
    gc.collect()
    # The second one is that of half the frames.
    assert [table.expired() for table in tables] == [True, False]
