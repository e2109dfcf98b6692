# SPDX-License-Identifier: Apache-2.0
"""Random valid and invalid calls of every op, other ones in each run. ``make fuzz`` makes more of them."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.needs("fastasr/ops", "fastasr/testing", "csrc/cpu", "csrc/bindings")
PARTS = 8


@pytest.mark.parametrize("part", [pytest.param(0, marks=pytest.mark.always), *range(1, PARTS)])
def test_random_calls(part):
    seed = int(os.environ.get("SEED", "0")) * PARTS + part
    command = [sys.executable, "-m", "fastasr.testing.fuzz", "-n", "250", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
