# SPDX-License-Identifier: Apache-2.0
"""Runs every test with the Triton kernels on an emulated GPU: ``pytest -p tests.kernels.ptx.plugin``. ARCHITECTURE
chooses its compute capability, by default 90.
"""

import os

import pytest

from tests.kernels.ptx.gpu import emulated_gpu

CAPABILITY = divmod(int(os.environ.get("ARCHITECTURE", "90")), 10)


@pytest.fixture(autouse=True)
def _on_an_emulated_gpu():
    with emulated_gpu(capability=CAPABILITY):
        yield
