# SPDX-License-Identifier: Apache-2.0
"""A depthwise convolution over time added to its input, forward and backward, by the kernels of maps (_maps.py).

    x (B, T, C), 0 at padding; K taps, P = K // 2 + delay:    y[t] = x[t] + bias + sum_k w[k] x[t + k - P]
    dx[t] = g[t] + sum_k w[k] g[t - k + P], 0 at padding      dw[k] = sum g[t] x[t + k - P]       dbias = sum g

The map has a width of 1. Launches: forward 2, backward 4, with a copy of the weights as rows of channels in each. With
a padding mask a copy of x, and of dx, has zeros there.

Bytes per element of e bytes: forward 2e, backward 4e; with a padding mask 4e and 8e.
"""

import torch

from fastasr.kernels import _maps as maps

OP = "depthwise_conv_residual"


def _add_convolution(x, weight, bias, before: int, flip: bool) -> torch.Tensor:
    """``before``: frames of 0 that go before the first."""
    kernel = weight.view(weight.shape[0], weight.shape[-1], 1)
    size = x.shape[1], 1
    return maps.convolve(OP, x.unsqueeze(2), kernel, bias, (before, 0), size, flip, residual=True).squeeze(2)


def _masked(x, padding_mask) -> torch.Tensor:
    return x if padding_mask is None else x.masked_fill(padding_mask.unsqueeze(-1), 0.0)


def depthwise_conv_residual_forward(x, weight, bias, padding_mask=None, delay: int = 0) -> torch.Tensor:
    """Returns y in x's dtype, of x (B, T, C), contiguous weight (C, 1, K) or (C, K) and bias (C,) or None."""
    past = weight.shape[-1] // 2 + delay
    return _add_convolution(_masked(x, padding_mask).contiguous(), weight, bias, past, False)


def depthwise_conv_residual_backward(
    grad, x, weight, padding_mask=None, delay: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dweight, dbias); grad and weight are contiguous."""
    channels, taps = weight.shape[0], weight.shape[-1]
    past = taps // 2 + delay
    dx = _masked(_add_convolution(grad, weight, None, taps - 1 - past, True), padding_mask)
    maps_of = grad.unsqueeze(2), _masked(x, padding_mask).contiguous().unsqueeze(2)
    kernel = weight.view(channels, taps, 1)
    dweight, dbias = maps.parameter_gradients(OP, *maps_of, kernel, (past, 0), True, True)
    return dx, dweight.view(weight.shape), dbias
