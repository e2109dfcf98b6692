# SPDX-License-Identifier: Apache-2.0
"""Rows wider than a kernel takes are refused."""

import pytest
import torch

from fastasr.kernels import _layer_norm, bias_norm, conv_spatial_gate, residual_norm


def _rows(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 1, channels), torch.ones(channels)


def test_bias_norm():
    x, vector = _rows(bias_norm.MAX_CHANNELS + 1)
    with pytest.raises(ValueError, match="channels"):
        bias_norm.bias_norm_forward(x, vector, torch.tensor(0.0))


def test_residual_norm():
    x, vector = _rows(_layer_norm.MAX_CHANNELS + 1)
    with pytest.raises(ValueError, match="channels"):
        residual_norm.residual_norm_forward(x, x, None, None, None, vector, vector, 1e-5, 0, False)


def test_conv_spatial_gate():
    _, vector = _rows(_layer_norm.MAX_CHANNELS + 1)
    x, _ = _rows(2 * vector.numel())
    with pytest.raises(ValueError, match=r"fastasr.conv_spatial_gate: x: expected at most .* got shape"):
        conv_spatial_gate.conv_spatial_gate_forward(x, vector, vector, vector[:, None], None, None, 1e-5, 0)
