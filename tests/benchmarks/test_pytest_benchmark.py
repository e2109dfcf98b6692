# SPDX-License-Identifier: Apache-2.0
"""``pytest benchmarks`` finds every op and the whole models, in every way, and runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastasr import ops

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[2]


def _pytest(*arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "benchmarks",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_collects_ops_and_models_in_every_way():
    found = re.findall(r"::test_speed\[(.*)\]", _pytest("--collect-only", "-q", "-o", "addopts="))
    for name in (*ops.NAMES, "zipformer", "fast_conformer"):
        ways = [case for case in found if case.startswith(f"{name}-")]
        assert {case.rpartition("-")[2] for case in ways} >= {"fastasr"}, name
        passes = {case.rpartition("-")[0].rpartition("-")[2] for case in ways}
        assert passes >= ({"forward"} if name in ops.GRADIENTS else {"forward", "forward+backward"}), name
    assert {"eager", "compile", "upstream", "fastasr"} <= {case.rpartition("-")[2] for case in found}


def test_it_runs():
    said = _pytest(
        "-k", "bypass-100x4x512 and forward and not backward and not compile", "--benchmark-disable"
    )
    assert re.search(r"(\d+ passed|^\.+\s)", said, re.MULTILINE), said
