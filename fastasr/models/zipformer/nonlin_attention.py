# SPDX-License-Identifier: Apache-2.0
"""Attention with a nonlinearity before it and a gate after it, on given weights W.

s, v, y = thirds of in_proj(x)
out     = out_proj(W (v tanh(s)) y)

``fastasr.ops.nonlin_attention`` computes everything between the projections. Identity submodules are not called.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.models.common.linear import Linear
from fastasr.models.common.plain import is_plain, is_plain_named, runs
from fastasr.models.common.ragged import current
from fastasr.models.common.row import RowFrames
from fastasr.models.zipformer.autograd_graph import is_same
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.decisions import on_columns
from fastasr.models.zipformer.identity import Identity
from fastasr.models.zipformer.initial_scale import ScaledLinear
from fastasr.models.zipformer.packed_weights import PackedWeights
from fastasr.models.zipformer.schedules import ScheduledFloat, whitening_schedule
from fastasr.models.zipformer.self_attention import Weights, check_cache, check_weights, weighted
from fastasr.models.zipformer.shared_weights import FirstHead
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops import nonlin_attention
from fastasr.ops._nonlin_attention import passes


class NonlinAttention(torch.nn.Module):
    """x (time, batch, channels), attn_weights (heads, batch, time, time) -> x's shape. The layer passes only the first
    head's weights.

    Raises ValueError for weights of another shape.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.in_proj = Linear(channels, hidden_channels * 3)
        self.balancer = Balancer(
            hidden_channels,
            channel_dim=-1,
            min_positive=ScheduledFloat((0.0, 0.25), (20000.0, 0.05)),
            max_positive=ScheduledFloat((0.0, 0.75), (20000.0, 0.95)),
            min_abs=0.5,
            max_abs=5.0,
        )
        self.tanh = torch.nn.Tanh()
        self.identity1 = Identity()
        self.identity2 = Identity()
        self.identity3 = Identity()
        self.out_proj = ScaledLinear(hidden_channels, channels, initial_scale=0.05)
        self.whiten1 = Whiten(
            num_groups=1, whitening_limit=whitening_schedule(5.0), prob=(0.025, 0.25), grad_scale=0.01
        )
        self.whiten2 = Whiten(
            num_groups=1,
            whitening_limit=whitening_schedule(5.0, ratio=3.0),
            prob=(0.025, 0.25),
            grad_scale=0.01,
        )

    def forward(self, x: Tensor, attn_weights: Weights) -> Tensor:
        check_weights("NonlinAttention", attn_weights, x, x.shape[0])
        projected = self.in_proj(x)
        parts = projected.chunk(3, dim=2)
        s, v, y = parts
        if not is_plain_gate(self):
            v = self.identity1(self.tanh(self.balancer(s)) * self.whiten1(v))
            y = self.identity3(weighted(attn_weights, v) * self.identity2(y))
            return self.whiten2(self.out_proj(y))
        regularisers = (self.balancer, Balancer), (self.whiten1, Whiten)
        if recording() is not None and all(runs(m, cls.forward) for m, cls in regularisers):
            width = s.shape[-1]
            for i, (m, _) in enumerate(regularisers):
                projected = on_columns(m, projected, i * width, (i + 1) * width)
            after = parts = projected.chunk(3, dim=2)
        else:
            after = self.balancer(s), self.whiten1(v), y
        packed = isinstance(attn_weights, PackedWeights | FirstHead) and attn_weights.in_memory
        in_memory = len(attn_weights) == 1 and (packed or isinstance(attn_weights, Tensor))
        on_row = isinstance(current(), RowFrames)
        if not (in_memory or on_row):
            s, v, y = after
            y = weighted(attn_weights, v * torch.tanh(s)) * y
        else:
            if not all(map(is_same, after, parts)):
                projected = torch.cat(after, -1)
            if on_row:
                y = _gated(attn_weights, projected)
            else:
                y = attn_weights.gated(projected) if packed else nonlin_attention(attn_weights[0], projected)
        return self.whiten2(self.out_proj(y))

    def streaming_forward(
        self, x: Tensor, attn_weights: Tensor, cached_x: Tensor, left_context_len: int
    ) -> tuple[Tensor, Tensor]:
        """attn_weights (heads, batch, time, left_context_len + time), cached_x (heads, batch,
        left_context_len, hidden_channels / heads) -> output of x's shape, the cache for the next chunk.
        """
        check_weights("NonlinAttention", attn_weights, x, left_context_len + x.shape[0])
        check_cache("NonlinAttention", "cached_x", cached_x.shape[2], left_context_len)
        s, v, y = self.in_proj(x).chunk(3, dim=2)
        frames, batch, _ = v.shape
        v = (v * self.tanh(s)).reshape(frames, batch, attn_weights.shape[0], -1).permute(2, 1, 0, 3)
        v = torch.cat([cached_x, v], dim=2)  # [H, B, L + T, dim]
        cached_x = v[:, :, v.shape[2] - left_context_len :]
        v = (attn_weights @ v).permute(2, 1, 0, 3).flatten(2)
        return self.out_proj(v * y), cached_x


class _Kept:
    """What the backward pass of the product leaves for that of the gate."""

    grad: Tensor | None = None
    o: Tensor


class _Gate(Function):
    """projected (N, 1, 3 channels) -> v tanh(s), and ``projected`` for the product behind the weighted sum."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, kept: _Kept) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(projected)
        ctx.set_materialize_grads(False)
        ctx.kept = kept
        return passes(projected, projected).forward(projected, len(projected)), projected.view_as(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        (projected,), kept = ctx.saved_tensors, ctx.kept
        if kept.grad is None:
            return None, None
        dx = torch.zeros_like(kept.o) if dx is None else dx
        gradient = passes(projected, projected).gradient
        return gradient(dx.transpose(0, 1), kept.grad, projected, kept.o), None


class _Product(Function):
    """o (N, 1, channels), projected -> o y. The gradient of ``projected`` is left to the gate's backward pass, which
    needs this one's result and writes all of it at once."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, projected: Tensor, kept: _Kept) -> Tensor:
        o = o.to(projected.dtype).transpose(0, 1)
        ctx.save_for_backward(o, projected)
        ctx.kept = kept
        return passes(projected, projected).product(projected, o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        o, projected = ctx.saved_tensors
        # o itself would hold the graph that holds it, for ever
        ctx.kept.grad, ctx.kept.o = grad.contiguous(), o.detach()
        return passes(projected, projected).product(projected, ctx.kept.grad.transpose(0, 1)), None, None


def _gated(attn_weights: Weights, projected: Tensor) -> Tensor:
    """Returns the result of ``ops.nonlin_attention`` for a row, whose weights are not in memory."""
    kept = _Kept()
    x, projected = _Gate.apply(projected.contiguous(), kept)
    return _Product.apply(weighted(attn_weights, x), projected, kept)


def is_plain_gate(module: NonlinAttention) -> bool:
    """Says whether tanh and the identities are what their names say, so that one op computes the gate."""
    identities = module.identity1, module.identity2, module.identity3
    return is_plain(module.tanh, torch.nn.Tanh) and all(
        is_plain_named(m, ("Identity",), module) for m in identities
    )
