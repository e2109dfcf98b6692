# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from ragged_cases import WAYS

from fastasr.models.common import ragged
from fastasr.models.zipformer import packed_weights


@pytest.fixture(params=WAYS)
def one_call_or_copies(request, monkeypatch):
    """Runs a test of packed frames with the native kernels that know the lengths, and with copies for other kernels."""
    if request.param != "one call":
        monkeypatch.setattr(packed_weights, "_is_native", lambda *tensors: False)
    if request.param.endswith("GPU"):
        monkeypatch.setattr(ragged.Packing, "on_gpu", True)
    if request.param.startswith("groups"):
        monkeypatch.setattr(ragged, "LACKING_ON_GPU", 8)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield
