# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does: a recorded encoder under DistributedDataParallel is the unrecorded one."""

import contextlib

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastasr
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.testing.tape import TapeRecorder

SHARDED = "its parameters are sharded by FSDP, which gathers them anew for each call"


def _encoder():
    torch.manual_seed(0)
    return FastConformerEncoder(
        mel_bins=80, width=32, layers=2, heads=2, hidden=64, channels=8, layer_drop=0.0
    ).train()


def _accelerated(model, **options):
    return fastasr.accelerate(model, graphs=fastasr.Graphs(recorder=TapeRecorder, **options))


def _trained(rank, options, **ddp):
    model = _encoder()
    if options is not None:
        _accelerated(model, after=1, **options)
    parallel = DistributedDataParallel(model, **ddp)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(6):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(2, 40, 80)
        with parallel.no_sync() if step % 2 == 0 else contextlib.nullcontext():
            parallel(x)[0].square().mean().backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    replayed = sum(kind.replayed for kinds in fastasr.graph_state(model).values() for kind in kinds)
    return [p.detach() for p in model.parameters()], replayed


def _sharded(whole, before):
    """Returns why calls of an encoder are not recorded, whose parameters FSDP2 shards before or after it is swapped."""
    model = torch.nn.Sequential(_encoder())
    if before:
        fully_shard(model if whole else model[0].layers[0])
    report = _accelerated(model, after=0)
    if not before:
        model(torch.ones(2, 40, 80))[0].sum().backward()
        fully_shard(model if whole else model[0].layers[0])
    model(torch.ones(2, 40, 80))[0].sum().backward()
    kinds = fastasr.graph_state(model).get("0", [])
    return report.graphs["0"], *((kind.replayed, kind.reason) for kind in kinds)


def run(rank):
    with fastasr.backend("eager"):
        for whole in (False, True):
            assert _sharded(whole, before=True) == (SHARDED,)
        assert _sharded(True, before=False) == (None, (1, SHARDED))
        assert _sharded(False, before=False) == (None, (1, None))  # The layer has FSDP's hooks.
        for view in (False, True):
            expected, _ = _trained(rank, None, gradient_as_bucket_view=view)
            for options in ({}, {"parts": True}):
                found, replayed = _trained(rank, options, gradient_as_bucket_view=view)
                assert replayed >= 5
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(a, b)
