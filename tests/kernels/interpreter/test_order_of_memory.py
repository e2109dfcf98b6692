# SPDX-License-Identifier: Apache-2.0
"""gated_depthwise_conv writes y and the gradient of h in h's order of memory, and reads gradients of y in any order."""

import pytest
import torch
from steps import numbers

import fastasr
from fastasr import ops


def laid(t, by_sequence):
    """Returns t (B, T, ...), sequence by sequence or frame by frame in memory."""
    return t.clone() if by_sequence else t.transpose(0, 1).contiguous().transpose(0, 1)


def step(dtype, backend, by_sequence, shape, activation):
    batch, frames, channels = shape
    generator = numbers(0)
    h, weight, bias, grad = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((batch, frames, 2 * channels), (channels, 1, 9), (channels,), shape)
    )
    mask = torch.arange(frames) >= torch.arange(frames, frames - batch, -1)[:, None]
    leaves = [t.requires_grad_() for t in (laid(h, by_sequence), weight, bias)]
    with fastasr.backend(backend):
        y = ops.gated_depthwise_conv(
            leaves[0].transpose(0, 1), weight, bias, padding_mask=mask, activation=activation
        )
        return y, *torch.autograd.grad(y, leaves, laid(grad, by_sequence).transpose(0, 1))


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("shape", [(3, 21, 24), (1, 12, 16), (2, 1, 8)])
def test_results_lie_as_the_input(shape, activation):
    expected = step(torch.float64, "eager", True, shape, activation)
    for by_sequence in (True, False):
        y, *grads = found = step(torch.float32, "triton", by_sequence, shape, activation)
        assert (y.transpose(0, 1) if by_sequence else y).is_contiguous()
        assert (grads[0] if by_sequence else grads[0].transpose(0, 1)).is_contiguous()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
