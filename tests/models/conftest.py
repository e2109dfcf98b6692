# SPDX-License-Identifier: Apache-2.0
import pytest

from fastasr.models.common import packed


@pytest.fixture(params=["one call", "copies"])
def one_call_or_copies(request, monkeypatch):
    """Runs a test of packed frames with the native kernels that know the lengths, and with copies for other kernels."""
    if request.param == "copies":
        monkeypatch.setattr(packed, "is_native", lambda *tensors: False)
