# SPDX-License-Identifier: Apache-2.0
"""The op contract over the Triton kernels, run by Triton's interpreter in a process of its own. In every call it also
checks that the kernels touch nothing but their tensors and store to no address twice (tests/kernels/interpreter)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_triton_kernels_keep_the_contract(request):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "FASTASR_TEST_BACKEND": "triton",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-k", "not refuses"]
    command += ["-m", request.config.option.markexpr]
    command += ["-p", "tests.kernels.interpreter.plugin", str(Path(__file__).with_name("test_contract.py"))]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    chosen = re.search(r"(\d+) selected", run.stdout)[1]
    assert f" {chosen} passed, " in run.stdout, f"not every test ran: {run.stdout[-2000:]}"
