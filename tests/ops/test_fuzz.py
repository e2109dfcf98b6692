# SPDX-License-Identifier: Apache-2.0
"""Random valid and invalid calls of every op, other ones in each run. ``make fuzz`` makes more of them."""

import random
import subprocess
import sys

import pytest

from fastasr.testing import Make, seeded, tables
from fastasr.testing.fuzz import Shape, refused, run_one
from fastasr.testing.refusals import refusals

CALLS = 50


@pytest.mark.parametrize("name", tables())
def test_calls_of_one_op(name):
    calls = [(index, *run_one(index, (name,))) for index in range(CALLS)]
    wrong = [f"--op {name} --only {index}: {label}: {what}" for index, label, what in calls if what]
    assert not wrong, "\n".join(("python -m fastasr.testing.fuzz", *wrong))


class Small(Shape):
    def size(self):
        return self.rng.choice((0, 0, 1, 2, 16))


@pytest.mark.parametrize("name", tables())
def test_calls_with_little_in_them_are_refused_too(name):
    """A kernel with nothing to compute refuses what another would, also after a call that it served."""
    for index in range(8):
        rng = random.Random(seeded(name, index))
        arguments = tables()[name].random(Make(seed=index), Small(rng))
        for _ in range(2):  # an op may remember what it checked
            tables()[name].function(**arguments)
        for refusal in refusals(name, arguments):
            refused(tables()[name], refusal, refusal.arguments())


def test_calls_of_all_ops_in_a_process_of_their_own():
    command = [sys.executable, "-m", "fastasr.testing.fuzz", "-n", "250"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
