# SPDX-License-Identifier: Apache-2.0
"""The detectors detect: a shared address, and a read past the end."""

import subprocess
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl


@triton.jit
def _overlapping(Y, STEP: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, 16)
    tl.store(Y + i, i)


def test_two_programs_on_one_address_are_found(writes):
    _overlapping[(3,)](torch.empty(64, dtype=torch.int32), STEP=16)
    assert writes.clashes == 0
    _overlapping[(3,)](torch.empty(64, dtype=torch.int32), STEP=15)
    assert writes.clashes == 2


CRASH = """
import torch, triton, triton.language as tl
from conftest import _guard

@triton.jit
def read(X, Y, n, MASKED: tl.constexpr):
    i = tl.arange(0, 16)
    keep = i < (n if MASKED else 16)
    tl.store(Y + i, tl.load(X + i, mask=keep, other=0.0))

import sys
read[(1,)](_guard(torch.ones(10)), torch.empty(16), 10, MASKED=sys.argv[1] == "masked")
"""


def test_a_read_past_the_end_faults(tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    environment = {"PYTHONPATH": str(Path(__file__).parent), "TRITON_INTERPRET": "1"}
    codes = [
        subprocess.run([sys.executable, str(script), mode], env=environment, capture_output=True).returncode
        for mode in ("masked", "unmasked")
    ]
    assert codes[0] == 0
    assert codes[1] < 0, "ended by a signal"
