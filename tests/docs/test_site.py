# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning: links and anchors exist, and docstrings give the API reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings_handlers.python")
ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'id="fastasr.accelerate"' in (tmp_path / "api" / "fastasr.html").read_text(encoding="utf-8")
    assert 'id="fastasr.ops.bypass.bypass"' in (tmp_path / "api" / "fastasr.ops.html").read_text(
        encoding="utf-8"
    )
