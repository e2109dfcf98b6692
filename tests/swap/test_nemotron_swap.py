# SPDX-License-Identifier: Apache-2.0
"""transformers' Nemotron streaming encoder swapped: whole recordings and chunks of every look-ahead give upstream's
outputs and caches; what is declined."""

import copy

import pytest
import torch
from steps import moved, numbers, seeded, swapped
from tiny_parakeet import SIZES

pytest.importorskip("transformers.models.nemotron_asr_streaming")

from transformers import (
    DynamicCache,
    NemotronAsrStreamingConfig,
    NemotronAsrStreamingEncoder,
    NemotronAsrStreamingForRNNT,
)
from transformers.models.nemotron_asr_streaming import modeling_nemotron_asr_streaming as nemotron
from transformers.models.nemotron_asr_streaming.configuration_nemotron_asr_streaming import (
    NemotronAsrStreamingEncoderConfig,
)

import fastasr
from fastasr.models.fast_conformer import masks
from fastasr.ops import _reduced_weights

PARTS = "Attention", "ConvolutionModule", "FeedForward", "RelPositionalEncoding", "SubsamplingConv2D"
SWAPPED = {f"NemotronAsrStreamingEncoder{part}" for part in ("", *PARTS)}
CACHE = "cache" if hasattr(nemotron.NemotronAsrStreamingEncoderModelOutput, "cache") else "past_key_values"
FRAMES, LEFT = 203, 14
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}


def config(**options):
    return NemotronAsrStreamingEncoderConfig(**{**SIZES, "sliding_window": LEFT + 1, **options})


def encoder(dtype=torch.float32, **options):
    seeded(0)
    return moved(NemotronAsrStreamingEncoder(config(**options)), 0.03).eval().to(dtype)


def pair(dtype=torch.float32, **options):
    """Returns upstream's encoder and a swapped copy."""
    theirs = encoder(dtype, **options)
    return theirs, swapped(theirs)


def batch(dtype=torch.float32):
    generator = numbers(1)
    x = torch.randn(3, FRAMES, SIZES["num_mel_bins"], generator=generator, dtype=dtype)
    mask = (torch.arange(FRAMES) < torch.tensor([FRAMES, 150, 9])[:, None]).long()
    return {"input_features": x, "attention_mask": mask}


def same(found, expected):
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def chunks(model, x, look_ahead, name=CACHE, **options):
    """Yields what the model returns for each chunk of a stream. ``name``: that of the argument for keys and values."""
    keys = padding = None
    begin, size = 0, 1 + 8 * look_ahead
    while begin + size <= x.shape[1]:
        out = model(
            x[:, begin : begin + size],
            num_lookahead_tokens=look_ahead,
            use_cache=True,
            padding_cache=padding,
            **{name: keys},
            **options,
        )
        yield out
        keys, padding = out[CACHE], out.padding_cache
        begin, size = begin + size, 8 * (look_ahead + 1)


def _with_shared_tensors(cache):
    """Returns a copy with layers of its own, which hold the same tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("look_ahead", [13, 6, 1, 0])
def test_a_recording_and_its_chunks(look_ahead, dtype):
    theirs, ours = pair(dtype)
    inputs = batch(dtype)
    for mask in (None, inputs["attention_mask"]):
        with torch.no_grad():
            found, expected = (
                model(inputs["input_features"], mask, num_lookahead_tokens=look_ahead)
                for model in (ours, theirs)
            )
        same(found.last_hidden_state, expected.last_hidden_state)
    whole, end = theirs(inputs["input_features"], num_lookahead_tokens=look_ahead).last_hidden_state, 0
    streams = (chunks(model, inputs["input_features"], look_ahead) for model in (ours, theirs))
    for found, expected in zip(*streams, strict=True):
        same(found.last_hidden_state, expected.last_hidden_state)
        for a, b in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
            same(a.keys, b.keys)
            same(a.values, b.values)
        assert list(found.padding_cache.layers) == list(expected.padding_cache.layers)
        for key, layer in expected.padding_cache.layers.items():
            same(found.padding_cache.layers[key].cache, layer.cache)
        begin, end = end, end + expected.last_hidden_state.shape[1]
        if LEFT % (look_ahead + 1) == 0:  # otherwise the cache lacks frames that the recording's chunks see
            same(found.last_hidden_state, whole[:, begin:end].detach())
    assert end


def test_streams_of_unequal_valid_frames():
    theirs, ours = pair()
    x = batch()["input_features"][:, :56]
    mask = (torch.arange(8) < torch.tensor([8, 5, 0])[:, None]).long()
    streams = (chunks(model, x[:, 1:], 0, attention_mask=None) for model in (ours, theirs))
    for found, expected in zip(*streams, strict=True):
        same(found.last_hidden_state, expected.last_hidden_state)
    with torch.no_grad():
        found, expected = (
            model(x[:, :8], mask, num_lookahead_tokens=0, use_cache=True).last_hidden_state
            for model in (ours, theirs)
        )
    same(found, expected)


def test_chunks_need_no_mask(monkeypatch):
    """The mask is read once, and what it says goes to the kernel as numbers."""
    _, model = pair()
    read = []
    monkeypatch.setattr(
        masks, "of_kernel", lambda mask, by, of=masks.of_kernel: read.append(of(mask, by)) or read[-1]
    )
    with torch.no_grad():
        model(**batch(), num_lookahead_tokens=3)
    assert len(read) == SIZES["num_hidden_layers"]
    for arguments in read:
        assert arguments.keys() == {"key_padding_mask", "context", "chunk_size"}
        assert (arguments["context"], arguments["chunk_size"]) == ((12, 0), 4)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
@pytest.mark.parametrize("look_ahead", [13, 6, 1, 0])
def test_next_chunks_make_no_mask(look_ahead, name, monkeypatch):
    theirs, ours = pair()
    x = torch.randn(2, 400, SIZES["num_mel_bins"], generator=numbers(4))
    expected = [out.last_hidden_state for out in chunks(theirs, x, look_ahead, name)]
    stream, found = chunks(ours, x, look_ahead, name), []
    for out in stream:
        found.append(out.last_hidden_state)
        monkeypatch.setattr(nemotron, "create_bidirectional_mask", None)
    for a, b in zip(found, expected, strict=True):
        same(a, b)
    assert len(found) > 1


def test_a_cache_of_another_class():
    """Its ``update`` gets the arguments that upstream gives it, which depend on the release."""
    x = torch.randn(1, 25, SIZES["num_mel_bins"], generator=numbers(5))
    calls = []

    class Recording(DynamicCache):
        def update(self, *arguments, **named):
            calls[-1].append((len(arguments), named))
            return super().update(*arguments, **named)

    for model in pair():
        calls.append([])
        with torch.no_grad():
            model(x, num_lookahead_tokens=3, **{CACHE: Recording(config=model.config)})
    assert calls[0] == calls[1]
    assert len(calls[0]) == SIZES["num_hidden_layers"]


def test_chunks_that_do_not_see_all_frames():
    """A cached frame is of a chunk that is too old, and a call ends within the next chunk."""
    x = torch.randn(1, 240, SIZES["num_mel_bins"], generator=numbers(2))
    for look_ahead, sizes in ((3, (25, 32, 32, 32)), (3, (25, 16, 32, 8)), (0, (1, 24, 8))):
        streams = []
        for model in pair(sliding_window=8):
            keys = padding = None
            begin, outputs = 0, []
            for size in sizes:
                with torch.no_grad():
                    out = model(
                        x[:, begin : begin + size], num_lookahead_tokens=look_ahead, use_cache=True,
                        padding_cache=padding, **{CACHE: keys},
                    )  # fmt: skip
                keys, padding, begin = out[CACHE], out.padding_cache, begin + size
                outputs.append(out.last_hidden_state)
            streams.append(outputs)
        for found, expected in zip(*streams, strict=True):
            same(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, _with_shared_tensors])
@pytest.mark.parametrize("size", [1, 3])
def test_streams_that_part(size, copied):
    """Two streams go on from one, each with its own copy of the caches."""
    x = torch.randn(size, 400, SIZES["num_mel_bins"], generator=numbers(3))
    found = []
    for model in pair():
        outputs = []
        for chunk in range(40):
            options = {"num_lookahead_tokens": 0, "use_cache": True}
            if chunk == 0:
                with torch.no_grad():
                    first = model(x[:, :1], **options)
                streams = [(first[CACHE], first.padding_cache)]
            for i, (keys, padding) in enumerate(streams):
                begin = 1 + 8 * chunk + i
                with torch.no_grad():
                    outputs.append(
                        model(x[:, begin : begin + 8], padding_cache=padding, **{CACHE: keys}, **options)
                    )
            if chunk in (5, 20):
                keys, padding = streams[0]
                streams.append((copied(keys), copy.deepcopy(padding)))
        found.append((outputs, streams))
    for a, b in zip(*(outputs for outputs, _ in found), strict=True):
        same(a.last_hidden_state, b.last_hidden_state)
    for (a, _), (b, _) in zip(*(streams for _, streams in found), strict=True):
        for ours, theirs in zip(a.layers, b.layers, strict=True):
            same(ours.keys, theirs.keys)
            same(ours.values, theirs.values)
            assert ours.cumulative_length == theirs.cumulative_length


def test_generate_streams_the_same():
    seeded(0)
    model = NemotronAsrStreamingForRNNT(
        NemotronAsrStreamingConfig(
            vocab_size=11,
            blank_token_id=10,
            decoder_hidden_size=12,
            num_decoder_layers=1,
            encoder_config=config(),
        )
    ).eval()
    moved(model, 0.3)
    model.generation_config.decoder_start_token_id = 10
    x = batch()["input_features"][:1]

    def tokens(look_ahead):
        def pieces():
            begin, size = 0, 1 + 8 * look_ahead
            while begin + size <= FRAMES:
                yield x[:, begin : begin + size]
                begin, size = begin + size, 8 * (look_ahead + 1)

        with torch.no_grad():
            return [
                model.generate(x, num_lookahead_tokens=look_ahead),
                model.generate(pieces(), num_lookahead_tokens=look_ahead),
            ]

    expected = [tokens(look_ahead) for look_ahead in (1, 0)]
    fastasr.accelerate(model)
    for found, wanted in zip([tokens(1), tokens(0)], expected, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(getattr(a, "sequences", a), getattr(b, "sequences", b))
            assert getattr(a, "sequences", a).shape[1] > 2


def test_verify_a_stream():
    """The caches that a module updates are the same for every run of it."""
    _, model = pair()
    x = batch()["input_features"]
    expected = [out.last_hidden_state for out in chunks(model, x, 1)]
    report = fastasr.verify(model, lambda model: list(chunks(model, x, 1)))
    assert report.ok, str(report)
    assert {row.class_name for row in report.replaced} == SWAPPED | {"Linear"}
    for out, before in zip(chunks(model, x, 1), expected, strict=True):
        assert torch.equal(out.last_hidden_state, before)


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_chunks_on_weights_of_fewer_bits(format):
    if reason := _reduced_weights.why_not(format):
        pytest.skip(reason)
    theirs, ours = pair(hidden_size=64, num_attention_heads=4, intermediate_size=128)
    inputs = batch()["input_features"]
    report = fastasr.accelerate(ours, weights=format, verify=lambda model: list(chunks(model, inputs, 1)))
    assert report.ok, str(report)
    reduced = {row.path for row in report.weights.reduced if row.path.startswith("layers.0.")}
    parts = ("feed_forward1.linear1", "self_attn.q_proj", "self_attn.o_proj", "conv.pointwise_conv1")
    assert reduced >= {f"layers.0.{part}" for part in parts}
    for found, expected in zip(chunks(ours, inputs, 1), chunks(theirs, inputs, 1), strict=True):
        error = (found.last_hidden_state - expected.last_hidden_state).norm()
        assert 0 < error < 0.1 * expected.last_hidden_state.norm()


def test_eager_attention_is_declined():
    model = encoder()
    model.set_attn_implementation("eager")
    reasons = {row.path: row.reason for row in fastasr.accelerate(model).rows if row.status != "replaced"}
    assert "eager one inverts the mask" in reasons["layers.0.self_attn"]


def test_the_implementation_changes_after_the_swap():
    theirs, ours = pair()
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
    x = batch()["input_features"]
    with torch.no_grad():
        found, expected = (model(x, num_lookahead_tokens=3).last_hidden_state for model in (ours, theirs))
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_recording_that_is_too_long():
    _, model = pair(max_position_embeddings=20)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(**batch())
