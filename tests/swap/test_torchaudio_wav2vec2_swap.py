# SPDX-License-Identifier: Apache-2.0
"""torchaudio's wav2vec 2.0 and WavLM swapped: what their other methods return, the masks that attention reads, and the
modules that are declined."""

import families
import pytest
import torch
from steps import close, numbers, swapped

import fastasr

models = pytest.importorskip("torchaudio.models")
ATTENTION = "encoder.transformer.layers.0.attention"
LENGTHS = torch.tensor([400, 310, 90])


def copies(family="torchaudio wav2vec2", dtype=torch.float64):
    """Returns upstream's model and its swapped copy."""
    theirs, _ = families.make(family)
    return theirs, swapped(theirs.to(dtype))


def waveform():
    return torch.randn(3, 400, generator=numbers(1)).double()


@pytest.mark.parametrize("family", ["torchaudio wav2vec2", "torchaudio wav2vec2 large"])
def test_features_of_every_layer(family):
    theirs, ours = copies(family)
    with torch.no_grad():
        found, expected = (model.extract_features(waveform(), LENGTHS) for model in (ours, theirs))
    assert torch.equal(found[1], expected[1])
    assert len(found[0]) == len(expected[0]) == 2
    close(found[0], expected[0], 1e-10)


def test_features_of_every_layer_of_wavlm():
    """Upstream's ``get_intermediate_outputs`` hands the bias on by offset too."""
    theirs, ours = copies("torchaudio wavlm")
    with torch.no_grad():
        found, expected = (model.extract_features(waveform())[0] for model in (ours, theirs))
        ours(waveform())
    close(found, expected, 1e-10)
    assert not fastasr.why(ours).to_dict()


def test_an_attention_of_wavlm_alone():
    """It returns upstream's bias of every pair, which a layer that is not swapped takes."""
    theirs, ours = (model.get_submodule(ATTENTION) for model in copies("torchaudio wavlm"))
    x = torch.randn(2, 9, families.WIDTH, generator=numbers(1)).double()
    with torch.no_grad():
        close(ours(x), theirs(x), 1e-10)


def test_lengths_of_features():
    """Recordings that are shorter than the taps have no frames."""
    theirs, ours = copies()
    lengths = torch.tensor([400, 7, 0])
    with torch.no_grad():
        found, expected = (model.feature_extractor(waveform(), lengths)[1] for model in (ours, theirs))
    assert torch.equal(found, expected)
    assert found.tolist()[1:] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_runs_the_kernel(dtype):
    _, ours = copies(dtype=dtype)
    with torch.no_grad():
        ours(waveform().to(dtype), LENGTHS)
    assert not fastasr.why(ours).to_dict()


@pytest.mark.parametrize("hide", ["-10000", "-inf", "a write"])
def test_masks(hide):
    """A mask need not be expanded, and a write to it between calls is noticed."""
    theirs, ours = (model.get_submodule(ATTENTION) for model in copies())
    x = torch.randn(2, 9, families.WIDTH, generator=numbers(1)).double()
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    mask[1, :, :, 5:] = -torch.inf if hide == "-inf" else -10000.0
    with torch.no_grad():
        if hide == "a write":
            ours(x, mask)
            mask.numpy()[0, :, :, 3:] = -10000.0
        close(ours(x, mask)[0], theirs(x, mask)[0], 1e-10)
    assert not fastasr.why(ours).to_dict()


def test_a_gradient_of_the_mask():
    theirs, ours = (model.get_submodule(ATTENTION) for model in copies())
    x, found = torch.randn(1, 5, families.WIDTH, generator=numbers(1)).double(), []
    for module in (ours, theirs):
        mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
        found += torch.autograd.grad(module(x, mask)[0].pow(2).sum(), mask)
    close(*found, 1e-10)
    assert found[0].abs().max() > 0


def test_a_changed_norm_is_declined():
    model, _ = families.make("torchaudio wav2vec2 large")
    norm = model.feature_extractor.conv_layers[1].layer_norm

    class LayerNorm(type(norm)):
        def forward(self, input):
            return -super().forward(input)

    norm.__class__ = LayerNorm
    (row,) = [row for row in fastasr.accelerate(model).skipped if row.class_name == "ConvLayerBlock"]
    assert row.reason.startswith("submodule layer_norm runs code that is not upstream's")
