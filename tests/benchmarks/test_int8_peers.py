# SPDX-License-Identifier: Apache-2.0
"""The study of int8 beside its peers: two implementations of a tiny model, and the page."""

import json

import pytest

from fastasr.benchmarks.studies import int8_peers, results
from fastasr.ops import _dispatch

PLACE = {"device_name": "a CPU", "torch": "2.13.0", "commit": "abc", "date": "2026-11-22T00:00:00Z"}
PAGE = "\n".join(mark for name in ("peers", "runs") for mark in results.marks(name))


@pytest.mark.skipif(bool(_dispatch.native_reason()), reason="the native library is not built")
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
