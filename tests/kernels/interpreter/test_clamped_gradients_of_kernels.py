# SPDX-License-Identifier: Apache-2.0
"""The kernels' gradients at the ends of a clamp: tests/ops/test_clamped_gradients.py with them."""

import pytest

from tests.ops.test_clamped_gradients import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("by_triton")
