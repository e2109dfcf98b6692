# SPDX-License-Identifier: Apache-2.0
"""Kernels of the depthwise convolution of maps in the interpreter: their loads and stores."""

import pytest
import torch

from fastasr.kernels import depthwise_conv2d as kernels

# (shape, taps, padding)
CASES = [
    ((2, 5, 4, 70), (3, 3), (1, 1)),
    ((1, 4, 9, 3), (2, 9), (0, 3)),
    ((3, 1, 3, 5), (3, 1), (2, 0)),
    ((40, 3, 3, 4), (1, 2), (0, 1)),
]


def _run(x, weight, bias, grad, padding):
    y = kernels.depthwise_conv2d_forward(x, weight, bias, *padding)
    return y, *kernels.depthwise_conv2d_backward(grad, x, weight, *padding, True, True, True)


def _inputs(shape, taps, padding):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(shape[-1], 1, *taps), torch.randn(shape[-1])
    y = kernels.depthwise_conv2d_forward(x, weight, bias, *padding)
    return x, weight, bias, torch.randn(y.shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_address_is_stored_twice(case, writes):
    _run(*_inputs(*case), case[2])
    assert writes.clashes == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_read_past_the_end(case, guarded):
    inputs = _inputs(*case)
    expected = _run(*inputs, case[2])
    found = _run(*map(guarded, inputs), case[2])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_not_needed_is_not_computed():
    x, weight, bias, grad = _inputs(*CASES[0])
    padding = CASES[0][2]
    _, dx, dweight, dbias = _run(x, weight, bias, grad, padding)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        found = kernels.depthwise_conv2d_backward(grad, x, weight, *padding, *needs)
        for need, a, b in zip(needs, found, (dx, dweight, dbias), strict=True):
            assert torch.equal(a, b) if need else not a.numel()
