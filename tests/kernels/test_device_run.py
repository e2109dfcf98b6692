# SPDX-License-Identifier: Apache-2.0
"""The GPU run without a GPU: it refuses with the reason; its measuring works on the CPU as well."""

import subprocess
import sys

import pytest
import torch

from fastasr.benchmarks import device
from fastasr.benchmarks.case import Settings
from fastasr.benchmarks.ops import bypass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "fastasr.benchmarks.device", "--out", str(tmp_path / "out")]
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
    assert {case.op for case in cases} == {
        "swoosh_l",
        "swoosh_r",
        "swoosh_linear",
        "bias_norm",
        "bypass",
        "complex_ema_scan",
        "conv_spatial_gate",
        "ema_scan",
        "depthwise_conv2d",
        "depthwise_conv_residual",
        "gated_depthwise_conv",
        "gated_residual_norm",
        "layer_norm_lstm",
        "linear_activation",
        "nonlin_attention",
        "rel_attention",
        "zipformer_attention",
        "zipformer_attention_weights",
        "residual_norm",
        "rnnt_joiner",
        "rnnt_lattice",
        "rnnt_pruned_lattice",
        "segment_attention",
        "toeplitz_attention",
    }
    assert len({(case.op, case.name) for case in cases}) == len(cases)
