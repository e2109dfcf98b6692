# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does: a recorded encoder under DistributedDataParallel is the unrecorded one."""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel

import fastasr
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.testing.tape import TapeRecorder


def _trained(rank, options, **ddp):
    torch.manual_seed(0)
    model = FastConformerEncoder(
        mel_bins=80, width=32, layers=2, heads=2, hidden=64, channels=8, layer_drop=0.0
    ).train()
    if options is not None:
        fastasr.accelerate(model, graphs=fastasr.Graphs(after=1, recorder=TapeRecorder, **options))
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


def run(rank):
    with fastasr.backend("eager"):
        for view in (False, True):
            expected, _ = _trained(rank, None, gradient_as_bucket_view=view)
            for options in ({}, {"parts": True}):
                found, replayed = _trained(rank, options, gradient_as_bucket_view=view)
                assert replayed >= 5
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(a, b)
