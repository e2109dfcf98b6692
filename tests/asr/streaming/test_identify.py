# SPDX-License-Identifier: Apache-2.0
"""An engine takes the models it can serve, and says why it does not take others."""

import copy

import pytest
import torch
from conftest import CHUNK, LEFT
from steps import swapped
from torch.nn.utils import parametrizations

from fastasr.asr.export.wrappers import bins_of, width
from fastasr.asr.streaming import StreamingEncoder, identify
from fastasr.models import zipformer


def refused(model, match, error=ValueError, chunk=CHUNK, left=LEFT):
    for call in (identify, StreamingEncoder.from_model):
        with pytest.raises(error, match=match):
            call(model, chunk, left)


def test_ours_upstreams_and_swapped_are_taken(model, upstream_model):
    assert identify(model, CHUNK, LEFT).origin == "fastasr"
    for made in (upstream_model, swapped(upstream_model)):
        found = identify(made, CHUNK, LEFT)
        assert "zipformer 0.1.3" in found.origin
        assert (found.bins, found.channels) == (80, 48)
        assert (made.encoder.chunk_size, made.encoder.left_context_frames) == ((8, 16, -1), (16, 32))


@pytest.mark.parametrize("bins", [80, 40, 64, 128])
def test_bins_are_those_of_the_front_end(bins):
    embed = zipformer.Conv2dSubsampling(bins, 24)
    assert width(bins) == embed.out_width
    assert bins_of(embed) == bins


def test_what_is_no_model_is_refused(model):
    refused(torch.nn.Linear(3, 3), "needs .encoder, and this Linear has none", TypeError)
    half = torch.nn.Module()
    half.encoder = model.encoder
    refused(half, "needs .encoder_embed", TypeError)


def test_training_mode_is_refused(model):
    training = copy.deepcopy(model)
    training.encoder.encoders[1].encoder.layers[0].norm.train()
    refused(training, r"encoder\.encoders\.1\.encoder\.layers\.0\.norm is in training mode")


def test_what_cannot_stream_is_refused(model):
    other = copy.deepcopy(model)
    other.encoder.causal = False
    refused(other, "not causal")
    refused(copy.deepcopy(model).double(), "torch.float64, expected torch.float32")


@pytest.mark.parametrize(
    ("chunk", "left", "error", "match"),
    [
        (6, LEFT, ValueError, "chunk_size must be a multiple of 4"),
        (0, LEFT, ValueError, "chunk_size must be a multiple of 4"),
        (-1, LEFT, ValueError, "chunk_size must be a multiple of 4"),
        (32, LEFT, ValueError, r"trained with chunk_size \(8, 16, -1\), got 32"),
        (CHUNK, 18, ValueError, "left_context_frames must be a multiple of 4"),
        (CHUNK, 64, ValueError, r"trained with left_context_frames \(16, 32\), got 64"),
        (8.0, LEFT, TypeError, "chunk_size must be an int"),
        (CHUNK, None, TypeError, "left_context_frames must be an int"),
    ],
)
def test_other_chunks_are_refused(model, chunk, left, error, match):
    refused(model, match, error, chunk, left)


class _Foreign(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_foreign_layers_are_refused(model, upstream_model):
    for made in (model, upstream_model):
        layer = "encoders.0.layers.0.self_attn1"
        other = copy.deepcopy(made)
        attention = other.encoder.get_submodule(layer)
        attention.in_proj = _Foreign(24, attention.in_proj.out_features)
        refused(other.eval(), r"self_attn1\.in_proj")
        # its own code computes it all the same
        StreamingEncoder.from_model(other, CHUNK, LEFT, backend="eager")

        other = copy.deepcopy(made)
        attention = other.encoder.get_submodule(layer)
        parametrizations.weight_norm(attention.in_proj)
        other.eval()
        refused(other, "in_proj .* has parametrizations on weight")

        other = copy.deepcopy(made)
        other.encoder.get_submodule(layer).register_forward_hook(lambda *_: None)
        refused(other, "self_attn1 .* has forward hooks")

        other = copy.deepcopy(made)
        norm = other.encoder.get_submodule("encoders.0.layers.0.norm")
        norm.forward = lambda x: x
        refused(other, "norm .* has a forward of its own")


def test_changed_code_is_refused(upstream_model):
    other = copy.deepcopy(upstream_model)

    class Changed(type(other.encoder)):
        def streaming_forward(self, x, x_lens, states, src_key_padding_mask):
            return x, x_lens, states

    Changed.__name__ = "Zipformer"
    other.encoder.__class__ = Changed
    refused(other, r"encoder runs code that is no known version of Zipformer \(fingerprint \w+\)")
