# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution of maps (B, T, F, C), zeros around them, forward and backward.

    y[b, t, f, c] = bias[c] + sum_(i < K, j < L) w[c, i, j] x[b, t + i - P, f + j - Q, c]    (RESIDUAL: + x[b, t, f, c])
    dx: the same of the gradient g, taps turned around, padding (K - 1 - P, L - 1 - Q)
    dw[c, i, j] = sum_(b, t, f) g[b, t, f, c] x[b, t + i - P, f + j - Q, c]     dbias[c] = sum g

The kernels are in _maps.py. Launches: forward 2; backward 3 for dx
and dw with their parts, and one copy.

Bytes per element of e bytes: forward 2e; backward 2e for dx, 2e for dw. A 20x750x19x128 bf16 map at 4.3 TB/s: 34 us
forward, 68 us backward. The kernels are bound by instructions, two of three of which are multiply-adds.
The weights' gradients are added up in parts that depend on the shape alone, and the parts in float64: results repeat
bit for bit, without atomics.
"""

import torch

from fastasr.kernels import _maps as maps


def depthwise_conv2d_forward(x, weight, bias, pad_t: int, pad_f: int) -> torch.Tensor:
    """Returns y of contiguous x (B, T, F, C), weight (C, 1, K, L) or (C, K, L) and bias (C,) or None, all
    of one dtype.
    """
    taps_t, taps_f = weight.shape[-2:]
    size = x.shape[1] + 2 * pad_t - taps_t + 1, x.shape[2] + 2 * pad_f - taps_f + 1
    return maps.convolve("depthwise_conv2d", x, weight, bias, (pad_t, pad_f), size, False)


def depthwise_conv2d_backward(
    grad, x, weight, pad_t: int, pad_f: int, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dweight, dbias), each without elements if not needed."""
    op, nothing = "depthwise_conv2d", x.new_empty(0)
    dx = nothing
    if need_x:
        padding = weight.shape[-2] - 1 - pad_t, weight.shape[-1] - 1 - pad_f
        dx = maps.convolve(op, grad, weight, None, padding, x.shape[1:3], True)
    if not (need_weight or need_bias):
        return dx, nothing, nothing
    found = maps.parameter_gradients(op, grad, x, weight, (pad_t, pad_f), need_weight, need_bias)
    return dx, *(nothing if g is None else g for g in found)
