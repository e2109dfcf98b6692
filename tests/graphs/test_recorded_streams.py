# SPDX-License-Identifier: Apache-2.0
"""Chunks of Nemotron's streams, recorded on tapes: outputs and caches are upstream's, whatever happens to the caches
between two chunks."""

import copy

import pytest
import torch
from steps import moved, seeded
from tiny_parakeet import SIZES

pytest.importorskip("transformers.models.nemotron_asr_streaming")

from transformers import NemotronAsrStreamingEncoder
from transformers.models.nemotron_asr_streaming import modeling_nemotron_asr_streaming as nemotron
from transformers.models.nemotron_asr_streaming.configuration_nemotron_asr_streaming import (
    NemotronAsrStreamingEncoderConfig,
)

import fastasr
from fastasr.testing.tape import TapeRecorder

CACHE = "cache" if hasattr(nemotron.NemotronAsrStreamingEncoderModelOutput, "cache") else "past_key_values"
LEFT = 6


def models(device="cpu"):
    """Returns upstream's encoder and a copy whose chunks are recorded."""
    seeded(0)
    config = NemotronAsrStreamingEncoderConfig(**{**SIZES, "sliding_window": LEFT + 1})
    theirs = moved(NemotronAsrStreamingEncoder(config), 0.03).eval().to(device)
    ours = copy.deepcopy(theirs)
    recorder = TapeRecorder if device == "cpu" else None
    report = fastasr.accelerate(ours, graphs=fastasr.Graphs(after=1, recorder=recorder))
    assert report.graphs == {"": None}
    return theirs, ours


class Stream:
    """The same stream in several models."""

    def __init__(self, models, batch=2, look_ahead=1, seed=0):
        self.models, self.look_ahead, self.at = models, look_ahead, 0
        self.x = torch.randn(
            batch, 2000, SIZES["num_mel_bins"], generator=torch.Generator().manual_seed(seed)
        )
        self.x = self.x.to(next(models[0].parameters()).device)
        self.caches = [{CACHE: None, "padding_cache": None} for _ in models]

    @torch.no_grad()
    def step(self):
        size = 8 * (self.look_ahead + 1) - (0 if self.at else 7)
        x, found = self.x[:, self.at : self.at + size], []
        for model, caches in zip(self.models, self.caches, strict=True):
            out = model(x, num_lookahead_tokens=self.look_ahead, use_cache=True, **caches)
            caches.update({key: out[key] for key in caches})
            found.append(out.last_hidden_state)
        self.at += size
        expected, *others = found
        for y in others:
            close(y, expected)
        self.same_caches()

    def same_caches(self):
        expected, *others = self.caches
        for caches in others:
            for a, b in zip(caches[CACHE].layers, expected[CACHE].layers, strict=True):
                close(a.keys, b.keys)
                close(a.values, b.values)
                assert a.cumulative_length == b.cumulative_length
            layers = expected["padding_cache"].layers
            assert list(layers) == list(caches["padding_cache"].layers)
            for key, layer in layers.items():
                close(caches["padding_cache"].layers[key].cache, layer.cache)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def kinds(model):
    return fastasr.graph_state(model)[""]


DEVICES = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("look_ahead", [0, 1, 2])
def test_a_stream(look_ahead, device):
    theirs, ours = models(device)
    stream = Stream((theirs, ours), look_ahead=look_ahead)
    for _ in range(12):
        stream.step()
    assert [kind.reason for kind in kinds(ours) if kind.reason] == []
    # with two frames of look-ahead no chunk sees all six cached frames but those that fill the cache
    assert max(kind.replayed for kind in kinds(ours)) >= 5, kinds(ours)


def test_streams_in_turns_and_reordered_caches():
    theirs, ours = models()
    a, b = Stream((theirs, ours), seed=1), Stream((theirs, ours), seed=2)
    for _ in range(8):
        a.step(), b.step()
    before = sum(kind.replayed for kind in kinds(ours))
    for caches in a.caches:
        for layer in caches[CACHE].layers:
            layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)
        for layer in caches["padding_cache"].layers.values():
            layer.cache.copy_(layer.cache.flip(0))  # in place
    for _ in range(3):
        a.step(), b.step()
    assert sum(kind.replayed for kind in kinds(ours)) == before + 6


def test_copies_of_a_stream_part():
    theirs, ours = models()
    a = Stream((theirs, ours))
    for _ in range(8):
        a.step()
    b = Stream((theirs, ours), seed=3)
    b.at, b.caches = a.at, copy.deepcopy(a.caches)
    for _ in range(3):
        a.step()
    for _ in range(3):
        b.step()
    a.same_caches()


def test_gradients_and_whole_recordings_are_not_recorded():
    theirs, ours = models()
    stream = Stream((theirs, ours))
    for _ in range(6):
        stream.step()
    before = [kind.seen for kind in kinds(ours)]
    x = stream.x[:, :64]
    close(ours(x, num_lookahead_tokens=1)[0], theirs(x, num_lookahead_tokens=1)[0])
    caches = stream.caches[1]
    assert ours(x[:, :16], num_lookahead_tokens=1, use_cache=True, **caches)[0].requires_grad
    assert [kind.seen for kind in kinds(ours)] == before


def test_undone():
    theirs, ours = models()
    stream = Stream((theirs, ours))
    for _ in range(8):
        stream.step()
    fastasr.restore(ours)
    assert fastasr.graph_state(ours) == {}
    for _ in range(3):
        stream.step()  # upstream's code goes on with the caches


def test_a_part_that_is_not_swapped():
    seeded(0)
    model = NemotronAsrStreamingEncoder(NemotronAsrStreamingEncoderConfig(**SIZES)).eval()
    options = fastasr.Graphs(after=1, recorder=TapeRecorder)
    report = fastasr.accelerate(model, graphs=options, exclude=["layers.0.conv"])
    assert report.graphs == {"": "not replaced: NemotronAsrStreamingEncoderConvolutionModule"}
