# SPDX-License-Identifier: Apache-2.0
"""Kernels of a linear layer's activation in the interpreter: their loads and stores."""

import pytest
import torch

from fastasr.kernels import linear_activation as kernels

GELU = 4
SHAPES = [(5, 70), (70, 33), (2, 3, 64)]


def _run(z, grad):
    return kernels.linear_activation_forward(z, GELU, False), *kernels.linear_activation_backward(
        grad, z, GELU, True
    )


def _inputs(shape):
    torch.manual_seed(0)
    return torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_address_is_stored_twice(shape, writes):
    _run(*_inputs(shape))
    assert writes.clashes == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_read_past_the_end(shape, guarded):
    inputs = _inputs(shape)
    expected = _run(*inputs)
    found = _run(*map(guarded, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_in_place_and_without_the_sum():
    z, grad = _inputs(SHAPES[0])
    y, dz, _ = _run(z, grad)
    alone, nothing = kernels.linear_activation_backward(grad, z, GELU, False)
    assert torch.equal(alone, dz)
    assert not nothing.numel()
    assert kernels.linear_activation_forward(z, GELU, True).data_ptr() == z.data_ptr()
    assert torch.equal(z, y)
