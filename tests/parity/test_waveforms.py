# SPDX-License-Identifier: Apache-2.0
"""Convolutions on the waveform as matrix products inside transformers' models, in float32: as near to float64 as
upstream, forward and backward, with frozen layers too."""

import copy

import families
import pytest
import torch
from steps import moved, seeded, swapped

import fastasr
from fastasr.models.common import activations, convolutions
from fastasr.ops import _conv1d, _gemm

pytestmark = pytest.mark.skipif(bool(_gemm.why_not()), reason=str(_gemm.why_not()))
SIZES = {"conv_dim": (64, 64, 64), "samples": 1200, "num_conv_pos_embeddings": 128}


def outcome(model, call, dtype):
    """Returns outputs and gradients of parameters."""
    results = call(model.to(dtype))
    grads = [
        torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32) for y in results
    ]
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(results, wanted, [g.to(y.dtype) for g, y in zip(grads, results, strict=True)])
    return [t.detach().double() for t in (*results, *found)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["Wav2Vec2", "Data2VecAudio", "SEW"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step(name, batch, frozen, monkeypatch):
    monkeypatch.setenv("FASTASR_GEMM", "native")
    monkeypatch.setattr(_gemm, "_choices", {})
    calls = []
    convolution = _conv1d.convolution
    monkeypatch.setattr(_conv1d, "convolution", lambda *given: calls.append(1) or convolution(*given))
    seeded(0)
    model, run = families.waveforms(name, batch=batch, **SIZES)()
    model = moved(model, 0.05).train()
    if frozen:
        for encoder in model.features:
            encoder._freeze_parameters()
            encoder.conv_layers[2].requires_grad_()

    def call(model):
        dtype = next(model.parameters()).dtype
        handle = model.register_forward_pre_hook(lambda _, given: tuple(t.to(dtype) for t in given))
        try:
            return run(model)
        finally:
            handle.remove()

    theirs = outcome(copy.deepcopy(model), call, torch.float32)
    ours = outcome(swapped(model), call, torch.float32)
    positions = 0 if name == "Data2VecAudio" else 1
    assert len(calls) == 3 * len(model.features) + positions
    exact = outcome(model, call, torch.float64)
    for found, expected, right in zip(ours, theirs, exact, strict=True):
        # a few numbers: their errors scatter
        slack = 2e-7 if right.numel() > 100 else 1e-6
        error, allowed = ((t - right).norm() / right.norm() for t in (found, expected))
        assert error <= 1.1 * allowed + slack


def test_exported_with_a_free_length():
    """A compiler and an exporter get torch's convolutions."""
    seeded(0)
    model, _ = families.waveforms("Wav2Vec2", norms=("layer",), **SIZES)()
    model = moved(model.features[0], 0.05).eval()
    x = torch.randn(2, 1200, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    expected = model(x)
    fastasr.accelerate(model)
    made = torch.export.export(
        model, (x,), dynamic_shapes=({1: torch.export.Dim("samples", min=400, max=4000)},), strict=False
    )
    torch.testing.assert_close(made.module()(x), expected, rtol=1e-5, atol=1e-5)
    assert made.module()(x[:, :900]).shape[2] < expected.shape[2]


def test_a_normed_weight_is_kept(monkeypatch):
    """In inference, while its parameters stay."""
    model, run = families.waveforms("Wav2Vec2", **SIZES)()
    ours = swapped(moved(model, 0.05))
    computed, norm = [], torch.nn.utils.parametrizations._WeightNorm.forward
    monkeypatch.setattr(
        torch.nn.utils.parametrizations._WeightNorm,
        "forward",
        lambda self, *parts: computed.append(1) or norm(self, *parts),
    )

    def times(context, change=lambda: None):
        """Counts how often two calls after a change compute a weight."""
        change()
        computed.clear()
        with context():
            found = [run(ours)[-1] for _ in range(2)]
        count = len(computed)
        expected = run(model)[-1]
        torch.testing.assert_close(found, [expected] * 2, rtol=1e-4, atol=1e-5)
        return count

    def scale():
        for one in (ours, model):
            for name, p in one.named_parameters():
                if name.endswith("weight.original0"):
                    p.data.mul_(1.5)

    once = times(torch.inference_mode)
    assert once
    assert times(torch.inference_mode) == 0
    assert times(torch.no_grad) == 0
    assert times(torch.enable_grad) == 2 * once
    assert times(torch.no_grad, scale) == once
    assert times(torch.no_grad, lambda: fastasr.refresh(ours)) == once
    kept = len(convolutions._NORMED)
    fastasr.restore(ours)
    assert len(convolutions._NORMED) == kept - once


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_activations_in_place(hooked, monkeypatch):
    """In inference an activation overwrites the result of a convolution that nobody else has seen."""
    seeded(0)
    model, run = families.waveforms("Wav2Vec2", norms=("group",), **SIZES)()
    expected = run(moved(model, 0.05).eval())
    written, held, gelu = [], [], activations._IN_PLACE["gelu"]
    monkeypatch.setitem(activations._IN_PLACE, "gelu", lambda y: written.append(1) or gelu(y))
    ours = swapped(model)
    if hooked:
        for layer in ours.features[0].conv_layers:
            layer.conv.register_forward_hook(lambda conv, given, y: held.append((y, y.clone())))
    torch.testing.assert_close(run(ours), expected, rtol=1e-5, atol=1e-5)
    assert len(written) == (0 if hooked else 2)  # the first layer's norm is fused
    assert all(torch.equal(y, seen) for y, seen in held)
    assert len(held) == (3 if hooked else 0)
