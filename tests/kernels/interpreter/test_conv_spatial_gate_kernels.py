# SPDX-License-Identifier: Apache-2.0
"""Kernels of the convolutional spatial gating unit in the interpreter: their loads and stores."""

import pytest
import torch

from fastasr.kernels import conv_spatial_gate as kernels

# (batch, frames, channels, taps, activation)
CASES = [(2, 37, 70, 5, 0), (3, 1, 5, 7, 4), (1, 40, 3, 31, 1), (9, 5, 66, 1, 3)]


def _inputs(batch, frames, channels, taps, activation, dtype=torch.float32):
    torch.manual_seed(0)
    x, grad = torch.randn(batch, frames, 2 * channels), torch.randn(batch, frames, channels)
    parameters = [torch.randn(channels) for _ in range(2)]
    parameters += [0.3 * torch.randn(channels, 1, taps), torch.randn(channels)]
    mask = torch.arange(frames) >= torch.tensor([frames - 2 * b for b in range(batch)]).clamp(min=1)[:, None]
    return grad.to(dtype), x.to(dtype), *parameters, mask


def _run(inputs, activation, eps=1e-5):
    grad, *rest = inputs
    y = kernels.conv_spatial_gate_forward(*rest, eps, activation)
    return y, *kernels.conv_spatial_gate_backward(grad, *rest, eps, activation)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_address_is_stored_twice(case, writes):
    _run(_inputs(*case), case[-1])
    assert writes.clashes == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_read_past_the_end(case, guarded):
    inputs = _inputs(*case)
    expected = _run(inputs, case[-1])
    found = _run([guarded(t) for t in inputs], case[-1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_rows_anywhere(dtype):
    """x is a slice of a wider tensor with its sequences in another order; the test also checks the types of the
    results.
    """
    grad, x, *rest = _inputs(*CASES[0], dtype)
    wide = torch.full((x.shape[1], x.shape[0], x.shape[2] + 3), float("nan"), dtype=dtype)
    other = wide.transpose(0, 1)[..., 2:-1]
    other.copy_(x)
    found, expected = (_run((grad, t, *rest), 1) for t in (other, x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].dtype == found[1].dtype == dtype
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in found[2:])


def test_padding_is_not_read_into_frames():
    """Whatever stands at padding, the frames before it and their gradients stay the same."""
    grad, x, *rest, mask = _inputs(2, 20, 6, 5, 1)
    grad = grad.masked_fill(mask[..., None], 0.0)
    filled = torch.where(mask[..., None], torch.cat((x[..., :6], 1e3 * x[..., 6:] - 7), -1), x)
    found, expected = (_run((grad, t, *rest, mask), 1) for t in (filled, x))
    assert torch.equal(found[0][~mask], expected[0][~mask])
    assert torch.equal(found[1][~mask], expected[1][~mask])
    assert all(torch.equal(a, b) for a, b in zip(found[2:], expected[2:], strict=True))


def test_too_many_channels_are_refused():
    x = torch.zeros(1, 1, 2 * kernels.MAX_CHANNELS + 2)
    vector = torch.ones(kernels.MAX_CHANNELS + 1)
    with pytest.raises(ValueError, match=r"fastasr.conv_spatial_gate: x: expected at most .* got shape"):
        kernels.conv_spatial_gate_forward(x, vector, vector, vector[:, None], None, None, 1e-5, 0)
