# SPDX-License-Identifier: Apache-2.0
"""The tape repeats torch's operator calls, which the native CPU kernels do not all make."""

import contextlib

import pytest

import fastasr


@pytest.fixture(autouse=True)
def eager(request):
    on_gpu = request.node.get_closest_marker("gpu") is not None
    with contextlib.nullcontext() if on_gpu else fastasr.backend("eager"):
        yield
