# SPDX-License-Identifier: Apache-2.0
"""The convolutional front end: three convolutions and a ConvNeXt layer. It halves the frame rate.

    h = ConvNeXt(conv(x))                                   x as one channel of (time, frequency)
    y = dropout(BiasNorm(whiten(W rows(h) + b)))            rows: channels and frequencies of a frame

with conv three times SwooshR(Conv2d(x)), and ConvNeXt(x) = x + pointwise2(SwooshL(pointwise1(depthwise(x)))).

Channels are last in memory, in inference and training. The convolutions then need no reordering, the depthwise
convolution is ``ops.depthwise_conv2d``, and a pointwise convolution is a matrix product over rows of C channels.
Inference on the CPU takes the rows in blocks, so that the hidden rows of 3 C channels stay in cache instead of crossing
memory four times.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr import ops
from fastasr._recording import recording
from fastasr._transforms import Function, is_transformed
from fastasr.models.common import plumbing
from fastasr.models.common.inference import is_plain_inference
from fastasr.models.common.linear import Linear
from fastasr.models.common.plain import any_watched, is_plain, is_plain_named
from fastasr.models.zipformer.activations import SwooshL, SwooshR
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.decisions import is_zero, rate
from fastasr.models.zipformer.dropout import Dropout3
from fastasr.models.zipformer.gradient_scale import ScaleGrad
from fastasr.models.zipformer.initial_scale import ScaledConv2d
from fastasr.models.zipformer.normalization import BiasNorm
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops import _gemm, _reduced_weights

# Rows per block: the hidden activations of a block, 3 * 128 channels in fp32, then take 1.5 MB.
BLOCK_ROWS = 1024

_SHORT = (torch.float16, torch.bfloat16)


class Conv2dSubsampling(torch.nn.Module):
    """x (batch, time, features), x_lens (batch,) of ints -> (batch, (time - 7) // 2, channels), lengths.

    ``forward`` is written for front ends with the submodules conv, convnext, out, out_whiten, out_norm and dropout, and
    calls each of them. conv gets its input in channels_last order, the same values with other strides, unless the call
    is compiled or a module has hooks; on a GPU only 16-bit types are reordered. The result is always contiguous.

    Raises ValueError for fewer than 7 in_channels, AssertionError if the largest length is not the number of output
    frames, which a compiled call does not check.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layer1_channels: int = 8,
        layer2_channels: int = 32,
        layer3_channels: int = 128,
        dropout: FloatLike = 0.1,
    ) -> None:
        if in_channels < 7:
            raise ValueError(f"Conv2dSubsampling: in_channels must be at least 7, got {in_channels}")
        super().__init__()
        self.conv = torch.nn.Sequential(
            torch.nn.Conv2d(1, layer1_channels, 3, padding=(0, 1)),
            ScaleGrad(0.2),  # keeps this layer's gradients in the range of float16
            Balancer(layer1_channels, channel_dim=1, max_abs=1.0),
            SwooshR(),
            torch.nn.Conv2d(layer1_channels, layer2_channels, 3, stride=2),
            Balancer(layer2_channels, channel_dim=1, max_abs=4.0),
            SwooshR(),
            torch.nn.Conv2d(layer2_channels, layer3_channels, 3, stride=(1, 2)),
            Balancer(layer3_channels, channel_dim=1, max_abs=4.0),
            SwooshR(),
        )
        self.convnext = ConvNeXt(layer3_channels, kernel_size=(7, 7))
        self.out_width = ((in_channels - 1) // 2 - 1) // 2
        self.layer3_channels = layer3_channels
        self.out = Linear(self.out_width * layer3_channels, out_channels)
        self.out_whiten = Whiten(
            num_groups=1,
            whitening_limit=ScheduledFloat((0.0, 4.0), (20000.0, 8.0), default=4.0),
            prob=(0.025, 0.25),
            grad_scale=0.02,
        )
        self.out_norm = BiasNorm(out_channels)
        self.dropout = Dropout3(dropout, shared_dim=1)

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        x = x.unsqueeze(1)
        if _runs_channels_last(self, x):
            # With one channel, contiguous(memory_format=...) would return x itself and conv would stay in NCHW.
            x = x.to(memory_format=torch.channels_last)
            x = _convolved(self.conv, x)
        else:
            x = self.conv(x)
        x = self.convnext(x)
        y = _dropped(self, self.out_norm(self.out_whiten(_projected(self.out, x))))
        return y, _lengths(y, (x_lens - 7) // 2)

    def streaming_forward(
        self, x: Tensor, x_lens: Tensor, cached_left_pad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, time, features), one chunk -> (batch, (time - 7) // 2 - 3, channels), lengths, and cached_left_pad
        for the next chunk. The last 3 frames after subsampling serve only as future context.
        """
        x, cached_left_pad = self.convnext.streaming_forward(self.conv(x.unsqueeze(1)), cached_left_pad)
        y = self.out_norm(self.out(_frames(x)))
        return y, _lengths(y, (x_lens - 7) // 2 - self.convnext.padding[0]), cached_left_pad

    def get_init_states(self, batch_size: int = 1, device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008 (immutable)
        """Returns the first cached_left_pad, (batch_size, layer3_channels, left padding, frequencies)."""
        shape = batch_size, self.layer3_channels, self.convnext.padding[0], self.out_width
        return torch.zeros(shape, dtype=self.out.weight.dtype, device=device)


class _Convolution(Function):
    """A Conv2d of maps whose channels are last, where the gradient of the weight may take another layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.sizes
        needs = ctx.needs_input_grad[:3]
        return *_gemm.conv2d_grads(grad, x, weight, stride, padding, needs), None, None


def _convolved(modules: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns ``modules(x)`` of modules without hooks."""
    cast = torch.is_autocast_enabled("cpu") or x.dtype is not torch.float32
    if cast or not x.is_cpu or not torch.is_grad_enabled() or not is_plain(modules, torch.nn.Sequential):
        return modules(x)
    for module in modules:
        if x.requires_grad and _is_simple(module):
            x = _Convolution.apply(x, module.weight, module.bias, module.stride, module.padding)
        else:
            x = module(x)
    return x


def _is_simple(module: torch.nn.Module) -> TypeGuard[torch.nn.Conv2d]:
    """Says whether the module is a plain Conv2d in one group without dilation."""
    return (
        is_plain(module, torch.nn.Conv2d)
        and "_conv_forward" not in vars(module)
        and (module.groups, module.dilation, module.padding_mode) == (1, (1, 1), "zeros")
        and isinstance(module.padding, tuple)
    )


def _frames(x: Tensor) -> Tensor:
    """(batch, channels, time, frequency) -> (batch, time, channels * frequency)"""
    return x.transpose(1, 2).flatten(2)


def _projected(out: Any, x: Tensor) -> Tensor:
    """Returns ``out(_frames(x))``. Where x has channels last and there are many frames, the columns of the weight are
    reordered in place of the frames, which would be a slow pass over more memory, and one more for their gradient."""
    batch, channels, time, frequency = x.shape
    maps = x.permute(0, 2, 3, 1)
    plain = is_plain(out, torch.nn.Linear, Linear)
    # a compiler reorders by itself; weights of fewer bits are known by the parameter
    kept = not plain or torch.compiler.is_compiling() or is_transformed()
    kept = kept or _reduced_weights.of(x, out.weight) is not None
    if kept or not maps.is_contiguous() or batch * time <= 2 * out.out_features:
        return out(_frames(x))
    weight = out.weight.unflatten(1, (channels, frequency)).transpose(1, 2).flatten(1)
    return ops.linear(maps.flatten(2), weight, out.bias)


def _dropped(front_end: Conv2dSubsampling, y: Tensor) -> Tensor:
    """Runs the dropout; while the call is recorded by our code, which leaves the rate to the host."""
    dropout = front_end.dropout
    if recording() is not None and is_plain_named(dropout, ("Dropout3",), front_end):
        return Dropout3.forward(dropout, y)
    return dropout(y)


def _lengths(y: Tensor, lengths: Tensor) -> Tensor:
    # a replay's host compares the lengths that it has; a compiler would break its graph to read them
    if recording() is not None or torch.compiler.is_compiling():
        return lengths
    longest = lengths.max().item()
    assert y.shape[1] == longest, f"{y.shape[1]} frames, and the longest length is {longest}"
    return lengths


def _runs_channels_last(embed: Conv2dSubsampling, x: Tensor) -> bool:
    weight = next(embed.conv.parameters(), None)  # conv may have been replaced
    if weight is None or not _runs_by_rows(x, weight):
        return False
    if any_watched((*embed.conv.modules(), *embed.convnext.modules())):  # these would see the layout
        return False
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return x.is_cpu or cast in _SHORT


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
        if not _has_plain_parts(self):
            return _by_submodules(self, x, mask)
        if is_plain_inference(self, x, self.pointwise_conv1.weight, 4):
            return _in_blocks(self, x)
        if x.dim() == 4 and _runs_by_rows(x, self.pointwise_conv1.weight):
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
            and _has_plain_parts(self)
            and _runs_by_rows(x, self.pointwise_conv1.weight)
        ):
            y = _contracted(self, _hidden_rows(self, extended.permute(0, 2, 3, 1), padding))
        else:
            conv = self.depthwise_conv
            h = F.conv2d(extended, conv.weight, conv.bias, padding=padding, groups=conv.groups)
            y = self.pointwise_conv2(self.activation(self.hidden_balancer(self.pointwise_conv1(h))))
        return x[:, :, :frames] + y, cache


def _layerdrop_mask(layer: ConvNeXt, x: Tensor) -> Tensor | None:
    """Returns booleans (batch, 1, 1, 1), False where the layer is dropped; None at rate 0."""
    share = rate(layer.layerdrop_rate)
    if is_zero(share):
        return None
    return torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device) > share


def _by_submodules(layer: ConvNeXt, x: Tensor, mask: Tensor | None) -> Tensor:
    hidden = layer.hidden_balancer(layer.pointwise_conv1(layer.depthwise_conv(x)))
    return _residual(layer, x, layer.pointwise_conv2(layer.activation(hidden)), mask)


def _residual(layer: ConvNeXt, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    y = layer.out_balancer(x + y if mask is None else torch.addcmul(x, y, mask.to(y.dtype)))
    if y.requires_grad:  # the whitening works on the last dimension
        y = layer.out_whiten(y.transpose(1, 3)).transpose(1, 3)
    return y


def _has_plain_parts(layer: ConvNeXt) -> bool:
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


def _runs_by_rows(x: Tensor, weight: Tensor) -> bool:
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
