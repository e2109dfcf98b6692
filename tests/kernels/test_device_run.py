# SPDX-License-Identifier: Apache-2.0
"""The GPU run without a GPU: it refuses with the reason; its measuring works on the CPU as well."""

import subprocess
import sys

import pytest
import torch

from fastasr.benchmarks.case import Settings
from fastasr.benchmarks.studies import device
from fastasr.ops import _dispatch
from fastasr.testing.samples import bypass

pytestmark = pytest.mark.needs("benchmarks", "fastasr", "kernels", "tests/kernels")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "fastasr.benchmarks.studies.device", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_measures_each_pass():
    case = bypass._case(8, 2, 16)
    settings = Settings.quick(compile=False)
    units = list(device.measure(case, "cpu", torch.float32, settings, device.Timer("cpu")))
    assert [unit[0].pass_ for unit in units] == ["forward", "backward", "forward+backward"]
    for unit in units:
        assert {row.implementation for row in unit} == {"eager", "fastasr", "copy"}
        assert all(row.median_ms > 0 and row.fraction_of_limit > 0 for row in unit)


def test_cases_are_those_of_training():
    cases = device.training_cases()
    served = {row["op"] for row in _dispatch.table() if row["backend"] in ("cuda", "triton")}
    missing = served - {case.op for case in cases}
    assert not missing, (
        f"ON_DEVICE of fastasr/testing/samples/<op>.py has no case of {', '.join(sorted(missing))}"
    )
    assert {case.op for case in cases} == served
    assert len({(case.op, case.name) for case in cases}) == len(cases)
