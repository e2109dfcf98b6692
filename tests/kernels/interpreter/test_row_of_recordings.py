# SPDX-License-Identifier: Apache-2.0
"""A FastConformer on a row of fixed length by kernels, as a recorded call runs it, beside each recording alone in
eager."""

import pytest
import torch

from fastasr import backend
from fastasr._recording import recorded_by
from fastasr.graphs import Graphs
from fastasr.graphs.recording import Recording
from fastasr.models.fast_conformer import FastConformerEncoder, masks, row

LENGTHS = [41, 0, 70, 1]


def encoder():
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 2, "hidden": 48, "taps": 5, "channels": 8, "layer_drop": 0.0}
    made = FastConformerEncoder(
        mel_bins=16, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, **sizes
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made.eval()  # running statistics, so that each recording has an answer of its own


def gradients(y, weight, leaves):
    return torch.autograd.grad((y.double() * weight).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_each_recording_its_own_output(dtype, monkeypatch):
    monkeypatch.setattr(masks, "on_gpu", lambda device: True)  # blocks run the kernels of a GPU
    model, frames = encoder(), max(LENGTHS)
    x = torch.randn(len(LENGTHS), frames, 16)
    mask = torch.arange(frames) < torch.tensor(LENGTHS)[:, None]
    weight = torch.randn(len(LENGTHS), 9, 32).double()
    leaves = list(model.parameters())
    call = row.packed(model, Graphs(frames=150, recordings=5, longest=72), x, mask, lambda hidden: hidden)
    ahead = Recording(x.device, Recording(x.device))
    with backend("triton"), recorded_by(ahead), torch.autocast("cpu", dtype, dtype is torch.bfloat16):
        y = row.encoded(model, *call.arguments)
    found = call.unpack(y)
    with backend("triton"):
        ours = gradients(found, weight, leaves)
    expected, model = torch.zeros_like(weight), model.double()
    with backend("eager"):
        for i, n in enumerate(LENGTHS):
            if n:
                alone = model(x[i : i + 1, :n].double())[0][0]
                expected[i, : len(alone)] = alone
        theirs = gradients(expected, weight, list(model.parameters()))
    assert [g is None for g in ours] == [g is None for g in theirs]
    ours, theirs = (
        torch.cat([g.double().flatten() for g in grads if g is not None]) for grads in (ours, theirs)
    )
    tolerance = 1e-4 if dtype is torch.float32 else 0.03
    assert (found.double() - expected).norm() <= tolerance * expected.norm()
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
