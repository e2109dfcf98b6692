# SPDX-License-Identifier: Apache-2.0
"""Kernels of the convolution added to its input in the interpreter: their loads and stores."""

import pytest
import torch

from fastasr.kernels import depthwise_conv_residual as kernels

CASES = [((2, 21, 70), 3), ((1, 5, 3), 9), ((40, 2, 5), 1)]  # (shape, taps)


def _run(x, weight, bias, grad):
    y = kernels.depthwise_conv_residual_forward(x, weight, bias)
    return y, *kernels.depthwise_conv_residual_backward(grad, x, weight)


def _inputs(shape, taps):
    torch.manual_seed(0)
    channels = shape[-1]
    return torch.randn(shape), torch.randn(channels, 1, taps), torch.randn(channels), torch.randn(shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_address_is_stored_twice(case, writes):
    _run(*_inputs(*case))
    assert writes.clashes == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_read_past_the_end(case, guarded):
    inputs = _inputs(*case)
    expected = _run(*inputs)
    found = _run(*map(guarded, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
