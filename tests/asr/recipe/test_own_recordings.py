# SPDX-License-Identifier: Apache-2.0
"""The recipe on recordings of the user's own: words that repeat, what is held out, manifests, formats."""

import csv
import json
import math

import beeps
import pytest
import torch
from tiny_runs import refused, run_example

pytest.importorskip("kaldi_native_fbank", reason="features need the extra fastasr[asr]")

from fastasr.asr.recipe import listings, speech

pytestmark = pytest.mark.needs("tests/asr/recipe", "examples", "examples/*.py")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = {"ann": 1.0, "bob": 0.7, "eve": 1.3}


def spoken(digit, speaker, take, rate=8000):
    """Returns a tone for each letter of the digit's word, at the speaker's pitch. Takes last 0.25 to 0.55 s."""
    word, seconds = WORDS[digit], 0.25 + 0.1 * ((digit + take) % 4)
    t = torch.arange(round(seconds * rate)) / rate
    pitches = torch.tensor([200.0 + 60 * (ord(c) - ord("a")) for c in word]) * SPEAKERS[speaker]
    each = pitches[(t / seconds * len(word)).long().clamp(max=len(word) - 1)]
    return 0.4 * torch.sin(2 * math.pi * torch.cumsum(each / rate, 0))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Returns a folder of 60 recordings of ten words by three speakers, named digit_speaker_take."""
    folder = tmp_path_factory.mktemp("digits")
    for digit in range(10):
        for speaker in SPEAKERS:
            for take in range(2):
                name = f"{digit}_{speaker}_{take}"
                beeps.write_wav(folder / f"{name}.wav", spoken(digit, speaker, take))
                (folder / f"{name}.txt").write_text(str(digit))
    return folder


def load(source, held_out=None):
    said = []
    training, held = speech.load(None, source, (1.0,), said.append, held_out=held_out)
    return training, held, said


def speakers(utterances):
    return {each.name.split("_")[1] for each in utterances}


def test_words_that_repeat_are_held_out_by_speaker(digits):
    training, held, said = load(digits)
    assert len(training) + len(held) == 60
    assert len(speakers(held)) == 1
    assert speakers(training) | speakers(held) == set(SPEAKERS)
    assert not speakers(training) & speakers(held)
    assert {each.text for each in held} == set(WORDS)
    (speaker,) = speakers(held)
    assert said[-1] == (
        "texts repeat (10 different texts in 60 recordings), so held-out texts are trained too; "
        f"held out: 20 recordings of {speaker}"
    )
    short = sum(path.stat().st_size < 2 * 0.4 * 8000 for path in digits.glob("*.wav"))
    assert said[0] == f"with silence to 0.4 s: {short} (0_ann_0, ...)"
    assert min(each.seconds for each in training + held) > 0.37
    assert len(speakers(load(digits, 0.5)[1])) == 2


def test_without_speakers_recordings_are_held_out(digits, tmp_path):
    for number, path in enumerate(sorted(digits.glob("*.wav"))):
        (tmp_path / f"{number}.wav").write_bytes(path.read_bytes())
        (tmp_path / f"{number}.txt").write_text(path.with_suffix(".txt").read_text())
    training, held, said = load(tmp_path)
    assert (len(training), len(held)) == (54, 6)
    assert said[-1].endswith("held out: 6 recordings, chosen by their names")
    assert [each.name for each in held] == [each.name for each in load(tmp_path)[1]]
    assert len(load(tmp_path, "0.3")[1]) == 18


def test_held_out_of_another_folder(digits, tmp_path):
    for text in ("seven", "abc"):
        beeps.write_wav(tmp_path / f"{text}.wav", beeps.samples("abcabc"))
        (tmp_path / f"{text}.txt").write_text(text)
    training, held, said = load(digits, str(tmp_path))
    assert len(training) == 60
    assert [each.text for each in held] == ["abc", "seven"]
    assert said[-1] == f"held out: 2 recordings of {tmp_path}, 1 of them with texts that are trained too"


def test_a_share_of_texts_that_do_not_repeat(recordings):
    counts = [len(load(recordings, share)[1]) for share in (0.1, 0.4, 0.8)]
    assert counts == sorted(counts)
    assert counts[-1] > 10
    training, held, _ = load(recordings, 0.4)
    assert not {each.text for each in training} & {each.text for each in held}


def rows(digits):
    return [
        (p, p.with_suffix(".txt").read_text(), p.stem.split("_")[1]) for p in sorted(digits.glob("*.wav"))
    ]


def nemo(path, digits):
    lines = [{"audio_filepath": str(p), "duration": 0.3, "text": text} for p, text, _ in rows(digits)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")


def common_voice(path, digits):
    (path.parent / "clips").symlink_to(digits)
    lines = [f"{speaker}\t{p.name}\t{text}" for p, text, speaker in rows(digits)]
    path.write_text("\n".join(["client_id\tpath\tsentence", *lines]))


def hugging_face(path, digits):
    (path.parent / "data").symlink_to(digits)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "transcription", "speaker_id"])
        table.writerows((f"data/{p.name}", text, speaker) for p, text, speaker in rows(digits))


MANIFESTS = {"train.json": nemo, "train.tsv": common_voice, "metadata.csv": hugging_face}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name, digits, tmp_path):
    MANIFESTS[name](tmp_path / name, digits)
    expected, expected_held, _ = load(digits)
    training, held, _ = load(tmp_path if name == "metadata.csv" else tmp_path / name)
    assert len(training) + len(held) == 60
    assert len(held) == 20
    found = {(each.name.split("/")[-1], each.text): each for each in training + held}
    for each in expected + expected_held:
        assert torch.equal(found[each.name, each.text].features[0], each.features[0])


def test_parts_of_a_file(tmp_path):
    beeps.write_wav(tmp_path / "long.wav", beeps.samples("abcdabcdabcd"))
    parts = [{"offset": 0.6 * n, "duration": 0.6, "text": "abcd"} for n in range(3)]
    lines = [json.dumps({"audio_filepath": "long.wav"} | part) for part in parts]
    (tmp_path / "parts.jsonl").write_text("\n".join(lines))
    training, held, _ = load(tmp_path / "parts.jsonl")
    assert sorted(each.name for each in training + held) == ["long@0", "long@0.6", "long@1.2"]
    assert {len(each.features[0]) for each in training + held} == {60}


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_formats_of_soundfile(tmp_path, suffix):
    soundfile = pytest.importorskip("soundfile")
    for name in ("ab", "cd"):
        soundfile.write(str(tmp_path / f"{name}.{suffix}"), beeps.samples(3 * name, 16000).numpy(), 16000)
        (tmp_path / f"{name}.txt").write_text(name)
    training, held, _ = load(tmp_path)
    assert len(training) == len(held) == 1


def test_refusals(digits, tmp_path):
    def said(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError) as raised:
            load(tmp_path / name)
        return str(raised.value)

    assert "line 2: expected one of audio_filepath, " in said("a.tsv", "name\ttext\na.wav\tone\n")
    assert "line 1: Expecting value" in said("a.json", "nothing\n")
    assert "line 2: expected an object, got [1]" in said("b.json", '{"path": "a.wav"}\n[1]\n')
    assert "a.tsv lists no recordings" in said("a.tsv", "path\ttext\n")
    assert "no recording of" in said("c.tsv", "path\ttext\nmissing.wav\tone\n")
    assert "expected a manifest (.tsv, .csv, .json, .jsonl)" in said("a.yaml", "")
    with pytest.raises(ValueError, match="--held-out: expected a share between 0 and 1 or a folder"):
        load(digits, "1.5")
    assert "a.tsv: 'utf-8' codec can't decode" in said("a.tsv", b"\xff")
    for part, got in (
        (("abc", 1), "offset: expected seconds, 0 or more, got 'abc'"),
        ((-1, 1), "got -1"),
        ((0, "nan"), "duration: expected seconds, 0 or more, got 'nan'"),
        ((0, [1]), r"got [1]"),
    ):
        line = json.dumps({"path": "a.wav"} | dict(zip(("offset", "duration"), part, strict=True)))
        text = said("a.json", '{"path": "a.wav"}\n' + line)
        assert text.startswith(f"--speech: {tmp_path / 'a.json'}: line 2: ")
        assert got in text


def test_refusals_of_recordings_to_hold_out(digits, tmp_path):
    """They name the option that gave these recordings."""
    with pytest.raises(listings.NoSpeech, match=r"^--held-out: .*missing is no folder and no manifest"):
        load(digits, tmp_path / "missing")
    (tmp_path / "a.json").write_text("nothing\n")
    with pytest.raises(ValueError, match=r"^--held-out: .*a.json: line 1: Expecting value"):
        load(digits, tmp_path / "a.json")
    beeps.write_wav(tmp_path / "a.wav", beeps.samples("abcd"))
    with pytest.raises(listings.NoSpeech, match=r"^--held-out: no recording has a transcript of letters"):
        load(digits, tmp_path)
    with pytest.raises(listings.NoSpeech, match=r"^no recording has a transcript of letters"):
        load(tmp_path)


def test_two_steps(digits, tmp_path, capsys):
    """The example trains on words that repeat and reports what the averaged model reads of a speaker held out."""
    pytest.importorskip("kaldialign", reason="error rates need the extra fastasr[asr]")
    out = tmp_path / "out"
    sizes = "--size", "tiny", "--steps", "2", "--device", "cpu", "--max-duration", "6", "--no-augment"
    run_example("train_transducer", "--speech", digits, "--out", out, *sizes, "--held-out", "0.2")
    printed = capsys.readouterr().out
    assert "so held-out texts are trained too; held out: 20 recordings of " in printed
    assert "held-out CER" in printed
    assert len((out / "log.csv").read_text().splitlines()) == 3
    assert json.loads((out / "report.json").read_text())
    assert "--held-out: expected a share" in refused(
        "train_transducer", "--speech", digits, "--held-out", "7"
    )
