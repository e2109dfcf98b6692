# SPDX-License-Identifier: Apache-2.0
"""The convolution module: a gated projection, a depthwise convolution over time, a projection back.

    x, s = halves of in_proj(z)
    h    = x sigmoid(s), zero where the frame is padding
    y    = out_proj(whiten(conv(h)))                        out_proj: SwooshR, dropout, linear layer

Activations are (time, batch, channels). A depthwise convolution over time with K taps is also one over the
(time, batch) plane with K x 1 taps, and (1, channels, time, batch) over these very elements is a channels_last
tensor. So inference on CPU moves no activations: upstream goes to (batch, channels, time) and back.
"""

import torch
import torch.nn.functional as F

from fastasr.models.zipformer.inference import any_hooked, is_plain_inference


class ConvolutionModule(torch.nn.Module):
    """x (time, batch, channels) -> same shape. src_key_padding_mask (batch, time): True where x is padding.

    ``forward`` is written for modules with the submodules in_proj, balancer1, activation1, sigmoid,
    activation2, depthwise_conv, balancer2, whiten and out_proj, and ``causal``. A ``chunk_size`` of 0 or more
    is the argument of that name of a causal depthwise_conv. balancer2 and whiten act on gradients only: where
    none is needed they are left out.

    Raises AssertionError for such a chunk_size without ``causal``.
    """

    def forward(self, x, src_key_padding_mask=None, chunk_size=-1):
        stays = _stays_time_major(self, x, src_key_padding_mask, chunk_size)
        x, s = self.in_proj(x).chunk(2, dim=2)
        s = self.sigmoid(self.balancer1(s))
        h = self.activation2(self.activation1(x) * s)
        if stays:
            y = _time_major(self.depthwise_conv, h, src_key_padding_mask)
        else:
            y = _by_submodules(self, h, src_key_padding_mask, chunk_size)
        return self.out_proj(y)


def _stays_time_major(module, x, mask, chunk_size):
    conv = module.depthwise_conv
    return (
        type(conv) is torch.nn.Conv1d  # the causal one is of another class
        and chunk_size < 0
        and (mask is None or mask.ndim == 2)
        and is_plain_inference(module, x, conv.weight, 3)
        and not any_hooked(module.children())
    )


def _time_major(conv, h, mask):
    """conv of h (time, batch, channels), a tensor that nobody else holds."""
    h = h.contiguous()
    if mask is not None:
        h.masked_fill_(mask.to(torch.bool).t().unsqueeze(-1), 0.0)
    # Only in this order of the two calls has the dimension of size 1 the stride of a channels_last tensor.
    plane = h.unsqueeze(0).permute(0, 3, 1, 2)  # [1, C, T, B]
    taps = conv.weight.unsqueeze(-1)  # [C, 1, K, 1]
    y = F.conv2d(plane, taps, conv.bias, padding=(taps.shape[2] // 2, 0), groups=conv.groups)
    return y.permute(0, 2, 3, 1).squeeze(0)  # [T, B, C]


def _by_submodules(module, h, mask, chunk_size):
    h = h.permute(1, 2, 0)  # [B, C, T]
    if mask is not None:
        h = h.masked_fill(mask.to(torch.bool).unsqueeze(1).expand_as(h), 0.0)
    if chunk_size >= 0:
        assert module.causal, f"chunk_size is {chunk_size}, and the module is not causal"
        y = module.depthwise_conv(h, chunk_size=chunk_size)
    else:
        y = module.depthwise_conv(h)
    return module.whiten(module.balancer2(y).permute(2, 0, 1))
