# SPDX-License-Identifier: Apache-2.0
"""Attention with given weights W (heads, batch, targets, sources): it projects values, weights and projects them.

y = out_proj(concat over heads of W_h in_proj(x)_h)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.models.common.linear import Linear
from fastasr.models.zipformer.initial_scale import ScaledLinear
from fastasr.models.zipformer.schedules import whitening_schedule
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops._dispatch import Kernels, registered, serves_floats
from fastasr.ops._weighted_values import MOST_CHANNELS, launchers

_OPERATORS = "weighted_values", "weighted_values_backward"

# Attention weights are a Tensor, or an object that stands for one and has ``weighted`` or ``gated``.
Weights = Any


class SelfAttention(torch.nn.Module):
    """x (time, batch, embed_dim), attn_weights (heads, batch, time, time) -> x's shape.

    Raises ValueError for weights of another shape.
    """

    def __init__(self, embed_dim: int, num_heads: int, value_head_dim: int) -> None:
        super().__init__()
        self.in_proj = Linear(embed_dim, num_heads * value_head_dim)
        self.out_proj = ScaledLinear(num_heads * value_head_dim, embed_dim, initial_scale=0.05)
        self.whiten = Whiten(
            num_groups=1,
            whitening_limit=whitening_schedule(7.5, ratio=3.0),
            prob=(0.025, 0.25),
            grad_scale=0.01,
        )

    def forward(self, x: Tensor, attn_weights: Weights) -> Tensor:
        check_weights("SelfAttention", attn_weights, x, x.shape[0])
        return self.whiten(self.out_proj(weighted(attn_weights, self.in_proj(x))))

    def streaming_forward(
        self, x: Tensor, attn_weights: Tensor, cached_val: Tensor, left_context_len: int
    ) -> tuple[Tensor, Tensor]:
        """attn_weights (heads, batch, time, left_context_len + time), cached_val (left_context_len, batch,
        heads * value_head_dim) -> output of x's shape, the cache for the next chunk.
        """
        check_weights("SelfAttention", attn_weights, x, left_context_len + x.shape[0])
        check_cache("SelfAttention", "cached_val", cached_val.shape[0], left_context_len)
        values = torch.cat([cached_val, self.in_proj(x)])
        cached_val = values[values.shape[0] - left_context_len :]
        return self.out_proj(weighted(attn_weights, values)), cached_val


def weighted(attn_weights: Weights, values: Tensor) -> Tensor:
    """W (heads, batch, T, S), values (S, batch, heads * dim) -> (T, batch, heads * dim)."""
    if not isinstance(attn_weights, Tensor):
        return attn_weights.weighted(values)
    heads = attn_weights.shape[0]
    sources, batch, channels = values.shape
    kernels: Kernels | None
    if not _is_native(attn_weights, values):
        kernels = launchers(attn_weights, values)
    else:
        kernels = Kernels("cpu", *(registered("cpu", name) for name in _OPERATORS))
        if not torch.is_grad_enabled() or not (attn_weights.requires_grad or values.requires_grad):
            return kernels.forward(attn_weights, values.contiguous())
        if channels > heads * MOST_CHANNELS:
            kernels = None
    if kernels is not None:
        return _Weighted.apply(attn_weights, values.contiguous(), kernels)
    values = values.reshape(sources, batch, heads, channels // heads).permute(2, 1, 0, 3)  # [H, B, S, dv]
    return (attn_weights @ values).permute(2, 1, 0, 3).flatten(2)


class _Weighted(Function):
    """``weighted`` by kernels for few columns, for which a BLAS is far from its rate."""

    @staticmethod
    def forward(ctx: Any, attn_weights: Tensor, values: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(attn_weights, values)
        ctx.kernels = kernels
        return kernels.forward(attn_weights, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernels.backward(grad.contiguous(), *ctx.saved_tensors), None


def _is_native(weights: Tensor, values: Tensor) -> bool:
    """Says whether the kernels for few columns can be used: float32 on the CPU."""
    return (
        serves_floats(_OPERATORS, weights, values)
        and weights.stride(-1) == 1
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


def check_weights(name: str, attn_weights: Weights, x: Tensor, sources: int) -> None:
    frames, batch, _ = x.shape
    if tuple(attn_weights.shape[1:]) != (batch, frames, sources):
        raise ValueError(
            f"{name}: attn_weights must be (heads, {batch}, {frames}, {sources}), got {tuple(attn_weights.shape)}"
        )


def check_cache(name: str, argument: str, frames: int, left_context_len: int) -> None:
    if frames != left_context_len:
        raise ValueError(f"{name}: {argument} must hold {left_context_len} frames, got {frames}")
