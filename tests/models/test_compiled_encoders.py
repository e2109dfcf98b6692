# SPDX-License-Identifier: Apache-2.0
"""torch.compile takes whole encoders without a graph break: Zipformer in inference, FastConformer in training too."""

import random

import pytest
import torch
from steps import close, cotangent, seeded

from fastasr.benchmarks import upstream
from fastasr.models import zipformer
from fastasr.models.fast_conformer import FastConformerEncoder

BACKENDS = ["eager", "aot_eager"]
CHUNKS = {"causal": True, "chunk_size": (8,), "left_context_frames": (16,)}  # nothing to choose
SIZES = {"mel_bins": 16, "width": 24, "layers": 2, "heads": 2, "hidden": 40, "channels": 8, "factor": 4}


def compiled(model, backend):
    torch._dynamo.reset()  # its caches are the process's
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("chunks", "backend", "lengths"),
    [({}, "eager", (64, 81)), ({}, "aot_eager", (64,)), (CHUNKS, "eager", (64,))],
    ids=["eager", "aot_eager", "causal"],
)
def test_zipformer_in_inference(chunks, backend, lengths):
    seeded(0)
    model = upstream.steady(upstream.Encoder(upstream.TINY | chunks, zipformer)).eval()
    whole, state = compiled(model, backend), random.getstate()
    with torch.no_grad():
        for frames in lengths:
            call = upstream.example(2, frames)
            found = whole(*call)
            assert random.getstate() == state
            y, expected = model(*call)
            random.setstate(state)
            close(found[0], y)
            assert torch.equal(found[1], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_fast_conformer(training, backend):
    """In training without random numbers, which a compiler draws in another order."""
    seeded(0)
    still = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout", "layer_drop"), 0.0)
    model = FastConformerEncoder(**SIZES, **still)
    model.train(training)
    x = torch.randn(2, 50, 16, requires_grad=training)
    valid = torch.arange(50) < torch.tensor([[50], [37]])
    values, gradients = [], []
    for run in (compiled(model, backend), model):
        with torch.set_grad_enabled(training):
            y, mask = run(x, valid)
        values.append((y.detach(), mask))
        if training:
            found = torch.autograd.grad(y, [x, *model.parameters()], cotangent(y))
            gradients.append(torch.cat([g.flatten() for g in found]))
    close(*(y for y, _ in values))
    assert torch.equal(*(mask for _, mask in values))
    if training:
        close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fast_conformer_trains_with_dropout(backend):
    seeded(0)
    model = FastConformerEncoder(**SIZES, layer_drop=0.0)
    y, _ = compiled(model.train(), backend)(torch.randn(2, 50, 16), None)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
