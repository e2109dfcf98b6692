# SPDX-License-Identifier: Apache-2.0
"""The op contract over the Triton kernels, run by Triton's interpreter in a process of its own. In every call it also
checks that the kernels touch nothing but their tensors and that nothing races (tests/kernels/interpreter)."""

from pathlib import Path

import pytest
from inner import interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.inner


def test_triton_kernels_keep_the_contract(request):
    file = Path(__file__).with_name("test_contract.py")
    arguments = ("-p", "tests.kernels.interpreter.plugin", str(file))
    interpreted(request, *arguments, FASTASR_TEST_BACKEND="triton")
