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

from fastasr.models.zipformer.activations import ActivationDropoutAndLinear
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.chunk_causal_convolution import ChunkCausalDepthwiseConv1d
from fastasr.models.zipformer.identity import Identity
from fastasr.models.zipformer.inference import any_hooked, is_plain_inference
from fastasr.models.zipformer.linear import Linear
from fastasr.models.zipformer.schedules import ScheduledFloat, whitening_schedule
from fastasr.models.zipformer.whitening import Whiten


class ConvolutionModule(torch.nn.Module):
    """x (time, batch, channels) -> same shape. src_key_padding_mask (batch, time): True where x is padding.

    ``forward`` is written for modules with the submodules in_proj, balancer1, activation1, sigmoid,
    activation2, depthwise_conv, balancer2, whiten and out_proj, and ``causal``. A ``chunk_size`` of 0 or more
    is the argument of that name of a causal depthwise_conv. balancer2 and whiten act on gradients only: where
    none is needed they are left out.

    Raises ValueError for an even kernel_size, AssertionError for such a chunk_size without ``causal``.
    """

    def __init__(self, channels, kernel_size, causal):
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"ConvolutionModule: kernel_size must be odd, got {kernel_size}")
        self.causal = causal
        self.in_proj = Linear(channels, 2 * channels)
        self.balancer1 = Balancer(
            channels,
            channel_dim=-1,
            min_positive=ScheduledFloat((0.0, 0.05), (8000.0, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=ScheduledFloat((0.0, 5.0), (8000.0, 10.0), default=1.0),
        )
        self.activation1 = Identity()
        self.sigmoid = torch.nn.Sigmoid()
        self.activation2 = Identity()
        if causal:
            self.depthwise_conv = ChunkCausalDepthwiseConv1d(channels, kernel_size)
        else:
            self.depthwise_conv = torch.nn.Conv1d(
                channels, channels, kernel_size, groups=channels, padding=kernel_size // 2
            )
        self.balancer2 = Balancer(
            channels,
            channel_dim=1,
            min_positive=ScheduledFloat((0.0, 0.1), (8000.0, 0.05)),
            max_positive=1.0,
            min_abs=ScheduledFloat((0.0, 0.2), (20000.0, 0.5)),
            max_abs=10.0,
        )
        self.whiten = Whiten(
            num_groups=1, whitening_limit=whitening_schedule(7.5), prob=(0.025, 0.25), grad_scale=0.01
        )
        self.out_proj = ActivationDropoutAndLinear(
            channels, channels, activation="SwooshR", dropout_p=0.0, initial_scale=0.05
        )

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

    def streaming_forward(self, x, cache, src_key_padding_mask):
        """One chunk; cache (batch, channels, kernel_size // 2) is the gated input before it -> output of x's
        shape, the cache for the next chunk. Only with ``causal``.
        """
        x, s = self.in_proj(x).chunk(2, dim=2)
        h = _masked((x * self.sigmoid(s)).permute(1, 2, 0), src_key_padding_mask)
        y, cache = self.depthwise_conv.streaming_forward(h, cache=cache)
        return self.out_proj(y.permute(2, 0, 1)), cache


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


def _masked(h, mask):
    """h (B, C, T), zero where the frame is padding."""
    return h if mask is None else h.masked_fill(mask.to(torch.bool).unsqueeze(1), 0.0)


def _by_submodules(module, h, mask, chunk_size):
    h = _masked(h.permute(1, 2, 0), mask)
    if chunk_size >= 0:
        assert module.causal, f"chunk_size is {chunk_size}, and the module is not causal"
        y = module.depthwise_conv(h, chunk_size=chunk_size)
    else:
        y = module.depthwise_conv(h)
    return module.whiten(module.balancer2(y).permute(2, 0, 1))
