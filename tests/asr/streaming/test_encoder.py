# SPDX-License-Identifier: Apache-2.0
"""The engine as it is used: streams that open and close, lengths, samples, and the calls it refuses."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from conftest import BINS, CHUNK, LEFT
from oracle import Alone
from steps import numbers, relative

from fastasr.asr import decoding
from fastasr.asr.streaming import FbankStream, StreamingEncoder, utterance_chunks
from fastasr.testing import seeds

FRAMES = 2 * CHUNK + 13
TOLERANCE = 5e-6


def make(model, **options):
    return StreamingEncoder.from_model(model, CHUNK, LEFT, **options)


@pytest.mark.parametrize("seed", range(2))
def test_streams_open_and_close_at_random(model, seed):
    draw, generator = random.Random(seeds.seeded(seed)), numbers(seed)
    encoder, alone = make(model, max_streams=4), {}
    seen = set()
    for _ in range(20):
        if len(alone) < 4 and draw.random() < 0.5:
            stream = encoder.open()
            assert stream not in seen
            seen.add(stream)
            alone[stream] = Alone(model, CHUNK, LEFT)
        if alone and draw.random() < 0.2:
            stream = draw.choice(list(alone))
            encoder.close(stream)
            del alone[stream]
        if alone and draw.random() < 0.2:
            stream = draw.choice(list(alone))
            encoder.reset(stream)
            alone[stream].reset()
        streams = draw.sample(list(alone), draw.randint(0, len(alone)))
        x = torch.randn(len(streams), FRAMES, BINS, generator=generator)
        y, lengths = encoder.step(x, streams)
        assert lengths.tolist() == [CHUNK // 2] * len(streams)
        for row, stream in enumerate(streams):
            assert relative(y[row], alone[stream].step(x[row])) < TOLERANCE
    assert encoder.streams == list(alone)


@pytest.mark.parametrize("frames", [9, 16, 29, 30, 61, 100])
def test_whole_utterances_keep_their_length(model, frames):
    """A stream gives as many frames as the encoder gives at once; those before the last chunk are the stream's own."""
    features = torch.randn(frames, BINS, generator=numbers(frames))
    _, expected = model.forward_encoder(features[None], torch.tensor([frames]))
    encoder, alone = make(model), Alone(model, CHUNK, LEFT)
    stream, total = encoder.open(), 0
    for chunk, length in utterance_chunks(features, CHUNK):
        y, lengths = encoder.step(chunk[None], [stream], [length])
        assert y.shape[1] == lengths.max() == lengths[0] > 0
        total += int(lengths[0])
        assert relative(y[0], alone.step(chunk)[: lengths[0]]) < TOLERANCE
    assert total == int(expected[0])


def test_fewer_frames_are_filled_with_silence(model):
    encoder = make(model, max_streams=3)
    a, b, c = (encoder.open() for _ in range(3))
    x = torch.randn(1, 20, BINS, generator=numbers(1))
    full = torch.nn.functional.pad(x, (0, 0, 0, FRAMES - 20), value=decoding.chunks.SILENCE)
    short, lengths = encoder.step(x, [a])
    same, counted = encoder.step(torch.cat([full, torch.randn(1, FRAMES, BINS)]), [b, c], [20, 0])
    assert lengths.tolist() == [3]
    assert counted.tolist() == [3, 0]
    torch.testing.assert_close(short, same[:1, :3], rtol=1e-4, atol=1e-5)


def test_samples_go_in_as_they_come(model):
    """Samples in pieces of any size give the chunks of the whole features."""
    pytest.importorskip("kaldi_native_fbank")
    samples = torch.randn(24000, generator=numbers(2)) * 0.1
    computer = FbankStream()
    features = torch.cat([computer.accept(samples), computer.finish()])
    chunks = decoding.FeatureChunks(CHUNK)
    alone = Alone(model, CHUNK, LEFT)
    expected = torch.cat([alone.step(chunk) for chunk in [*chunks.accept(features), *chunks.finish()]])
    encoder = make(model)
    one, other = encoder.open(), encoder.open()
    got = {one: [], other: []}

    def drain():
        while encoder.ready:
            for stream, y in zip(*encoder.advance(), strict=True):
                got[stream].append(y)

    encoder.push(one, samples)
    encoder.advance()
    encoder.reset(one)  # samples that wait are forgotten
    encoder.push(other, samples)  # ahead of the first: chunks of different ages go together
    for piece in samples.split(1777):
        encoder.push(one, piece, rate=16000)
        drain()
    encoder.push(one, torch.zeros(0))
    assert encoder.end(one) > 0
    assert encoder.end(other) > 0
    drain()
    for stream in (one, other):
        assert relative(torch.cat(got[stream]), expected) < TOLERANCE


def test_chunks_wait_until_a_step_has_served_them(model, monkeypatch):
    pytest.importorskip("kaldi_native_fbank")
    encoder = make(model)
    streams = [encoder.open() for _ in range(3)]
    for stream in streams:
        encoder.push(stream, torch.randn(9000, generator=numbers(stream)) * 0.1)
    waiting = encoder.push(streams[0], torch.zeros(0))
    with monkeypatch.context() as patch:
        patch.setattr(encoder._backend, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoder.advance()
    assert encoder.push(streams[0], torch.zeros(0)) == waiting
    assert encoder.advance(iter(streams))[0] == streams
    assert encoder.push(streams[0], torch.zeros(0)) == waiting - 1


def test_threads_take_turns(model, monkeypatch):
    """Backends share memory among the streams: no two calls run at once, and each stream is as alone."""
    encoder, inside, most = make(model), [], []
    step = encoder._backend.step

    def watched(*arguments):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        y = step(*arguments)
        inside.pop()
        return y

    monkeypatch.setattr(encoder._backend, "step", watched)
    chunks = torch.randn(4, 5, 1, 2 * CHUNK + 13, BINS, generator=numbers(3))
    begin = Barrier(4)

    def run(own):
        begin.wait(60)
        stream = encoder.open()
        y = torch.cat([encoder.step(chunk, [stream])[0][0] for chunk in own])
        encoder.close(stream)
        return stream, y

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, chunks))
    assert sorted(stream for stream, _ in found) == [0, 1, 2, 3]
    assert max(most) == 1
    for own, (_, y) in zip(chunks, found, strict=True):
        alone = Alone(model, CHUNK, LEFT)
        assert relative(y, torch.cat([alone.step(chunk[0]) for chunk in own])) < TOLERANCE


def test_integers_are_samples_too(model):
    pytest.importorskip("kaldi_native_fbank")
    encoder = make(model)
    one, other = encoder.open(), encoder.open()
    samples = torch.randint(-3000, 3000, (16000,), generator=numbers(3))
    encoder.push(one, samples.to(torch.int16))
    encoder.push(other, (samples.float() / 32768).numpy())
    _, y = encoder.advance()
    torch.testing.assert_close(y[0], y[1], rtol=1e-4, atol=1e-5)


def test_states_come_and_go(model):
    encoder = make(model)
    one = encoder.open()
    x = torch.randn(3, 1, FRAMES, BINS, generator=numbers(4))
    encoder.step(x[0], [one])
    other = encoder.open()
    encoder.import_states(other, encoder.export_states(one))
    y, _ = encoder.step(x[1].expand(2, -1, -1), [one, other])
    torch.testing.assert_close(y[0], y[1], rtol=1e-4, atol=1e-5)


def test_the_report_says_what_serves(model):
    encoder = make(model, backend="eager", weights="int8", max_streams=3)
    report = encoder.report
    assert report.backend == "eager"
    assert report.reason == "it was asked for"
    assert report.streams_bytes == 3 * sum(s.nbytes for s in encoder.export_states(encoder.open()))
    assert 0 < report.error < 0.05
    assert f"{report.error:.1e}" in str(report)
    assert make(model, backend="eager").report.error is None


def test_closing_is_for_ever(model):
    with make(model, max_streams=2) as encoder:
        one, _ = encoder.open(), encoder.open()
        with pytest.raises(RuntimeError, match="all 2 streams are open"):
            encoder.open()
        encoder.close(one)
        again = encoder.open()
        x = torch.zeros(1, FRAMES, BINS)
        for call in (
            lambda: encoder.step(x, [one]),
            lambda: encoder.close(one),
            lambda: encoder.reset(one),
            lambda: encoder.push(one, torch.zeros(10)),
            lambda: encoder.end(one),
            lambda: encoder.export_states(one),
            lambda: encoder.import_states(one, []),
        ):
            with pytest.raises(ValueError, match=f"stream {one} is closed"):
                call()
        with pytest.raises(ValueError, match="stream 99 was never opened"):
            encoder.step(x, [99])
        encoder.step(x, [again])
    assert encoder.streams == []


def test_wrong_features(model):
    encoder = make(model)
    one, other = encoder.open(), encoder.open()
    x = torch.zeros(1, FRAMES, BINS)
    for features, streams, error, match in (
        (x, [one, other], ValueError, r"must be \(2, 29, 80\)"),
        (x[:, :, :79], [one], ValueError, r"got \(1, 29, 79\)"),
        (torch.zeros(1, FRAMES + 1, BINS), [one], ValueError, r"got \(1, 30, 80\)"),
        (x[:, :0], [one], ValueError, r"got \(1, 0, 80\)"),
        (x[0], [one], ValueError, r"got \(29, 80\)"),
        (x.double(), [one], TypeError, "float32 tensor, got torch.float64"),
        (x.numpy(), [one], TypeError, "got ndarray"),
        (x.expand(2, -1, -1), [one, one], ValueError, "once"),
    ):
        with pytest.raises(error, match=match):
            encoder.step(features, streams)
    for lengths in ([FRAMES + 1], [-1], [3, 3]):
        with pytest.raises(ValueError, match="1 lengths of at most 29"):
            encoder.step(x, [one], lengths)
    states = encoder.export_states(one)
    with pytest.raises(ValueError, match=f"expected {len(states)} tensors, got 1"):
        encoder.import_states(one, states[:1])
    with pytest.raises(ValueError, match="state 0 must be"):
        encoder.import_states(one, [states[0][:3], *states[1:]])


def test_wrong_samples(model):
    pytest.importorskip("kaldi_native_fbank")
    encoder = make(model)
    stream = encoder.open()
    for samples, options, match in (
        (torch.zeros(2, 10), {}, "one channel"),
        (torch.zeros(10, dtype=torch.int32), {}, "int16, got torch.int32"),
        (torch.full((10,), float("nan")), {}, "finite"),
        (torch.zeros(10), {"rate": 8000}, "16000 Hz, got 8000"),
    ):
        with pytest.raises(ValueError, match=match):
            encoder.push(stream, samples, **options)
    encoder.push(stream, torch.zeros(400))
    encoder.end(stream)
    with pytest.raises(ValueError, match="after the end"):
        encoder.push(stream, torch.zeros(400))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": "fp8"}, "weights must be one of fp32, bf16, fp16, int8"),
        ({"max_streams": 0}, "max_streams must be"),
        ({"threads": 0}, "threads must be"),
        ({"backend": "tpu"}, "backend must be one of"),
        ({"bins": 40}, "does not take 40 bins, rather 80"),
        ({"backend": "eager", "release_weights": True}, "release_weights needs packed weights"),
        ({"backend": "cuda graph"}, "need a model on a GPU"),
    ],
)
def test_wrong_options(model, options, match):
    with pytest.raises(ValueError, match=match):
        make(model, **options)
