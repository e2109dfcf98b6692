# SPDX-License-Identifier: Apache-2.0
"""BatchNorm in eval mode within the convolution before it: the kernel beside its formula, and both in float64."""

import copy

import pytest
import torch

from fastasr import backend
from fastasr.ops._folded_norm import folded

EPS = 2.0**-24


@pytest.mark.parametrize(("taps", "bias"), [(1, True), (9, False), (31, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_is_as_exact_as_the_formula(taps, bias, dtype):
    channels = 37
    conv = torch.nn.Conv1d(channels, channels, taps, groups=channels, bias=bias)
    norm = torch.nn.BatchNorm1d(channels)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.01, 4.0)
        norm.weight.normal_()
        norm.bias.normal_()
        conv, norm = conv.to(dtype), norm.to(dtype)
        exact = folded(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
        for name in ("eager", "triton"):
            with backend(name):
                found = folded(conv, norm)
            for y, expected, terms in zip(found, exact, (1, 3), strict=True):
                assert (y.shape, y.dtype) == (expected.shape, torch.float32)
                scale = expected.abs() if terms == 1 else 4.0 + expected.abs()
                off = ((y.double() - expected).abs() / scale).max().item()
                assert off <= 8 * EPS * terms, (name, off)


def test_gradients_come_from_the_formula():
    conv, norm = torch.nn.Conv1d(4, 4, 3, groups=4), torch.nn.BatchNorm1d(4).eval()
    with backend("triton"):
        weight, bias = folded(conv, norm)
        (weight.sum() + bias.sum()).backward()
    assert all(p.grad is not None for p in (*conv.parameters(), *norm.parameters()))
