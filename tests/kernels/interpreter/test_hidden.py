# SPDX-License-Identifier: Apache-2.0
"""What a mask, a length or a stride hides may hold anything: results are the same to the bit."""

import pytest
import torch

from fastasr.kernels import (
    _zipformer_attention,
    conv_spatial_gate,
    segment_attention,
    toeplitz_attention,
    zipformer_attention,
    zipformer_attention_weights,
)
from fastasr.ops._segments import rows_of

pytestmark = pytest.mark.usefixtures("products_in_order")
NAN = float("nan")


def _same(found, expected) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"result {number}"


def test_padding_of_conv_spatial_gate():
    """Frames before the padding stay the same, and so do their gradients."""
    batch, frames, channels = 2, 20, 6
    x, grad = torch.randn(batch, frames, 2 * channels), torch.randn(batch, frames, channels)
    parameters = [torch.randn(channels), torch.randn(channels)]
    parameters += [0.3 * torch.randn(channels, 1, 5), torch.randn(channels)]
    mask = torch.arange(frames) >= torch.tensor([frames, frames - 2])[:, None]
    grad = grad.masked_fill(mask[..., None], 0.0)

    def run(x):
        rest = *parameters, mask, 1e-5, 1
        y = conv_spatial_gate.conv_spatial_gate_forward(x, *rest)
        dx, *others = conv_spatial_gate.conv_spatial_gate_backward(grad, x, *rest)
        return y[~mask], dx[~mask], *others

    filled = torch.cat((x[..., :channels], 1e3 * x[..., channels:] - 7), -1)
    _same(run(torch.where(mask[..., None], filled, x)), run(x))


def test_frames_hidden_from_segment_attention():
    """These are frames beyond a length, and past rows that do not exist yet."""
    sizes = frames, segment, left, right, memory = 20, 4, 6, 1, 2
    past = 6, 2
    queries, keys = rows_of(frames, segment, right, memory, *past)
    query, key, value, grad = (torch.randn(rows, 2, 8) for rows in (queries, keys, keys, queries))
    hidden = torch.zeros(keys, 2, dtype=torch.bool)
    context = 2 + 4 + 5  # behind memory (2 of the past, 4) and right context
    hidden[0], hidden[context : context + 3] = True, True
    hidden[context + left + 9 :, 1] = True

    def run():
        call = query, key, value, torch.tensor([20, 9]), torch.tensor([3, 1]), None, 1, *sizes, *past
        y = segment_attention.segment_attention_forward(*call)
        return y, *segment_attention.segment_attention_backward(grad, *call)

    expected = run()
    key[hidden], value[hidden] = NAN, NAN
    found = run()
    _same(found, expected)
    for gradient in found[-2:]:
        assert not gradient[hidden].any()


def test_frames_hidden_from_toeplitz_attention():
    """As a key and as a value a padded frame counts for nothing, unless its chunk is padding alone."""
    length, batch, d, v = 40, 2, 12, 20
    shapes = (length, batch, d), (length, batch, v), (length, batch, v), (2, d), (2, d), (39,)
    tensors = [torch.randn(shape) for shape in shapes]
    grad = torch.randn(length, batch, v)

    def run(mask):
        rest = *tensors, mask, None, False, 20, 1, False
        y, mixed = toeplitz_attention.toeplitz_attention_forward(*rest, True)
        return y, *toeplitz_attention.toeplitz_attention_backward(grad, *rest[:8], mixed, *rest[8:])

    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, 10:20], mask[1, :20] = True, True
    expected = run(mask)
    tensors[2] = tensors[2].clone()
    tensors[2][10:20, 0] = NAN
    found = run(mask)
    _same(found, expected)
    mask[1, :20] = False
    _same(run(mask), found)


def test_queries_without_a_key_are_nan_alone():
    tensors = [torch.randn(shape) for shape in ((8, 1, 4), (8, 1, 4), (8, 1, 4), (2, 4), (2, 4), (15,))]
    call = *tensors, torch.tensor([[True] * 2 + [False] * 6]), None, True, 0, 1, False
    y, mixed = toeplitz_attention.toeplitz_attention_forward(*call, True)
    grads = toeplitz_attention.toeplitz_attention_backward(torch.randn(8, 1, 4), *call[:8], mixed, *call[8:])
    assert torch.isnan(y[:2]).all()
    assert torch.isfinite(y[2:]).all()
    assert torch.isnan(grads[0][:2]).all()


def test_columns_behind_the_rows_of_weights():
    """A user may pass weights without padding, or with anything in it."""
    x, pos, cached = 0.5 * torch.randn(50, 1, 20), torch.randn(1, 108, 4), 0.5 * torch.randn(9, 1, 8)
    call = x, pos, cached, None, None, None, 1, 8, 8, 1
    weights = zipformer_attention_weights.zipformer_attention_weights_forward(*call)
    assert not weights._is_view(), "weights may be changed in place"
    assert weights.stride(2) % _zipformer_attention.ROW == 0
    grad, width = torch.randn(weights.shape), weights.shape[-1]
    padded = torch.full((*weights.shape[:-1], 80), NAN)
    padded[..., :width] = weights
    backward = zipformer_attention_weights.zipformer_attention_weights_backward
    expected = backward(grad, weights.contiguous(), *call, 0.0, 25.0)
    _same(backward(grad, padded[..., :width], *call, 0.0, 25.0), expected)


def test_recordings_behind_other_tiles_of_zipformer_attention():
    """A tile of keys that no recording of its queries has is not read, in either direction."""
    x, pos, value = 0.5 * torch.randn(256, 1, 20), torch.randn(1, 255, 4), torch.randn(256, 1, 4)
    starts = torch.tensor([64, 192, 256])  # 64 frames of no recording
    grad, own = torch.zeros(256, 1, 4), slice(64, 192)
    grad[own] = torch.randn(128, 1, 4)
    sizes = None, None, None, starts, 1, 8, 1, -1, -1

    def run():
        found = zipformer_attention.zipformer_attention_forward(x, pos, value, *sizes, keep=True)
        dx, _, dvalue, _ = zipformer_attention.zipformer_attention_backward(
            grad, *found, x, pos, value, *sizes
        )
        return found[0][own], dx[own], dvalue[own]

    expected = run()
    for frames in (slice(64), slice(192, None)):
        value[frames], x[frames], grad[frames] = NAN, NAN, NAN
    _same(run(), expected)
