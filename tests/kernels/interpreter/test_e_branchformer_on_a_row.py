# SPDX-License-Identifier: Apache-2.0
"""An E-Branchformer on a row by kernels, beside each of its recordings alone, in eager."""

import importlib
from types import SimpleNamespace

import torch
from steps import close, cotangent, moved, numbers, seeded

from fastasr import backend
from fastasr.models.e_branchformer import EBranchformerEncoder, layer


def test_a_recording_is_as_alone(monkeypatch):
    seeded(0)
    sizes = {"output_size": 24, "attention_heads": 2, "cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
    still = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0, "num_blocks": 2, "input_layer": "linear"}
    model = moved(EBranchformerEncoder(10, **sizes, **still), 0.1).train()
    x, lengths = torch.randn(3, 21, 10, generator=numbers(1)), [21, 1, 12]
    alone = [model(one[None, :n], torch.tensor([n])) for one, n in zip(x, lengths, strict=True)]
    expected = torch.cat([y[0] for y, _, _ in alone])
    model.ragged = True
    monkeypatch.setattr(layer, "on_gpu", lambda device: True)  # kernels add and normalise
    # torch has no kernel for linear here, and ours is for recorded calls
    linear, recorded = importlib.import_module("fastasr.ops.linear"), SimpleNamespace(back=None)
    monkeypatch.setattr(linear, "recording", lambda: recorded)
    with backend("triton"):
        y, found, _ = model(x, torch.tensor(lengths))
    assert found.tolist() == lengths
    hidden = torch.cat([one[:n] for one, n in zip(y, lengths, strict=True)])
    close(hidden, expected, 2e-5)
    with backend("triton"):
        gradients = torch.autograd.grad((hidden * cotangent(hidden)).sum(), list(model.parameters()))
    wanted = torch.autograd.grad((expected * cotangent(hidden)).sum(), list(model.parameters()))
    largest = max(g.norm() for g in wanted)
    for (name, _), a, b in zip(model.named_parameters(), gradients, wanted, strict=True):
        assert (a - b).norm() < 2e-4 * b.norm() + 1e-6 * largest, name
