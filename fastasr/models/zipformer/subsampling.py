# SPDX-License-Identifier: Apache-2.0
"""The convolutional front end: three convolutions and a ConvNeXt layer, to half the frame rate.

    h = ConvNeXt(conv(x))                                   x as one channel of (time, frequency)
    y = dropout(BiasNorm(whiten(W rows(h) + b)))            rows: channels and frequencies of a frame

with conv three times SwooshR(Conv2d(x)), and ConvNeXt(x) = x + pointwise2(SwooshL(pointwise1(depthwise(x)))).

Inference on CPU keeps channels last: no convolution has a oneDNN reorder on either side, a pointwise
convolution is a matrix product over rows of C channels, and the 3 C wide hidden rows of one block stay in
cache instead of crossing memory four times.
"""

import torch

from fastasr import ops
from fastasr.models.zipformer.inference import any_hooked, is_plain_inference

# Rows per block: the hidden activations of a block, 3 * 128 channels in fp32, then take 1.5 MB.
BLOCK_ROWS = 1024


class Conv2dSubsampling(torch.nn.Module):
    """x (batch, time, features), x_lens (batch,) of ints -> (batch, (time - 7) // 2, channels), lengths.

    ``forward`` is written for front ends with the submodules conv, convnext, out, out_whiten, out_norm and
    dropout, and calls each of them. In inference on CPU, conv gets its input in channels_last order: the same
    values with other strides. The result is contiguous either way.

    Raises AssertionError when the largest of the lengths is not the number of frames.
    """

    def forward(self, x, x_lens):
        x = x.unsqueeze(1)
        if _runs_channels_last(self, x):
            # Not contiguous(memory_format=...): with one channel that returns x, and conv would stay NCHW.
            x = x.to(memory_format=torch.channels_last)
        x = self.convnext(self.conv(x))
        batch, channels, time, frequency = x.shape
        rows = x.transpose(1, 2).reshape(batch, time, channels * frequency)
        y = self.dropout(self.out_norm(self.out_whiten(self.out(rows))))
        lengths = (x_lens - 7) // 2
        longest = lengths.max().item()
        assert y.shape[1] == longest, f"{y.shape[1]} frames, and the longest length is {longest}"
        return y, lengths


def _runs_channels_last(embed, x):
    weight = next(embed.conv.parameters(), None)  # of whatever stands in for conv by now
    return (
        weight is not None
        and is_plain_inference(embed, x, weight, 4)
        and not any_hooked(embed.conv.modules())
        and not any_hooked(embed.convnext.modules())
    )


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
    return is_plain_inference(layer, x, layer.pointwise_conv1.weight, 4) and not any_hooked(layer.children())


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
