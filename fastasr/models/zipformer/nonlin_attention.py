# SPDX-License-Identifier: Apache-2.0
"""Attention with a nonlinearity before it and a gate after it, on given weights W.

s, v, y = thirds of in_proj(x)
out     = out_proj(W (v tanh(s)) y)

``fastasr.ops.nonlin_attention`` computes everything between the projections. Identity submodules are not called.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastasr._recording import recording
from fastasr.models.common.linear import Linear
from fastasr.models.common.plain import is_plain, is_plain_named, runs
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

if TYPE_CHECKING:
    pass


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

    def forward(
        self,
        x: Tensor,
        attn_weights: Weights,
    ) -> Tensor:
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
        if len(attn_weights) != 1 or not (packed or isinstance(attn_weights, Tensor)):
            s, v, y = after
            y = weighted(attn_weights, v * torch.tanh(s)) * y
        else:
            if not all(map(is_same, after, parts)):
                projected = torch.cat(after, -1)
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


def is_plain_gate(module: NonlinAttention) -> bool:
    """Says whether tanh and the identities are what their names say, so that one op computes the gate."""
    identities = module.identity1, module.identity2, module.identity3
    return is_plain(module.tanh, torch.nn.Tanh) and all(
        is_plain_named(m, ("Identity",), module) for m in identities
    )
