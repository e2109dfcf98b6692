# SPDX-License-Identifier: Apache-2.0
"""A small encoder whose calls are recorded on tapes, its batches and its steps."""

import random

import torch

import fastasr
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.testing.tape import TapeRecorder


def recorded(model, **options):
    """Swaps a model with its calls recorded on tapes."""
    return fastasr.accelerate(
        model, graphs=fastasr.Graphs(**{"after": 0, "recorder": TapeRecorder, **options})
    )


def encoder(layers=2, **rates):
    torch.manual_seed(0)
    rates = {"layer_drop": 0.0, **rates}
    return FastConformerEncoder(mel_bins=80, width=32, layers=layers, heads=2, hidden=64, channels=8, **rates)


def batch(frames=40, seed=0):
    x = torch.randn(2, frames, 80, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(frames) < torch.tensor([frames, frames // 2])[:, None]


def step(model, *inputs, seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    y = model(*inputs)[0]
    (y * torch.arange(y.numel()).sin().view_as(y)).sum().backward()
    return y


def kinds(model, path=""):
    return fastasr.graph_state(model)[path]


def same_gradients(ours, theirs, exact=True):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            scale = q.grad.abs().max().item()
            options = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5 * scale}
            torch.testing.assert_close(p.grad, q.grad, **options)
