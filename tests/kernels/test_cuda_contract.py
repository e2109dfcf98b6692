# SPDX-License-Identifier: Apache-2.0
"""The op contract over the CUDA kernels without a GPU: their bodies and launches run on the CPU (cuda_emulated.py)."""

import pytest

import fastasr
from fastasr.testing import tables
from fastasr.testing.checks import cases
from tests.kernels import cuda_emulated

pytestmark = pytest.mark.skipif(cuda_emulated.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize(
    ("op", "run"),
    [
        pytest.param(
            op, run, id=f"{op}-{check}-{sample.name}-{dtype}".replace("torch.", "").replace(" ", "_")
        )
        for op in cuda_emulated.OPS
        for check, sample, dtype, run in cases(tables()[op], "cpu", forced=True)
    ],
)
def test_contract(op, run, library):
    with cuda_emulated.serving(library, op), fastasr.backend("cuda"):
        run()
