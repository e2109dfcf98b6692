# SPDX-License-Identifier: Apache-2.0
"""The study of int8 beside its peers: two implementations of a tiny model, and the page."""

import json
from importlib.util import find_spec

import pytest
import torch

from fastasr.asr.recipe import checkpoints, recogniser, sizes, speech
from fastasr.asr.recipe.speech import RATE, Utterance
from fastasr.asr.recipe.units import Units
from fastasr.benchmarks import upstream
from fastasr.benchmarks.markdown import marks
from fastasr.benchmarks.studies import int8_peers
from fastasr.ops import _dispatch

PLACE = {"device_name": "a CPU", "torch": "2.13.0", "commit": "abc", "date": "2026-11-22T00:00:00Z"}
PAGE = "\n".join(mark for name in ("peers", "runs") for mark in marks(name))


@pytest.mark.long
@pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")
def test_a_tiny_model(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    page, file, plot = tmp_path / "page.md", tmp_path / "found.json", tmp_path / "plot.png"
    page.write_text(PAGE)
    files = ["--results", str(file), "--page", str(page), "--out", str(plot)]
    shape = ["--size", "tiny", "--seconds", "1", "--threads", "1", "--calls", "1", "--rounds", "1"]
    names = ("upstream", "onnxruntime int8", "fastasr int8", "OpenVINO int8")
    assert int8_peers.main([*files, *shape, "--only", *names]) == 0
    rows = json.loads(file.read_text())["peers"]["threads"]["1"]
    missing = "OpenVINO int8: left out: ModuleNotFoundError: No module named 'openvino'"
    assert (missing in capsys.readouterr().out) == (names[3] not in rows)
    assert set(rows) >= set(names[:3])
    assert rows["upstream"]["change"] == 0
    for name in names[1:3]:
        assert 0 < rows[name]["change"] < 0.1
        assert rows[name]["rtf"] > 0
    assert rows["onnxruntime int8"]["file_mb"] < rows["upstream"]["file_mb"]
    assert "| fastasr int8 | " in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert int8_peers.main([*files, "--check"]) == 0
    page.write_text(PAGE)
    assert int8_peers.main([*files, "--check"]) == 1


def test_the_table_of_runs():
    row = {
        "read": "whole",
        "long": True,
        "recordings": 14,
        "characters": 4000,
        "rates": {"float32": {"cer": 0.25}, "bf16": {"cer": 0.25}, "int8": {"cer": 0.2505}},
        "differs": {"bf16": 0, "int8": 1},
    }
    weights = {kind: {"reduced": 9, "all": 10, "bytes": 0.27} for kind in ("bf16", "int8")}
    short = row | {"long": False, "characters": 1000, "differs": {"bf16": 2, "int8": 0}}
    short["rates"] = {"float32": {"cer": 0.2}, "bf16": {"cer": 0.205}, "int8": {"cer": 0.2}}
    runs = {"main": {"steps": 100, "weights": weights, "rows": [short, row]}}
    text = int8_peers.runs_block({"longest": 20, "runs": runs, "environment": PLACE})
    assert "| main | whole, all | 28 | 5000 | 24.00% | +0.10 | +0.04 | 2 | 1 |" in text
    assert "| main | whole, up to 20 s | 14 | 1000 | 20.00% | +0.50 | +0.00 | 2 | 0 |" in text
    assert "| main | whole, over 20 s | 14 | 4000 | 25.00% | +0.00 | +0.05 | 0 | 1 |" in text
    assert (
        "main: 100 steps, 9 of 10 weights in bf16 (0.27 of float32's bytes), 9 of 10 weights in int8" in text
    )


def _tiny_run(folder):
    """Writes a run whose random weights say letters when something sounds and blank in silence."""
    units = Units.learn("char", ["abcdefghij klmnopqrs"])
    arguments = sizes.config("tiny", len(units), speech.BINS)
    torch.manual_seed(7)
    model = upstream.distinct(sizes.build(sizes.streaming(arguments)).eval())
    joiner = model.joiner
    with torch.no_grad():
        x = speech.fbank(torch.zeros(speech.RATE)).unsqueeze(0)
        silent = joiner.encoder_proj(model.forward_encoder(x, torch.tensor([x.shape[1]]))[0][0, -1])
        joiner.decoder_proj.weight *= 0.1  # what was said matters less
        joiner.output_linear.weight *= 4
        joiner.output_linear.bias -= joiner.output_linear(torch.tanh(silent))
        joiner.output_linear.bias[0] += 0.5
    state, features = model.state_dict(), {"rate": speech.RATE, "bins": speech.BINS}
    parts = {"model": state, "model_avg": state, "units": units.state_dict(), "features": features}
    folder.mkdir()
    checkpoints.save(folder / checkpoints.NAME, {**parts, "arguments": arguments, "step": 7})


def _tones(seconds):
    """Returns samples of tones of a tenth of a second, each of its own pitch and loudness."""
    length = RATE // 10
    count, time = round(10 * seconds), torch.arange(length) / RATE
    pitches, levels = 100 + 3000 * torch.rand(count, 1), 0.5 * 10 ** (-4 * torch.rand(count, 1))
    return (levels * torch.sin(2 * torch.pi * pitches * time)).flatten()


@pytest.mark.long
def test_peers_read_a_tiny_run(tmp_path):
    """The texts are what our model reads, so an implementation in float32 gets no character wrong."""
    for package in ("onnxruntime", "kaldi_native_fbank", "kaldialign"):
        pytest.importorskip(package)
    pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    run = tmp_path / "tiny"
    _tiny_run(run)
    utterances, loaded = [], recogniser.load(run)
    torch.manual_seed(1)  # after loading, which draws numbers
    for seconds in (1, 1.3, 2, 20.5):
        x = int8_peers.in_frames(_tones(seconds)[:-3])
        assert len(x) == 100 * seconds
        text = loaded.transcribe(torch.nn.functional.pad(x, (0, 0, 0, int8_peers.TAIL)).flatten())[0]
        assert len(set(text)) > 4
        utterances.append(Utterance("", [x], text))
    lacking = {peer for peer in ("sherpa-onnx", "OpenVINO") if not find_spec(peer.lower().replace("-", "_"))}
    names = [name for name in int8_peers.NAMES if name.split()[0] not in lacking | {"fastasr"}]
    found = int8_peers.readings(run, utterances, names)
    assert [row["recordings"] for row in found["rows"]] == [3, 1]
    for row in found["rows"]:
        assert set(row["rates"]) == set(names)
        assert row["differs"].keys() == row["rates"].keys() - {"upstream"}
        for name, rates in row["rates"].items():
            exact = not name.endswith("int8")
            assert rates["cer"] == 0 if exact else rates["cer"] < 0.5, name
            assert row["differs"].get(name, 0) <= (0 if exact else row["recordings"])
    with pytest.raises(ValueError, match="the others are compared with upstream"):
        int8_peers.readings(run, utterances[:1], ["onnxruntime int8"])


def test_an_implementation_without_end_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(int8_peers, "LIMIT", 0.01)
    lines = []
    assert int8_peers._in_process("upstream", lines.append, "--texts", "upstream", tmp_path) is None
    assert lines == ["upstream: left out: it takes more than 0.01 s"]


def test_the_table_of_readings():
    rates = {"upstream": {"cer": 0.2}, "sherpa-onnx int8": {"cer": 0.205}}
    short = {"long": False, "recordings": 14, "characters": 1000, "rates": rates}
    short["differs"] = {"sherpa-onnx int8": 2}
    rates = {"upstream": {"cer": 0.25}, "sherpa-onnx int8": {"cer": 0.2495}}
    row = short | {"long": True, "characters": 4000, "rates": rates, "differs": {"sherpa-onnx int8": 1}}
    found = {"run": "exp", "steps": 100, "longest": 20.0, "rows": [short, row]}
    found |= {"versions": {"sherpa_onnx": "2.0.1"}, "environment": PLACE}
    text = int8_peers.readings_block(found)
    assert "| upstream | 24.00% | 20.00% | 25.00% | | | |" in text
    assert "| sherpa-onnx int8 | 24.06% (+0.06) | 20.50% (+0.50) | 24.95% (-0.05) | 3 | 2 | 1 |" in text
    assert "up to 20 s: 14 recordings of 1000 characters" in text
    assert "sherpa_onnx 2.0.1; commit abc" in text
