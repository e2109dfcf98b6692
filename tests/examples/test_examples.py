# SPDX-License-Identifier: Apache-2.0
"""Every example runs, outside the repository's folder, and says what it says it does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_accelerate_zipformer(tmp_path):
    pytest.importorskip("zipformer", exc_type=ImportError)
    text = run("accelerate_zipformer.py", tmp_path)
    assert "0 rolled back" in text
    losses = re.search(r"loss (\S+) before, (\S+) after", text)
    assert float(losses[1]) == pytest.approx(float(losses[2]), rel=1e-4)
    assert float(re.search(r"difference of the output (\S+)", text)[1]) < 1e-3
    assert int(re.search(r"restored (\d+) modules", text)[1]) > 20


def test_train_char_lm(tmp_path):
    """Learns a text of two repeated sentences, to the same perplexity in eager and fused, and continues one."""
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


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in tested] == []
