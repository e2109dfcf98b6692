# SPDX-License-Identifier: Apache-2.0
"""Scripts that run icefall's own code. FASTASR_ICEFALL: a checkout of icefall, which is no package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("FASTASR_ICEFALL")

needed = pytest.mark.skipif(not CHECKOUT, reason="FASTASR_ICEFALL names no checkout of icefall")


def printed(test, script):
    """Returns what the script, which lies beside the test's file, prints of the Zipformer's recipe."""
    folder = Path(CHECKOUT) / "egs/librispeech/ASR/zipformer"
    command = [sys.executable, Path(test).with_name(script), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
