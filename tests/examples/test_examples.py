# SPDX-License-Identifier: Apache-2.0
"""Every example runs, outside the repository's folder, and does what it announces."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import time
import wave
from pathlib import Path

import beeps
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def process(name: str, folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    return done


def run(name: str, folder: Path, *arguments: str) -> str:
    """Runs an example in this process, which spares the imports, and returns what it prints."""
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
    assert not code, code
    return printed.getvalue()


def test_accelerate_zipformer(tmp_path):
    pytest.importorskip("zipformer", exc_type=ImportError)
    text = process("accelerate_zipformer.py", tmp_path, text=True).stdout
    assert "0 rolled back" in text
    losses = re.search(r"loss (\S+) before, (\S+) after", text)
    assert float(losses[1]) == pytest.approx(float(losses[2]), rel=1e-4)
    assert float(re.search(r"difference of the output (\S+)", text)[1]) < 1e-3
    assert int(re.search(r"restored (\d+) modules", text)[1]) > 20


def test_train_char_lm(tmp_path):
    """The example learns a text of two repeated sentences, to the same perplexity in eager and fused, and continues
    one.
    """
    text = tmp_path / "text.txt"
    text.write_text("all agents are busy\nplease call back later\n" * 40)
    arguments = ("--text", str(text), "--steps", "60", "--batch", "8", "--size", "32", "--blocks", "1")
    files = ("--log", str(tmp_path / "log.csv"), "--report", str(tmp_path / "report.json"))
    printed = run("train_char_lm.py", tmp_path, *arguments, *files)
    found = re.search(r"perplexity eager (\S+), fused (\S+): (\S+) apart", printed)
    assert float(found[1]) < 8  # 17 distinct characters
    assert float(found[3]) < 1e-3
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert log[0] == "step,eager,fused"
    assert len(log) == 61
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{report['held_out_perplexity']['fused']:.4f}" == found[2]
    assert report["torch"] == torch.__version__
    assert "continued: all ag" in printed


@pytest.mark.parametrize("kind", [pytest.param((), marks=pytest.mark.long), ("--tdt",)], ids=["CTC", "TDT"])
def test_fine_tune_parakeet(tmp_path, kind):
    """Upstream's losses and those of the swapped model with upstream's draws differ by rounding."""
    for name in ("transformers", "accelerate", "kaldi_native_fbank", "kaldialign", "matplotlib"):
        pytest.importorskip(name)
    speech, runs = beeps.folder(tmp_path / "speech", count=12), ["upstream", "swapped, upstream's draws"]
    sizes = ["--steps", "3", "--batch", "2", "--seconds", "2"]
    files = ["--report", "report.json", "--plot", "losses.png"]
    process(
        "fine_tune_parakeet.py", tmp_path, "--speech", str(speech), "--runs", *runs, *sizes, *files, *kind
    )
    found = json.loads((tmp_path / "report.json").read_text())["runs"]
    upstream, swapped = (found[name]["losses"] for name in runs)
    assert len(upstream) == 3
    assert swapped == pytest.approx(upstream, rel=1e-3)
    assert swapped[0] == pytest.approx(upstream[0], rel=1e-5)
    assert all(each["peak_bytes"] > 0 for each in found.values())
    otherwise = [each["generated_otherwise"] for each in found.values()]
    if kind:
        assert max(otherwise) <= 1  # two logits may be nearly equal
    else:
        assert otherwise == [None, None]
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_train_packed(tmp_path):
    """Packed batches train as padded ones do whose padding is left out."""
    for name in ("transformers", "kaldi_native_fbank"):
        pytest.importorskip(name)
    speech = beeps.folder(tmp_path / "speech", count=16)
    sizes = ["--seconds", "6", "--recordings", "5", "--steps", "7"]
    printed = run("train_packed.py", tmp_path, "--speech", str(speech), *sizes)
    assert float(re.search(r"losses at most (\S+) apart", printed)[1]) < 1e-4
    padding = dict(re.findall(r"(\w+): loss .* computes (\d+)% padding", printed))
    assert int(padding["padded"]) > 0
    if not torch.cuda.is_available():
        assert "packed: not recorded, because there is no CUDA device" in printed
        assert (padding["ragged"], padding["packed"]) == ("0", "0")


def test_train_transducer_and_transcribe(tmp_path):
    """A run that is killed and started again has the losses of a run without a break; its result reads a recording."""
    for name in ("kaldi_native_fbank", "kaldialign", "onnxruntime", "matplotlib"):
        pytest.importorskip(name, reason="the recipe needs the extra fastasr[asr]")
    speech = beeps.folder(tmp_path / "speech", count=16)
    arguments = [
        "--speech",
        str(speech),
        *["--size", "tiny", "--max-duration", "5", "--warmup", "5", "--steps", "8"],
    ]
    command = [
        sys.executable,
        EXAMPLES / "train_transducer.py",
        "--out",
        "killed",
        *arguments,
        "--steps",
        "100000",
    ]
    killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "log.csv"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > 3):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    written = len(log.read_text().splitlines()) - 1
    arguments[-1] = str(written + 2)
    # each in a process of its own: in one with other tests behind it last bits have differed
    printed = process("train_transducer.py", tmp_path, "--out", "killed", *arguments, text=True).stdout
    assert int(re.search(r"going on after step (\d+)", printed)[1]) in (written - 1, written)
    printed = process("train_transducer.py", tmp_path, "--out", "whole", *arguments, text=True).stdout
    assert re.search(r"held-out CER [\d.]+%, WER", printed)
    columns = [
        [row.split(",")[:6] for row in (tmp_path / name / "log.csv").read_text().splitlines()]
        for name in ("killed", "whole")
    ]
    assert columns[0] == columns[1]

    run("train_transducer.py", tmp_path, "--plot", "curves.png", "killed/log.csv", "whole/log.csv")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    wav = str(speech / "beeps-0.wav")
    assert "beeps-0.wav: " in run("transcribe.py", tmp_path, wav, "--model", "whole", "--times")
    run("transcribe.py", tmp_path, "--model", "whole", "--export", "onnx")
    text = run("transcribe.py", tmp_path, "--model", "whole", "--compare", "onnx", "--speech", str(speech))
    assert re.search(r"^(\d+) of \1 held-out recordings are read as the same text$", text, re.MULTILINE)
    text = run("transcribe.py", tmp_path, wav, "--model", "onnx", "--stream", "--method", "ctc-beam")
    assert "  ... " in text
    _live(tmp_path, speech, wav)


def _live(folder, speech, wav):
    """Runs ``whole`` through the streaming engine and returns the final text of a wav, of its samples,
    and in a folder.
    """
    final = run("live.py", folder, wav, "--model", "whole", "--fast").splitlines()[-1]
    assert re.match(r"\[ +0\.00 - +[\d.]+\] ", final)
    with wave.open(wav) as opened:
        samples = opened.readframes(opened.getnframes())
    done = process("live.py", folder, "-", "--model", "whole", input=samples)
    assert done.stdout.decode().splitlines()[-1] == final
    table = run("live.py", folder, str(speech), "--model", "whole", "--fast")
    text = final.split("]")[1].strip()
    assert f"beeps-0.wav: {text}".strip() in [line.strip() for line in table.splitlines()]


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in tested] == []


def test_upstream_models_convert_from_returnn(capsys):
    """The test stays in this process, as RETURNN takes long to import; the other models are in tests/cli."""
    pytest.importorskip("returnn.frontend.encoder.e_branchformer")
    runpy.run_path(str(EXAMPLES / "upstream_models.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(re.search(r"differ by (\S+) at most", printed)[1]) < 1e-5
    assert re.search(r"(\d+) of \1 tensors come back", printed)
