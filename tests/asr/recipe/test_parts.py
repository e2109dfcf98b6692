# SPDX-License-Identifier: Apache-2.0
"""Units, texts, batches, logs, checkpoints, curves, and the mistakes that each of them refuses."""

import itertools
import random

import beeps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastasr.asr.decoding import chunks
from fastasr.asr.recipe import batches, checkpoints, curves, recogniser, scoring, sizes, speech
from fastasr.asr.recipe.logs import COLUMNS, Log
from fastasr.asr.recipe.units import Units
from fastasr.testing import seeds

TEXTS = ["please press one", "the number is busy", "i'm sorry", "press two to call back"] * 4


def test_characters():
    units = Units.learn("char", TEXTS)
    tokens = units.encode("press the")
    assert units.decode(tokens) == "press the"
    assert 0 not in tokens
    again = Units.from_state_dict(units.state_dict())
    assert again.encode("sorry") == units.encode("sorry")
    with pytest.raises(ValueError, match="'x' of 'box' is outside"):
        units.encode("box")
    with pytest.raises(ValueError, match="transcript is empty"):
        units.encode("  ")
    with pytest.raises(ValueError, match="id 99"):
        units.decode([99])


def test_pieces():
    pytest.importorskip("sentencepiece")
    units = Units.learn("bpe:40", TEXTS)
    assert len(units) == 40
    tokens = units.encode("press the number")
    assert units.decode(tokens) == "press the number"
    assert len(tokens) < len("press the number")
    assert Units.from_state_dict(units.state_dict()).encode("busy") == units.encode("busy")
    with pytest.raises(ValueError, match="outside the token table"):
        units.encode("χ")
    with pytest.raises(ValueError, match="cannot make 9000 tokens"):
        Units.learn("bpe:9000", TEXTS)


@pytest.mark.parametrize("kind", ["words", "bpe", "bpe:x"])
def test_units_of_another_kind(kind):
    with pytest.raises(ValueError, match='"char" or "bpe:N"'):
        Units.learn(kind, TEXTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Press 1, or hang-up!", "press one or hang up"),
        ("I’m 42.", "i'm four two"),
        ("slash [/]", "slash"),
        ("press #", None),
        ("(beep)", None),
        ("", None),
    ],
)
def test_plain_text(text, expected):
    assert speech.plain_text(text) == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.4, 20), min_size=1, max_size=40),
    st.floats(5, 60),
    st.integers(0, 3),
    st.sampled_from([{}, {"shapes": "buckets"}, {"shapes": "buckets", "buckets": 3}]),
)
def test_batches_hold_everything_once_and_are_short_enough(seconds, most, epoch, options):
    found = batches.epoch_batches(seconds, most, seed=1, epoch=epoch, **options)
    assert sorted(i for batch in found for i in batch.indices) == list(range(len(seconds)))
    assert all(len(indices) == 1 or length * len(indices) <= most for indices, length in found)
    longest = [max(seconds[i] for i in indices) for indices, _ in found]
    if options:
        assert all(length in seconds and length >= n for (_, length), n in zip(found, longest, strict=True))
        assert len({(len(indices), length) for indices, length in found}) <= options.get("buckets", 24) + 1
    else:
        assert [length for _, length in found] == longest
    assert found == batches.epoch_batches(seconds, most, seed=1, epoch=epoch, **options)


def test_the_edges_of_buckets_leave_the_least_padding():
    lengths = [3, 9, 4, 10, 4, 3, 20]
    every = itertools.combinations(sorted(set(lengths)), 3)
    least = min(
        (sum(min(e for e in edges if e >= n) for n in lengths), edges) for edges in every if 20 in edges
    )
    assert batches.edges(lengths, 3) == list(least[1]) == [4, 10, 20]
    assert batches.edges(lengths, 9) == sorted(set(lengths))
    assert batches.edges([]) == batches.epoch_batches([], 60, 1, 0, shapes="buckets") == []


def test_refused_shapes():
    with pytest.raises(ValueError, match=r"shapes: expected .* got 'fixed'"):
        batches.epoch_batches([1.0], 60, 1, 0, shapes="fixed")
    with pytest.raises(ValueError, match="buckets: expected a number of at least 1"):
        batches.epoch_batches([1.0], 60, 1, 0, shapes="buckets", buckets=0)


def test_epochs_differ():
    seconds = [1 + i / 50 for i in range(60)]
    for shapes in ("any", "buckets"):
        first, second = (batches.epoch_batches(seconds, 20, 1, epoch, shapes) for epoch in (0, 1))
        assert first != second


def test_batches_of_buckets_are_padded_to_their_edges():
    features = [torch.zeros(n, 3) for n in (4, 6)]
    x, lengths = batches.collate(features, 8)
    assert x.shape == (2, 8, 3)
    assert lengths.tolist() == [4, 6]
    assert (x[1, 6:] == chunks.SILENCE).all()
    assert torch.equal(batches.collate(features)[0], x[:, :6])


def test_masks_leave_the_padding_alone():
    x, lengths = torch.randn(2, 50, 20), torch.tensor([50, 30])
    masked = batches.spec_augment(x.clone(), lengths, random.Random(seeds.seeded("masks")))
    assert torch.equal(masked[1, 30:], x[1, 30:])
    assert not torch.equal(masked[0], x[0])
    again = batches.spec_augment(x.clone(), lengths, random.Random(seeds.seeded("masks")))
    assert torch.equal(masked, again)


def test_features_as_they_come_are_those_of_the_whole():
    pytest.importorskip("kaldi_native_fbank")
    signal = beeps.samples("abcda")
    stream = speech.features_of_stream()
    parts = [stream.accept(part) for part in signal.split(333)] + [stream.finish()]
    torch.testing.assert_close(torch.cat(parts), speech.fbank(signal))


def test_error_rates():
    pytest.importorskip("kaldialign")
    found = scoring.rates(["ab cd", "ef"], ["ab d", "ef gh"])
    assert found["cer"] == pytest.approx((1 + 3) / 7)
    assert found["wer"] == pytest.approx((1 + 1) / 3)


# --------------------------------------------------------------------------- files
def test_a_log_forgets_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "log.csv"
    log = Log(path)
    for step in range(1, 6):
        log.write(step=step, loss=1.0 / step)
    log.close()
    path.write_text(path.read_text() + "6,0,0.1")  # the row that was being written
    log = Log(path, step=3)
    log.write(step=4, loss=0.25)
    log.close()
    rows = path.read_text().splitlines()
    assert rows[0] == ",".join(COLUMNS)
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3", "4"]


def test_checkpoints_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoints.load(tmp_path / "missing.pt")
    path = tmp_path / "last.pt"
    content = dict.fromkeys(checkpoints.NEEDED, 0) | {"model": {"w": torch.randn(1000)}}
    checkpoints.save(path, content)
    assert checkpoints.load(path)["step"] == 0
    whole = path.read_bytes()
    for damaged in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="lacks model"):
        checkpoints.load(path)


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    content = dict.fromkeys(checkpoints.NEEDED, 0)
    checkpoints.save(path, content)

    def half(content, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(path, {**content, "step": 1})
    assert checkpoints.load(path)["step"] == 0


def test_parts_of_recordings(tmp_path):
    beeps.write_wav(tmp_path / "empty.wav", torch.zeros(0))
    for length in (0, 1, 11, 20, 43):  # nothing, and parts of a header
        (tmp_path / "part.wav").write_bytes((tmp_path / "empty.wav").read_bytes()[:length])
        with pytest.raises(ValueError, match=r"part.wav: .*\w"):
            speech.read_wav(tmp_path / "part.wav")


def test_recordings_at_another_rate(tmp_path):
    made = recogniser.Recogniser(None, None, 8000, 40)
    beeps.write_wav(tmp_path / "fast.wav", beeps.samples("ab", 16000), 16000)
    assert len(made.samples(tmp_path / "fast.wav", convert=True)) == 2400
    with pytest.raises(ValueError, match="method must be one of"):
        made.search("best")


def test_folders_without_speech(tmp_path):
    beeps.write_wav(tmp_path / "a.wav", beeps.samples("abcabc"))
    with pytest.raises(speech.NoSpeech, match="transcript of letters"):
        speech.load(None, tmp_path, say=lambda text: None)
    (tmp_path / "a.txt").write_text("abc")
    if pytest.importorskip("kaldi_native_fbank"):
        with pytest.raises(speech.NoSpeech, match="too few"):
            speech.load(None, tmp_path, say=lambda text: None)


def test_recordings_that_are_left_out_are_named(tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    texts = {"a": "abcabc", "b": "abc", "empty": " \n", "signs": "3 € 50", "mute": None, "short": "ab"}
    for name, text in texts.items():
        beeps.write_wav(tmp_path / f"{name}.wav", beeps.samples("ab" if name == "short" else "abcabc"))
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text)
    said = []
    training, held_out = speech.load(None, tmp_path, say=said.append)
    assert len(training) + len(held_out) == 3
    assert said == [
        "left out: 2 (empty, ...) without a transcript; signs whose transcript is not of letters and digits",
        "with silence to 0.4 s: short",
    ]


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    log = Log(tmp_path / "log.csv")
    for step in range(1, 30):
        log.write(step=step, loss=1.0 / step, seconds=2.0 * step)
    log.close()
    curves.plot({"one": tmp_path / "log.csv", "other": tmp_path / "log.csv"}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no training log"):
        curves.read(tmp_path / "other.csv")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu():
    with pytest.raises(ValueError, match="no CUDA device"):
        sizes.on("cuda")
