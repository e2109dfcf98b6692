# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention over several heads, on torch's kernels.

    S = Q K^T / sqrt(head_dim),   out = out_proj(softmax(S, masked) V)

A penalty in the gradient pushes scores beyond ±50 back: it adds 1e-4 sign(S) [|S| > 50] to dS. torch's kernels do not
return S, so the penalty is a separate function of Q and K, the sum of 1e-4 |S| [|S| > 50]. Its backward pass computes S
only if the largest norms of Q and K allow such a score.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr._transforms import Function
from fastasr.models.zipformer.gradient_scale import draw_for_log

SCORE_LIMIT = 50.0
SCORE_PENALTY = 1.0e-4


class _PenalizeScores(Function):
    """q -> q. The backward pass adds the gradients of the penalty on large scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale = scale
        return q.view_as(q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k = ctx.saved_tensors
        if q.device.type == "cpu" and not _may_exceed(q, k, ctx.scale):
            return grad, None, None
        scores = (q @ k.transpose(-1, -2)) * ctx.scale
        push = (scores.sign() * (scores.abs() > SCORE_LIMIT)) * (SCORE_PENALTY * ctx.scale)  # [B, H, T, S]
        return grad + push @ k, push.transpose(-1, -2) @ q, None


def _may_exceed(q: Tensor, k: Tensor, scale: float) -> bool:
    """Says whether a score can exceed the limit. By the Cauchy-Schwarz inequality no score exceeds the norms'
    product.
    """
    if q.numel() == 0 or k.numel() == 0:
        return False
    return float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * scale > 0.99 * SCORE_LIMIT


class MultiHeadAttention(torch.nn.Module):
    """query (target, batch, embed_dim), key and value (source, batch, memory_dim) -> (target, batch, embed_dim).

    Args:
        embed_dim: width of query and output.
        attention_dim: width of all heads together; a multiple of ``num_heads``.
        memory_dim: width of key and value; ``embed_dim`` by default.
        dropout: dropout rate of the attention weights in training.
    """

    def __init__(
        self,
        embed_dim: int,
        attention_dim: int,
        num_heads: int,
        memory_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if attention_dim % num_heads:
            raise ValueError(
                f"MultiHeadAttention: attention_dim must be a multiple of num_heads, "
                f"got {attention_dim} and {num_heads}"
            )
        memory_dim = embed_dim if memory_dim is None else memory_dim
        self.embed_dim = embed_dim
        self.attention_dim = attention_dim
        self.num_heads = num_heads
        self.head_dim = attention_dim // num_heads
        self.dropout = dropout
        self.name = None  # training code sets the name for its log
        self.linear_q = torch.nn.Linear(embed_dim, attention_dim)
        self.linear_k = torch.nn.Linear(memory_dim, attention_dim)
        self.linear_v = torch.nn.Linear(memory_dim, attention_dim)
        self.out_proj = torch.nn.Linear(attention_dim, embed_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The masks key_padding_mask (batch, source) and attn_mask (batch, 1 or target, source) are True at hidden
        sources. A target that sees no source gets the bias of ``out_proj``.
        """
        q = self._heads(self.linear_q(query))
        k = self._heads(self.linear_k(key))
        v = self._heads(self.linear_v(value))
        seen = self._seen(q, k, key_padding_mask, attn_mask)
        draw_for_log()
        if q.requires_grad:
            q = _PenalizeScores.apply(q, k, 1 / math.sqrt(self.head_dim))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)  # [B, H, T, D]
        return self.out_proj(out.permute(2, 0, 1, 3).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(time, batch, heads * head_dim) -> (batch, heads, time, head_dim)"""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

    def _seen(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        batch, _, target, _ = q.shape
        source = k.shape[2]
        hidden = None
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, source):
                raise ValueError(
                    f"MultiHeadAttention: key_padding_mask must have shape {(batch, source)}, "
                    f"got {tuple(key_padding_mask.shape)}"
                )
            hidden = key_padding_mask[:, None, None]
        if attn_mask is not None:
            if attn_mask.shape not in ((batch, 1, source), (batch, target, source)):
                raise ValueError(
                    f"MultiHeadAttention: attn_mask must have shape {(batch, 1, source)} or "
                    f"{(batch, target, source)}, got {tuple(attn_mask.shape)}"
                )
            hidden = attn_mask.unsqueeze(1) if hidden is None else hidden | attn_mask.unsqueeze(1)
        return None if hidden is None else ~hidden
