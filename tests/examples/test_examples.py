# SPDX-License-Identifier: Apache-2.0
"""Every example runs, outside the repository's folder, and says what it says it does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
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


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in tested] == []
