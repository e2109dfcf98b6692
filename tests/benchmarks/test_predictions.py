# SPDX-License-Identifier: Apache-2.0
"""The predicted times of kernels and their reader."""

import pytest

from fastasr.benchmarks import predictions

pytestmark = pytest.mark.needs("benchmarks")


def test_a_prediction_is_found_by_op_phase_case_and_device(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "FILE", tmp_path / "predicted.json")
    row = {"op": "bypass", "case": "4x5", "device": "H100"}
    predictions.write(
        [row | {"phase": p, "predicted_us": us} for p, us in (("forward", 2.0), ("backward", 3.0))]
    )
    name = "NVIDIA H100 80GB HBM3"
    assert predictions.predicted("bypass", "forward", "4x5", name) == 2.0
    assert predictions.predicted("bypass", "forward+backward", "4x5", name) == 5.0
    assert predictions.predicted("bypass", "forward", "4x5", "NVIDIA A100-SXM4-80GB") is None
    assert predictions.predicted("bypass", "forward", "4x6", name) is None
    assert len((tmp_path / "predicted.json").read_text().splitlines()) == 4
    predictions.rows.cache_clear()
