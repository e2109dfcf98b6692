# SPDX-License-Identifier: Apache-2.0
"""icefall's Zipformer2 without padding. FASTASR_ICEFALL: a checkout of icefall, which is no package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs(
    "fastasr", "tests/models/ragged_icefall.py", "tests/streaming/icefall_chunks.py"
)
CHECKOUT = os.environ.get("FASTASR_ICEFALL")


@pytest.mark.skipif(not CHECKOUT, reason="FASTASR_ICEFALL names no checkout of icefall")
def test_each_recording_as_alone():
    folder = Path(CHECKOUT) / "egs/librispeech/ASR/zipformer"
    script = Path(__file__).with_name("ragged_icefall.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reasons, errors = done.stdout.splitlines()[-2:]
    assert reasons == "[{'': None}, {'': None}]"
    of_values, of_gradients = map(float, errors.split())
    assert of_values < 1e-10
    assert of_gradients < 1e-10
