# SPDX-License-Identifier: Apache-2.0
"""The convolution module: a gated projection, a depthwise convolution over time and an output projection.

    x, s = halves of in_proj(z)
    h    = x sigmoid(s), zero where the frame is padding
    y    = out_proj(whiten(conv(h)))                        out_proj: SwooshR, dropout, linear layer

Activations are (time, batch, channels). ``fastasr.ops.gated_depthwise_conv`` computes conv(h) from the projection, in
inference with SwooshR, and keeps only the projection for the backward pass. The modules that act on gradients alone run
where upstream runs them: balancer1 on s, balancer2 and whiten on the convolution's output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.models.common.linear import Linear
from fastasr.models.common.plain import any_watched, is_plain, is_plain_named, runs
from fastasr.models.common.ragged import Packing, current
from fastasr.models.zipformer.activations import ActivationDropoutAndLinear
from fastasr.models.zipformer.autograd_graph import is_same
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.chunk_causal_convolution import ChunkCausalDepthwiseConv1d
from fastasr.models.zipformer.decisions import on_columns
from fastasr.models.zipformer.identity import Identity
from fastasr.models.zipformer.schedules import ScheduledFloat, whitening_schedule
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops._register import autocast_dtype

REGULARISERS = ("Balancer", "Whiten", "Identity")  # they return their input and act on gradients


class ConvolutionModule(torch.nn.Module):
    """x (time, batch, channels) -> same shape. src_key_padding_mask (batch, time): True where x is padding.

    ``forward`` and ``streaming_forward`` are written for modules with the submodules in_proj, balancer1, activation1,
    sigmoid, activation2, depthwise_conv, balancer2, whiten and out_proj, and ``causal``. A ``chunk_size`` of 0 or more
    is passed to a causal depthwise_conv. balancer2 and whiten act on gradients only and are left out if no gradient is
    needed. Submodules with hooks or of another class than here are called one by one.

    Raises ValueError for an even kernel_size, AssertionError for a chunk_size of 0 or more without ``causal``.
    """

    def __init__(self, channels: int, kernel_size: int, causal: bool) -> None:
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
            self.depthwise_conv: Any = ChunkCausalDepthwiseConv1d(channels, kernel_size)
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

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None, chunk_size: int = -1) -> Tensor:
        h = self.in_proj(x)
        weights = kernel_weights(self, h, src_key_padding_mask, chunk_size)
        packing = current()
        if weights is None:
            if isinstance(packing, Packing):
                y = packing.over_time(lambda h, hidden: _by_submodules(self, h, hidden, chunk_size), h)
            else:
                y = _by_submodules(self, h, src_key_padding_mask, chunk_size)
            return self.out_proj(y)
        options: dict[str, Any] = {"chunk_size": chunk_size}
        if packing is None:
            options["padding_mask"] = _of_batch(src_key_padding_mask, h)
        else:
            options["starts"] = packing.starts
        if not _needs_gradients(h, *weights) and _is_swoosh_r_and_linear(self.out_proj):
            y = ops.gated_depthwise_conv(h, *weights, **options)
            return ops.linear(y, self.out_proj.weight, self.out_proj.bias)
        h = _with_balanced_gate(self, h)
        y = ops.gated_depthwise_conv(h, *weights, **options, activation="identity")
        if y.requires_grad:
            y = y.permute(1, 2, 0)
            if y.dtype is torch.float64:  # upstream's regularisers sum it in float32 in the order of memory
                y = y.contiguous()
            y = self.whiten(self.balancer2(y).permute(2, 0, 1))
        return self.out_proj(y)

    def streaming_forward(
        self, x: Tensor, cache: Tensor, src_key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x, one chunk, cache (batch, channels, kernel_size // 2), the gated input before it -> output of x's shape,
        the cache for the next chunk. The module must be ``causal``.
        """
        h = self.in_proj(x)
        weights = kernel_weights(self, h, src_key_padding_mask, -1)
        if weights is None or not _continues(cache, h, weights):
            return _stream_by_submodules(self, h, cache, src_key_padding_mask)
        fused = not _needs_gradients(h, cache, *weights) and _is_swoosh_r_and_linear(self.out_proj)
        y, cache = ops.gated_depthwise_conv(
            h,
            *weights,
            padding_mask=_of_batch(src_key_padding_mask, h),
            cache=cache,
            activation="swoosh_r" if fused else "identity",
            return_cache=True,
        )
        if fused:
            return ops.linear(y, self.out_proj.weight, self.out_proj.bias), cache
        return self.out_proj(y), cache


def kernel_weights(
    module: ConvolutionModule, h: Tensor, mask: Tensor | None, chunk_size: int
) -> tuple[Any, ...] | None:
    """Returns the tensors of depthwise_conv that ``gated_depthwise_conv`` takes after h. It returns None if the
    submodules must be called one by one: they have hooks, are of another class, or would raise.
    """
    if h.ndim != 3 or chunk_size == 0 or not _fits(mask, h):
        return None
    found = fused_weights(module, h.shape[2] // 2)
    if found is None or (chunk_size > 0 and len(found) == 2):
        return None
    casts = autocast_dtype(h) is not None
    return found if casts or all(t is None or t.dtype == h.dtype for t in found) else None


def fused_weights(module: ConvolutionModule, channels: int) -> tuple[Any, ...] | None:
    """Returns the tensors of depthwise_conv that ``gated_depthwise_conv`` takes, or None if no call of the module can
    use it."""
    if not _has_plain_parts(module):
        return None
    conv = module.depthwise_conv
    if type(conv) is torch.nn.Conv1d:
        taps = conv.kernel_size[0]
        plain = taps % 2 == 1 and _is_depthwise(conv, channels, taps, taps // 2)
        return (conv.weight, conv.bias) if plain else None
    if not is_plain_named(conv, ("ChunkCausalDepthwiseConv1d",), module):
        return None
    taps, inner, causal = conv.kernel_size, conv.chunkwise_conv, conv.causal_conv
    if not _is_depthwise(inner, channels, taps, taps // 2) or not _is_depthwise(
        causal, channels, taps // 2 + 1, 0
    ):
        return None
    return inner.weight, inner.bias, causal.weight, causal.bias, conv.chunkwise_conv_scale


def _is_depthwise(conv: torch.nn.Module, channels: int, taps: int, padding: int) -> bool:
    return (
        is_plain(conv, torch.nn.Conv1d)
        and tuple(conv.weight.shape) == (channels, 1, taps)
        and (conv.stride, conv.dilation, conv.padding) == ((1,), (1,), (padding,))
        and (conv.groups, conv.padding_mode) == (channels, "zeros")
        and "_conv_forward" not in vars(conv)
    )


def _has_plain_parts(module: ConvolutionModule) -> bool:
    """Says whether the identities, regularisers and the sigmoid are what their names say, and no child has hooks."""
    return (
        is_plain(module.sigmoid, torch.nn.Sigmoid)
        and all(is_plain_named(m, ("Identity",), module) for m in (module.activation1, module.activation2))
        and all(
            is_plain_named(m, REGULARISERS, module)
            for m in (module.balancer1, module.balancer2, module.whiten)
        )
        and not any_watched((module.in_proj, module.depthwise_conv, module.out_proj))
    )


def _fits(mask: Tensor | None, h: Tensor) -> bool:
    """Says whether the mask is (batch, time) or one for the whole batch. The submodules raise for other shapes."""
    frames, batch = h.shape[0], h.shape[1]
    return mask is None or (mask.ndim == 2 and mask.shape[0] in (1, batch) and mask.shape[1] == frames)


def _of_batch(mask: Tensor | None, h: Tensor) -> Tensor | None:
    """Returns the mask as the kernel reads it: the masks of stacks at lower rates are strided."""
    return None if mask is None else mask.to(torch.bool).expand(h.shape[1], h.shape[0]).contiguous()


def _continues(cache: Tensor, h: Tensor, weights: Sequence[Any]) -> bool:
    """Says whether the cache fits h. With one tap there is nothing to cache, but upstream then caches all frames."""
    taps = weights[0].shape[-1]
    return (
        len(weights) > 2
        and taps > 1
        and tuple(cache.shape) == (h.shape[1], h.shape[2] // 2, taps // 2)
        and (cache.dtype == h.dtype or autocast_dtype(h) is not None)
    )


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_swoosh_r_and_linear(out_proj: ActivationDropoutAndLinear) -> bool:
    """Says whether ``out_proj`` runs our code in eval mode with SwooshR, which the convolution's kernel can then
    apply.
    """
    if torch.compiler.is_compiling() or out_proj.training:
        return False
    return runs(out_proj, ActivationDropoutAndLinear.forward) and out_proj.activation == "SwooshR"


class _Joined(Function):
    """Returns h, whose halves are x and s. The backward pass gives the gradients of the halves to x and s."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, s: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.chunk(2, dim=-1)


def _with_balanced_gate(module: ConvolutionModule, h: Tensor) -> Tensor:
    """Returns h = (x, s) after balancer1 of s, which acts on gradients alone."""
    if not (torch.is_grad_enabled() and h.requires_grad):
        return h
    if recording() is not None and runs(module.balancer1, Balancer.forward):
        return on_columns(module.balancer1, h, h.shape[2] // 2, h.shape[2])
    x, s = h.chunk(2, dim=2)
    balanced = module.balancer1(s)
    return h if is_same(balanced, s) else _Joined.apply(h.detach(), x, balanced)


def _by_submodules(module: ConvolutionModule, h: Tensor, mask: Tensor | None, chunk_size: int) -> Tensor:
    x, s = h.chunk(2, dim=2)
    s = module.sigmoid(module.balancer1(s))
    h = module.activation2(module.activation1(x) * s)
    h = _masked(h.permute(1, 2, 0), mask)
    if chunk_size >= 0:
        assert module.causal, f"chunk_size is {chunk_size}, and the module is not causal"
        y = module.depthwise_conv(h, chunk_size=chunk_size)
    else:
        y = module.depthwise_conv(h)
    return module.whiten(module.balancer2(y).permute(2, 0, 1))


def _stream_by_submodules(
    module: ConvolutionModule, h: Tensor, cache: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, s = h.chunk(2, dim=2)
    h = _masked((x * module.sigmoid(s)).permute(1, 2, 0), mask)
    y, cache = module.depthwise_conv.streaming_forward(h, cache=cache)
    return module.out_proj(y.permute(2, 0, 1)), cache


def _masked(h: Tensor, mask: Tensor | None) -> Tensor:
    """Returns h (B, C, T) with zeros at padded frames."""
    return h if mask is None else h.masked_fill(mask.to(torch.bool).unsqueeze(1), 0.0)
