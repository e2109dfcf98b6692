# SPDX-License-Identifier: Apache-2.0
"""The ConvNeXt layer of the front end.

    y = x + pointwise2(SwooshL(pointwise1(depthwise(x))))

Channels are last in memory, in inference and training. The depthwise convolution then is ``ops.depthwise_conv2d``, and
a pointwise convolution is a matrix product over rows of C channels. Inference on the CPU takes the rows in blocks, so
that the hidden rows of 3 C channels stay in cache instead of crossing memory four times.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr._transforms import is_transformed
from fastasr.models.common import plumbing
from fastasr.models.common.inference import is_plain_inference
from fastasr.models.common.plain import is_plain_named
from fastasr.models.common.ragged import current
from fastasr.models.zipformer.activations import SwooshL
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.decisions import is_zero, rate
from fastasr.models.zipformer.initial_scale import ScaledConv2d
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat
from fastasr.models.zipformer.whitening import Whiten

# Rows per block: the hidden activations of a block, 3 * 128 channels in fp32, then take 1.5 MB.
BLOCK_ROWS = 1024


class ConvNeXt(torch.nn.Module):
    """x (batch, channels, time, frequency) -> same shape.

    ``forward`` is written for layers with the submodules depthwise_conv, pointwise_conv1, hidden_balancer,
    activation, pointwise_conv2, out_balancer and out_whiten, and ``layerdrop_rate``; activation is a SwooshL. The
    balancers and the whitening act on gradients only and are left out if no gradient is needed.
    """

    def __init__(
        self,
        channels: int,
        hidden_ratio: int = 3,
        kernel_size: tuple[int, int] = (7, 7),
        layerdrop_rate: FloatLike | None = None,
    ) -> None:
        super().__init__()
        self.padding = (kernel_size[0] - 1) // 2, (kernel_size[1] - 1) // 2
        hidden_channels = channels * hidden_ratio
        if layerdrop_rate is None:
            layerdrop_rate = ScheduledFloat((0.0, 0.2), (20000.0, 0.015))
        self.layerdrop_rate = layerdrop_rate
        self.depthwise_conv = torch.nn.Conv2d(
            channels, channels, kernel_size, groups=channels, padding=self.padding
        )
        self.pointwise_conv1 = torch.nn.Conv2d(channels, hidden_channels, 1)
        self.hidden_balancer = Balancer(
            hidden_channels, channel_dim=1, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0
        )
        self.activation = SwooshL()
        self.pointwise_conv2 = ScaledConv2d(hidden_channels, channels, 1, initial_scale=0.01)
        self.out_balancer = Balancer(
            channels, channel_dim=1, min_positive=0.4, max_positive=0.6, min_abs=1.0, max_abs=6.0
        )
        self.out_whiten = Whiten(num_groups=1, whitening_limit=5.0, prob=(0.025, 0.25), grad_scale=0.01)

    def forward(self, x: Tensor) -> Tensor:
        mask = _layerdrop_mask(self, x) if self.training else None
        if not has_plain_parts(self):
            return _by_submodules(self, x, mask)
        if is_plain_inference(self, x, self.pointwise_conv1.weight, 4):
            return _in_blocks(self, x)
        if x.dim() == 4 and runs_by_rows(x, self.pointwise_conv1.weight):
            return _by_rows(self, x, mask)
        return _by_submodules(self, x, mask)

    def streaming_forward(self, x: Tensor, cached_left_pad: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, channels, time, frequency), cached_left_pad (batch, channels, padding, frequency) of the frames
        before it -> (batch, channels, time - padding, frequency), the cache for the next chunk.

        Raises ValueError for a cache of another length.
        """
        pad = self.padding[0]
        if cached_left_pad.shape[2] != pad:
            raise ValueError(
                f"ConvNeXt: cached_left_pad must hold {pad} frames, got {cached_left_pad.shape[2]}"
            )
        frames = x.shape[2] - pad
        extended = torch.cat([cached_left_pad, x], dim=2)
        cache = extended[:, :, frames : frames + pad]
        padding = (0, self.padding[1])
        if (
            x.dtype == cached_left_pad.dtype
            and has_plain_parts(self)
            and runs_by_rows(x, self.pointwise_conv1.weight)
        ):
            y = _contracted(self, _hidden_rows(self, extended.permute(0, 2, 3, 1), padding))
        else:
            conv = self.depthwise_conv
            h = F.conv2d(extended, conv.weight, conv.bias, padding=padding, groups=conv.groups)
            y = self.pointwise_conv2(self.activation(self.hidden_balancer(self.pointwise_conv1(h))))
        return x[:, :, :frames] + y, cache


def _layerdrop_mask(layer: ConvNeXt, x: Tensor) -> Tensor | None:
    """Returns booleans (batch, 1, 1, 1), or (1, 1, time, 1) on a row of recordings, False where the layer is dropped;
    None at rate 0."""
    share = rate(layer.layerdrop_rate)
    if is_zero(share):
        return None
    packing = current()
    count = x.shape[0] if packing is None else packing.count
    kept = torch.rand((count, 1, 1, 1), dtype=x.dtype, device=x.device) > share
    return kept if packing is None else packing.repeated(kept).transpose(0, 2)


def _by_submodules(layer: ConvNeXt, x: Tensor, mask: Tensor | None) -> Tensor:
    hidden = layer.hidden_balancer(layer.pointwise_conv1(layer.depthwise_conv(x)))
    return _residual(layer, x, layer.pointwise_conv2(layer.activation(hidden)), mask)


def _residual(layer: ConvNeXt, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    y = layer.out_balancer(x + y if mask is None else torch.addcmul(x, y, mask.to(y.dtype)))
    if y.requires_grad:  # the whitening works on the last dimension
        y = layer.out_whiten(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return y


def has_plain_parts(layer: ConvNeXt) -> bool:
    """Says whether all parts are upstream's, without hooks: then they need not be called."""
    return (
        plumbing.is_depthwise_conv2d(layer.depthwise_conv)
        and all(map(plumbing.is_pointwise_conv2d, (layer.pointwise_conv1, layer.pointwise_conv2)))
        and is_plain_named(layer.activation, ("SwooshL",), layer)
        and all(
            is_plain_named(part, ("Balancer", "Whiten", "Identity"), layer)
            for part in (layer.hidden_balancer, layer.out_balancer, layer.out_whiten)
        )
    )


def runs_by_rows(x: Tensor, weight: Tensor) -> bool:
    """Says whether the kernels compute this call and neither transforms nor a compiler see its layout."""
    plain = x.dtype == weight.dtype or torch.is_autocast_enabled("cpu")
    return (
        ((x.is_cpu and plain) or x.is_cuda)
        and x.device == weight.device
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not is_transformed()
    )


def _by_rows(layer: ConvNeXt, x: Tensor, mask: Tensor | None) -> Tensor:
    """Runs the layer with channels last. The balancers and the whitening get the same values with other strides."""
    hidden = _hidden_rows(layer, x.permute(0, 2, 3, 1), layer.depthwise_conv.padding)
    hidden = layer.hidden_balancer(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return _residual(layer, x, _contracted(layer, hidden), mask)


def _hidden_rows(layer: ConvNeXt, rows: Tensor, padding: Any) -> Tensor:
    """(batch, time, frequency, channels) -> the hidden channels before the activation, in the same order"""
    conv, expand = layer.depthwise_conv, layer.pointwise_conv1
    y = ops.depthwise_conv2d(rows, conv.weight, conv.bias, padding=tuple(padding))
    return ops.linear(y, expand.weight.flatten(1), expand.bias)


def _contracted(layer: ConvNeXt, hidden: Tensor) -> Tensor:
    """Hidden rows -> (batch, channels, time, frequency), channels last in memory"""
    contract = layer.pointwise_conv2
    y = ops.swoosh_linear(hidden, contract.weight.flatten(1), contract.bias, kind="SwooshL")
    return y.permute(0, 3, 1, 2)


def _in_blocks(layer: ConvNeXt, x: Tensor) -> Tensor:
    batch, channels, time, frequency = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    conv: Any = layer.depthwise_conv
    maps = x.permute(0, 2, 3, 1)
    conv_rows = ops.depthwise_conv2d(maps, conv.weight, conv.bias, padding=tuple(conv.padding)).view(
        -1, channels
    )
    x_rows = maps.view(-1, channels)  # [N*T*F, C]

    expand, contract = layer.pointwise_conv1, layer.pointwise_conv2
    w1 = expand.weight.view(-1, channels)  # [3C, C]
    w2 = contract.weight.view(channels, -1)  # [C, 3C]

    step = max(1, BLOCK_ROWS // frequency) * frequency
    for first in range(0, len(x_rows), step):
        rows = slice(first, first + step)
        hidden = ops.linear(conv_rows[rows], w1, expand.bias)  # [rows, 3C]
        y = ops.swoosh_linear(hidden, w2, contract.bias, kind="SwooshL")  # [rows, C]
        torch.add(x_rows[rows], y, out=conv_rows[rows])  # Nothing reads these rows again.
    return conv_rows.view(batch, time, frequency, channels).permute(0, 3, 1, 2)
