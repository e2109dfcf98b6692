# SPDX-License-Identifier: Apache-2.0
"""A pytest session inside a test, in a process of its own: Triton is an interpreter from its import on, or never."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def interpreted(request, *arguments: str, timeout: float = 3600, **environment: str) -> None:
    """Runs tests with Triton's interpreter, chosen by this session's -m and -k as well; all of them must pass."""
    environment = {"TRITON_INTERPRET": "1", **environment}
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", *arguments]
    command += ["-m", request.config.option.markexpr, "-k", request.config.option.keyword]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if run.returncode == 5:  # nothing was chosen
        return
    assert run.returncode == 0, (
        run.stdout[max(0, run.stdout.find("= FAILURES =")) :][:6000] + run.stderr[-2000:]
    )
    found = re.search(r"collected (\d+) items(?: / (\d+) deselected)?", run.stdout)
    left = int(found[1]) - int(found[2] or 0)
    assert f" {left} passed" in f" {run.stdout.splitlines()[-1]}", f"not every test ran: {run.stdout[-2000:]}"
