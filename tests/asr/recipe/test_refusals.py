# SPDX-License-Identifier: Apache-2.0
"""The examples answer a user's mistakes with one line that names the file, what was expected and what came."""

import shutil

import beeps
import pytest
import torch
from tiny_runs import refused, run_example

pytest.importorskip("kaldi_native_fbank", reason="features need the extra fastasr[asr]")

from fastasr.asr.recipe import checkpoints


@pytest.fixture
def spoken(tmp_path):
    beeps.write_wav(tmp_path / "spoken.wav", beeps.samples("abcd"))
    return tmp_path / "spoken.wav"


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_recordings(trained, tmp_path, spoken, stream, capsys):
    def said(path):
        return refused("transcribe", path, "--model", trained, *stream)

    assert f"{tmp_path / 'missing.wav'}: there is no such file" in said(tmp_path / "missing.wav")
    beeps.write_wav(tmp_path / "fast.wav", beeps.samples("ab", 16000), 16000)
    assert "has 16000 Hz, the model wants 8000 Hz (--resample converts)" in said(tmp_path / "fast.wav")
    beeps.write_wav(tmp_path / "empty.wav", torch.zeros(0))
    assert "the recording is empty (0 samples at 8000 Hz)" in said(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("no recording")
    assert "text.wav: " in said(tmp_path / "text.wav")
    for more in ([spoken], [tmp_path / "fast.wav", "--resample"]):
        run_example("transcribe", *more, "--model", trained, *stream)
    assert "spoken.wav: " in capsys.readouterr().out


def test_models(trained, tmp_path, spoken):
    whole = (trained / checkpoints.NAME).read_bytes()
    (tmp_path / checkpoints.NAME).write_bytes(whole[: len(whole) // 2])
    assert f"the checkpoint {tmp_path / checkpoints.NAME} is damaged" in refused(
        "transcribe", spoken, "--model", tmp_path
    )
    state = checkpoints.load(trained / checkpoints.NAME)
    state["model_avg"].pop(next(iter(state["model_avg"])))
    checkpoints.save(tmp_path / "part.pt", state)
    assert "does not fit its model" in refused("transcribe", spoken, "--model", tmp_path / "part.pt")
    state = checkpoints.load(trained / checkpoints.NAME)
    state["units"]["table"] = "".join(state["units"]["table"].splitlines(keepends=True)[:3])
    checkpoints.save(tmp_path / "few.pt", state)
    assert "has 3 tokens, its model" in refused("transcribe", spoken, "--model", tmp_path / "few.pt")
    for example in ("transcribe", "live"):
        assert "error: there is no checkpoint" in refused(example, spoken, "--model", tmp_path / "nowhere")
    assert "give at least one recording" in refused("transcribe", "--model", trained)


def test_training(recordings, trained, tmp_path):
    tiny = ("--size", "tiny", "--steps", "8", "--device", "cpu")

    def said(folder, *more):
        return refused("train_transducer", "--speech", folder, "--out", tmp_path / "out", *tiny, *more)

    assert f"--speech: {tmp_path / 'missing'} is no folder" in said(tmp_path / "missing")
    empty = tmp_path / "empty"
    shutil.copytree(recordings, empty)
    for text in empty.glob("*.txt"):
        text.write_text(" \n")
    assert "no recording has a transcript of letters" in said(empty)
    assert 'units must be "char" or "bpe:N"' in said(recordings, "--units", "words")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / checkpoints.NAME).write_bytes(b"nothing")
    assert "last.pt is damaged" in said(recordings)
    assert "--plot needs a picture" in refused("train_transducer", "--plot", "x.png")
