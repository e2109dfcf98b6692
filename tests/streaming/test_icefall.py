# SPDX-License-Identifier: Apache-2.0
"""icefall's Zipformer2 through the native engine. FASTASR_ICEFALL: a checkout of icefall, which is no package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("fastasr", "tests/streaming/icefall_chunks.py")

ICEFALL = os.environ.get("FASTASR_ICEFALL")


@pytest.mark.skipif(not ICEFALL, reason="FASTASR_ICEFALL names no checkout of icefall")
def test_chunks_are_those_of_the_recipe():
    folder = Path(ICEFALL) / "egs/librispeech/ASR/zipformer"
    script = Path(__file__).with_name("icefall_chunks.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5e-6
