# SPDX-License-Identifier: Apache-2.0
"""The op contract over the CUDA kernels without a GPU: their bodies and launches run on the CPU (cuda_emulated.py)."""

import pytest

import fastasr
from fastasr.testing import tables
from fastasr.testing.checks import cases
from tests.kernels import cuda_emulated
from tests.kernels.cuda_launchers import OPS, serving

pytestmark = [pytest.mark.skipif(cuda_emulated.compiler() is None, reason="there is no C++ compiler")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=pytest.mark.long if case.long else ())
        for op in OPS
        for case in cases(tables()[op], "cpu", forced=True)
    ],
)
def test_contract(case, library):
    with serving(library, case.table.op), fastasr.backend("cuda"):
        case()
