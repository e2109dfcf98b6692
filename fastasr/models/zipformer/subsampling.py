# SPDX-License-Identifier: Apache-2.0
"""The ConvNeXt layer of the convolutional front end.

    y = x + pointwise2(SwooshL(pointwise1(depthwise(x))))

Inference on CPU keeps channels last: the depthwise convolution has no oneDNN reorder on either side, a
pointwise convolution is a matrix product over rows of C channels, and the 3 C wide hidden rows of one block
stay in cache instead of crossing memory four times.
"""

import torch

from fastasr import ops

# Rows per block: the hidden activations of a block, 3 * 128 channels in fp32, then take 1.5 MB.
BLOCK_ROWS = 1024


class ConvNeXt(torch.nn.Module):
    """x (batch, channels, time, frequency) -> same shape.

    ``forward`` is written for layers with the submodules depthwise_conv, pointwise_conv1, hidden_balancer,
    activation, pointwise_conv2, out_balancer and out_whiten, and ``layerdrop_rate``. The balancers and the
    whitening act on gradients only, so where none is needed they are left out.
    """

    def forward(self, x):
        if self.training:
            return _by_submodules(self, x, _layerdrop_mask(self, x))
        if _runs_in_blocks(self, x):
            return _in_blocks(self, x)
        return _by_submodules(self, x, None)


def _layerdrop_mask(layer, x):
    """(batch, 1, 1, 1) of booleans, False where the layer is dropped; None at rate 0."""
    rate = float(layer.layerdrop_rate)
    if rate == 0.0:
        return None
    return torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device) > rate


def _by_submodules(layer, x, mask):
    hidden = layer.hidden_balancer(layer.pointwise_conv1(layer.depthwise_conv(x)))
    y = layer.pointwise_conv2(layer.activation(hidden))
    if mask is not None:
        y = y * mask
    y = layer.out_balancer(x + y)
    if y.requires_grad:  # the whitening works on the last dimension
        y = layer.out_whiten(y.transpose(1, 3)).transpose(1, 3)
    return y


def _runs_in_blocks(layer, x):
    weight = layer.pointwise_conv1.weight
    return (
        x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.ndim == 4
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or _wants_gradients(layer)))
        and not _is_hooked(layer)
    )


def _wants_gradients(layer):
    return any(p.requires_grad for p in layer.parameters())


def _is_hooked(layer):
    return any(child._forward_hooks or child._forward_pre_hooks for child in layer.children())


def _in_blocks(layer, x):
    batch, channels, time, frequency = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    conv = layer.depthwise_conv(x)

    expand, contract = layer.pointwise_conv1, layer.pointwise_conv2
    w1 = expand.weight.view(-1, channels)  # [3C, C]
    w2 = contract.weight.view(channels, -1)  # [C, 3C]
    conv_rows = conv.permute(0, 2, 3, 1).reshape(-1, channels)  # [N*T*F, C]
    x_rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # [N*T*F, C]

    # The layer after this one reads (time, channels * frequency), so that is how the result lies in memory.
    frames = x.new_empty(batch * time, channels, frequency)  # [N*T, C, F]
    step = max(1, BLOCK_ROWS // frequency)
    for first in range(0, batch * time, step):
        last = min(first + step, batch * time)
        rows = slice(first * frequency, last * frequency)
        hidden = ops.linear(conv_rows[rows], w1, expand.bias)  # [rows, 3C]
        y = ops.swoosh_linear(hidden, w2, contract.bias, kind="SwooshL")  # [rows, C]
        y += x_rows[rows]
        frames[first:last] = y.view(last - first, frequency, channels).transpose(1, 2)
    return frames.view(batch, time, channels, frequency).transpose(1, 2)
