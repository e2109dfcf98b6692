# SPDX-License-Identifier: Apache-2.0
"""A depthwise convolution over time added to its input, forward and backward, by the kernels of maps (_maps.py).

    x (B, T, C); K taps, P = K // 2:    y[t] = x[t] + bias + sum_k w[k] x[t + k - P]
    dx[t] = g[t] + sum_k w[k] g[t - k + P]      dw[k] = sum g[t] x[t + k - P]       dbias = sum g

The map has a width of 1. Launches: forward 2, backward 4, with a copy of the weights as rows of channels in each.

Bytes per element of e bytes: forward 2e, backward 4e.
"""

import torch

from fastasr.kernels import _maps as maps

OP = "depthwise_conv_residual"


def _add_convolution(x, weight, bias, flip: bool) -> torch.Tensor:
    taps = weight.shape[-1]
    kernel = weight.view(weight.shape[0], taps, 1)
    size = x.shape[1], 1
    return maps.convolve(OP, x.unsqueeze(2), kernel, bias, (taps // 2, 0), size, flip, residual=True).squeeze(
        2
    )


def depthwise_conv_residual_forward(x, weight, bias) -> torch.Tensor:
    """Returns y in x's dtype, of x (B, T, C), contiguous weight (C, 1, K) or (C, K) and bias (C,) or None."""
    return _add_convolution(x.contiguous(), weight, bias, False)


def depthwise_conv_residual_backward(grad, x, weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dweight, dbias); grad and weight are contiguous."""
    channels, taps = weight.shape[0], weight.shape[-1]
    dx = _add_convolution(grad, weight, None, True)
    maps_of = grad.unsqueeze(2), x.contiguous().unsqueeze(2)
    kernel = weight.view(channels, taps, 1)
    dweight, dbias = maps.parameter_gradients(OP, *maps_of, kernel, (taps // 2, 0), True, True)
    return dx, dweight.view(weight.shape), dbias
