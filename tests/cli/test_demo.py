# SPDX-License-Identifier: Apache-2.0
"""The demo: its audio, its features, its stages and options."""

import gzip
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import beeps
import pytest
import torch

pytest.importorskip("kaldi_native_fbank")
pytest.importorskip("rich")
from rich.console import Console

from fastasr.asr.audio import features, recordings
from fastasr.asr.audio.recordings import Clip
from fastasr.asr.demo import __main__ as command
from fastasr.asr.demo import run, stages


def quiet(_: str) -> None:
    pass


def tone(rate: int, seconds: float = 1.0, frequency: float = 440.0) -> torch.Tensor:
    t = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    return (0.5 * torch.sin(2 * math.pi * frequency * t)).float()


# --- features


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(rate):
    found = features.resample(tone(rate), rate)
    assert len(found) == features.RATE
    expected = tone(features.RATE)
    assert (found - expected)[400:-400].abs().max() < 1e-4


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    found = features.resample(tone(48000, frequency=11000.0), 48000)
    assert found[400:-400].abs().max() < 1e-3


def test_features_of_a_batch():
    clips = [Clip("a", tone(16000, 1.0), 16000), Clip("b", tone(8000, 0.5), 8000)]
    x, lengths = features.batch(clips)
    assert x.shape == (2, 100, 80)
    assert lengths.tolist() == [100, 50]
    assert x[1, 50:].max() < -20
    assert x[0].max() > x[0].median() + 3, "a tone stands out"


# --- audio


def test_a_folder_of_recordings(tmp_path):
    (tmp_path / "deep").mkdir()
    beeps.write_wav(tmp_path / "deep" / "a.wav", tone(8000), 8000, channels=2)
    (tmp_path / "deep" / "a.txt").write_text("one tone\n")
    (tmp_path / "b.wav").write_bytes(b"not a recording")
    said = []
    clips = recordings.from_folder(tmp_path, said.append)
    assert [(c.name, c.rate, c.text, len(c.samples)) for c in clips] == [("a", 8000, "one tone", 8000)]
    assert torch.allclose(clips[0].samples, tone(8000), atol=1e-3)
    assert len(said) == 1
    assert "b.wav" in said[0]


def test_flac_by_soundfile(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(str(tmp_path / "a.flac"), tone(16000).numpy(), 16000)
    assert torch.allclose(recordings.read(tmp_path / "a.flac").samples, tone(16000), atol=1e-3)


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_folder_without_recordings_is_refused(tmp_path, folder, capsys):
    (tmp_path / "empty").mkdir()
    assert command.main(["--audio", str(tmp_path / folder)]) == 2
    assert "error: --audio" in capsys.readouterr().err


def test_transcripts():
    text = "; comment\n\nhello: Hello, caller: one.\nbeep: [a beep]\nempty:\n"
    assert recordings.transcripts(text) == {"hello": "Hello, caller: one."}


def test_utterances_are_whole_clips_with_pauses():
    clips = [Clip(str(i), tone(8000, 1.0 + i / 4), 8000, f"word{i}") for i in range(6)]
    clips.append(Clip("other rate", tone(16000), 16000))
    utterances = recordings.joined(clips, seconds=4.0, count=4)
    assert len(utterances) == 4
    assert all(1.0 <= u.seconds <= 4.0 for u in utterances)
    assert "other rate" not in " ".join(u.name for u in utterances)
    again = recordings.joined(clips, seconds=4.0, count=4)
    assert [u.name for u in again] == [u.name for u in utterances]


def test_a_single_long_recording_is_cut():
    utterances = recordings.joined([Clip("long", tone(8000, 9.0), 8000)], seconds=2.0, count=4)
    assert [u.seconds for u in utterances] == [2.0] * 4


def test_the_generated_signal_is_reproducible_and_has_pauses():
    clip = recordings.generated(3.0, 16000, seed=1)
    assert torch.equal(clip.samples, recordings.generated(3.0, 16000, seed=1).samples)
    assert not torch.equal(clip.samples, recordings.generated(3.0, 16000, seed=2).samples)
    assert clip.samples.abs().max() <= 0.61
    energy = clip.samples[: 16000 * 3].reshape(-1, 400).square().mean(1)
    assert energy.max() > 100 * energy.min()


def fake_tools(folder: Path, apt: str, dpkg: str = "exit 0") -> None:
    for name, body in (("apt-get", apt), ("dpkg", dpkg)):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)


def test_prompts_are_fetched_and_kept(tmp_path, monkeypatch):
    """It takes the path through apt-get and dpkg, with stand-ins for both."""
    cache, made = tmp_path / "cache", tmp_path / "made"
    (made / recordings.PROMPTS).mkdir(parents=True)
    for name, seconds in {"hello": 1.5, "beep": 1.5, "click": 0.2}.items():
        beeps.write_wav(made / recordings.PROMPTS / f"{name}.wav", tone(8000, seconds), 8000)
    (made / recordings.TRANSCRIPTS).parent.mkdir(parents=True)
    words = "hello: Hello.\nbeep: [a beep]\nclick: Click.\n"
    (made / recordings.TRANSCRIPTS).write_bytes(gzip.compress(words.encode()))
    download = f'for p in {" ".join(recordings.PACKAGES)}; do : > "${{p}}_1_all.deb"; done'
    (tmp_path / "bin").mkdir()
    fake_tools(tmp_path / "bin", download, f'cp -r {made}/. "$3"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    speech = recordings.load(None, cache, 2.0, quiet)
    assert "asterisk-core-sounds-en-wav" in speech.source
    assert [u.text for u in speech.utterances] == ["Hello."] * 4
    fake_tools(tmp_path / "bin", "exit 1")
    assert recordings.fetch_prompts(cache, quiet) == "", "what is there is not fetched again"


def test_without_a_download_the_signal_is_generated_and_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    fake_tools(tmp_path / "bin", 'echo "E: Unable to locate package" >&2; exit 100')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    said = []
    speech = recordings.load(None, tmp_path / "cache", 1.0, said.append)
    assert "generated" in speech.source
    assert "Unable to locate package" in speech.source
    assert any("no recordings to be had" in message for message in said)


def test_without_apt_the_reason_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recordings.fetch_prompts(tmp_path / "cache", quiet) == "there is no apt-get on this system"


# --- stages


def test_signs_of_life_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(stages, "EVERY", 0.05)
    made = stages.Stages(Console(width=120), 2)
    with made.stage("First"), made.alive("something long"):
        time.sleep(0.2)
    text = capsys.readouterr().out
    assert "1/2 First" in text
    assert "… something long: 0 s" in text


def test_a_compilation_that_takes_too_long_is_given_up(monkeypatch):
    story = SimpleNamespace(notes=[], first_calls={})
    monkeypatch.setattr(run, "COMPILE_LIMIT", 0.1)
    monkeypatch.setattr(torch, "compile", lambda model: lambda *_: time.sleep(5))
    assert run._compiled(stages.Stages(Console(), 1), None, (), story) is None
    assert story.notes[-1] == "torch.compile was given up after 0.1 s"


# --- the command; tests/packaging runs it


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "NEEDED", ("rich", "no_such_package"))
    assert command.main([]) == 2
    assert "no-such-package: pip install 'fastasr[demo]'" in capsys.readouterr().err


def test_options_out_of_range(capsys):
    assert command.main(["--reps", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
