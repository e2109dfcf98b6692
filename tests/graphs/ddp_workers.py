# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does: a recorded encoder under DistributedDataParallel is the unrecorded one, and with
``parts=True`` gradients of its last parts are sent before the backward pass of the first one begins."""

import contextlib
import random

import torch
from recorded_encoder import encoder
from test_zipformer_graphs import encoder as zipformer
from test_zipformer_graphs import inputs
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastasr
from fastasr.graphs import module as graphs
from fastasr.testing.tape import TapeRecorder

SHARDED = "its parameters are sharded by FSDP, which gathers them anew for each call"
STEPS = 4


def _features(seed):
    return (torch.randn(2, 40, 80),)


# Name -> a function that makes a model, one that makes its inputs from a seed, and how far recorded gradients may be
# from unrecorded ones: a recorded Zipformer reads its decisions as float32.
MODELS = {
    "FastConformer": (lambda: encoder().train(), _features, 0.0),
    "FastConformer that drops layers": (lambda: encoder(layer_drop=0.3).train(), _features, 0.0),
    "Zipformer": (
        lambda: zipformer(20000).double(),
        lambda seed: inputs(20, [20, 14], seed, torch.float64),
        1e-6,
    ),
}


def _trained(rank, name, view, options):
    """Returns the gradients of each step and the parameters, the number of replays, and what happened in the last
    step, in order: "replay" for the backward pass of a module with graphs, "send" for a bucket of gradients."""
    build, batch, _ = MODELS[name]
    model, events = build(), []
    if options is not None:
        recorder = {"recorder": TapeRecorder, "after": 1}
        fastasr.accelerate(model, graphs=fastasr.Graphs(**{**recorder, **options}))
    parallel = DistributedDataParallel(
        model,
        bucket_cap_mb=0.01,
        gradient_as_bucket_view=view,
        find_unused_parameters=name != "FastConformer",
    )

    def send(group, bucket):
        events.append("send")
        return allreduce_hook(group, bucket)

    parallel.register_comm_hook(None, send)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    found = []
    for step in range(STEPS):
        events.clear()
        torch.manual_seed(10 * step + rank)
        random.seed(10 * step + rank)
        arguments = batch(10 * step + rank)
        with parallel.no_sync() if step % 2 == 0 else contextlib.nullcontext():
            y = parallel(*arguments)[0]
            if step == STEPS - 1:
                _mark(model, events)
            y.square().mean().backward()
        found += [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    replayed = sum(kind.replayed for kinds in fastasr.graph_state(model).values() for kind in kinds)
    return found + [p.detach() for p in model.parameters()], replayed, events


def _mark(model, events):
    """Has all graphs of a model note when their backward passes begin."""
    owners = filter(None, map(graphs.of, model.modules()))
    for graph in (graph for owner in owners for graph in owner.graphs.values()):

        def marked(replay=graph.replay_backward):
            events.append("replay")
            replay()

        graph.replay_backward = marked


def _sharded(whole, before):
    """Returns why calls of an encoder are not recorded, whose parameters FSDP2 shards before or after it is swapped."""
    model, x = torch.nn.Sequential(encoder().train()), torch.ones(2, 40, 80)
    options = fastasr.Graphs(recorder=TapeRecorder, after=0)
    report = None if before else fastasr.accelerate(model, graphs=options)
    if report:
        model(x)[0].sum().backward()
    fully_shard(model if whole else model[0].layers[0])
    report = report or fastasr.accelerate(model, graphs=options)
    model(x)[0].sum().backward()
    kinds = fastasr.graph_state(model).get("0", [])
    return report.graphs["0"], *((kind.replayed, kind.reason) for kind in kinds)


def run(rank):
    with fastasr.backend("eager"):
        for whole in (False, True):
            assert _sharded(whole, before=True) == (SHARDED,)
        assert _sharded(True, before=False) == (None, (1, SHARDED))
        assert _sharded(False, before=False) == (None, (1, None))  # The layer has FSDP's hooks.
        for name, (*_, off) in MODELS.items():
            drops = "drops" in name  # Its layers are parts in any case.
            expected, *_ = _trained(rank, name, False, None)
            for view in (False, True):
                for options in ({"after": 0},) if drops else ({}, {"parts": True}):
                    found, replayed, events = _trained(rank, name, view, options)
                    assert replayed >= STEPS - 1, (name, options, replayed)
                    for a, b in zip(found, expected, strict=True):
                        torch.testing.assert_close(a, b, rtol=off, atol=off * b.abs().max().item())
                    if not drops:
                        _check_order(events, 2 if "parts" in options else 1)


def _check_order(events, modules):
    last = len(events) - 1 - events[::-1].index("replay")
    assert events.count("replay") == modules, events
    assert events.count("send") > modules, events
    assert ("send" in events[:last]) == (modules > 1), events
