# SPDX-License-Identifier: Apache-2.0
"""The kernels' gradients at the ends of a clamp: tests/ops/test_clamped_gradients.py with them."""

import pytest

from fastasr import backend
from tests.ops.test_clamped_gradients import *  # noqa: F403


@pytest.fixture(autouse=True)
def _kernels():
    with backend("triton"):
        yield
