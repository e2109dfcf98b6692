# SPDX-License-Identifier: Apache-2.0
"""The tape repeats torch's operator calls, which the native CPU kernels do not all make."""

import pytest

import fastasr


@pytest.fixture(autouse=True)
def eager():
    with fastasr.backend("eager"):
        yield
