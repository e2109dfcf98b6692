# SPDX-License-Identifier: Apache-2.0
"""Runs tests/kernels/interpreter in a process where Triton interprets kernels on the CPU."""

from pathlib import Path

import pytest
from inner import interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.inner


def test_interpreted(request):
    interpreted(request, str(Path(__file__).parent / "interpreter"))
