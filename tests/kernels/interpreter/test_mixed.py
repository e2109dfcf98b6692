# SPDX-License-Identifier: Apache-2.0
"""Arguments of different types, where eager refuses them: they are as under autocast."""

import torch

from fastasr import ops
from fastasr.kernels import gated_depthwise_conv


def test_gated_depthwise_conv_of_bfloat16_with_parameters_of_float32():
    """y is float32 and each gradient has its tensor's type; nothing is rounded on the way."""
    frames, batch, channels, taps, chunk = 40, 2, 20, 5, 4
    tensors = [torch.randn(frames, batch, 2 * channels).bfloat16(), 0.4 * torch.randn(channels, 1, taps)]
    tensors += [torch.randn(channels), 0.4 * torch.randn(channels, 1, taps // 2 + 1), torch.randn(channels)]
    tensors += [0.3 * torch.randn(2, channels, taps)]
    mask = torch.arange(frames) >= torch.tensor([frames, frames - 2])[:, None]
    grad = torch.randn(frames, batch, channels)
    y, _ = gated_depthwise_conv.gated_depthwise_conv_forward(*tensors, mask, None, None, chunk, True, True)
    found = gated_depthwise_conv.gated_depthwise_conv_backward(grad, *tensors, mask, None, None, chunk, True)
    wide = [t.double().requires_grad_() for t in tensors]
    truth = ops.gated_depthwise_conv.definition(
        *wide, padding_mask=mask, chunk_size=chunk, activation="swoosh_r"
    )
    assert y.dtype == torch.float32
    assert (y.double() - truth).abs().max() < 1e-5
    for a, t, like in zip(found, torch.autograd.grad(truth, wide, grad.double()), tensors, strict=False):
        assert a.dtype == like.dtype
        assert (a.double() - t).abs().max() / t.abs().max() < (4e-3 if like.dtype == torch.bfloat16 else 1e-5)
