# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(autouse=True)
def _plain_upstream(monkeypatch):
    """Runs upstream's Swoosh functions without torch.compile, because the shapes are tiny."""
    monkeypatch.setenv("K2_ONNX_EXPORT", "1")
