# SPDX-License-Identifier: Apache-2.0
"""Random valid and invalid calls of every op, other ones in each run. ``make fuzz`` makes more of them."""

import subprocess
import sys

import pytest

from fastasr.testing import tables
from fastasr.testing.fuzz import run_one

pytestmark = pytest.mark.needs()
CALLS = 70


@pytest.mark.parametrize("name", tables())
def test_calls_of_one_op(name):
    calls = [(index, *run_one(index, (name,))) for index in range(CALLS)]
    wrong = [f"--op {name} --only {index}: {label}: {what}" for index, label, what in calls if what]
    assert not wrong, "\n".join(("python -m fastasr.testing.fuzz", *wrong))


@pytest.mark.always
def test_calls_of_all_ops_in_a_process_of_their_own():
    command = [sys.executable, "-m", "fastasr.testing.fuzz", "-n", "250"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
