# SPDX-License-Identifier: Apache-2.0
"""Attention with Zipformer's relative positions: the arguments that its ops share, and their formula."""

from typing import Annotated, Any

import torch
from torch import Tensor

from fastasr._transforms import Function
from fastasr.ops._register import autocast_dtype
from fastasr.ops._relative_positions import relative_shift

MASKED = -1000.0  # a row with nothing to attend to is uniform, not NaN

# Arguments of attention with Zipformer's positions. P is a head's share of x beside q and k.
Projection = Annotated[Tensor, "T B num_heads*P, P >= 2*query_head_dim"]
_OFFSETS = "(T and 2*T-1+L) num_heads*(P-2*query_head_dim)"
Positions = Annotated[Tensor, f"1 {_OFFSETS} | B {_OFFSETS}"] | None
CachedKey = Annotated[Tensor, "L B num_heads*query_head_dim"] | None
PaddingMask = Annotated[Tensor, "B T+L", bool] | None
AttentionMask = Annotated[Tensor, "T T+L | B T T+L", bool] | None
Count = Annotated[int, ">= 1"]
ChunkSize = Annotated[int, "-1 or > 0"]
LeftContext = Annotated[int, ">= -1"]


def scores(x: Tensor, pos: Tensor | None, cached_key: Tensor | None, heads: int, dim: int) -> Tensor:
    """Returns (H, B, T, left + T), before the masks."""

    def by_head(t: Tensor) -> Tensor:  # (rows, B, H·d) -> (H, B, rows, d)
        return t.reshape(*t.shape[:2], heads, t.shape[2] // heads).permute(2, 1, 0, 3)

    q, k, p = x.split([heads * dim, heads * dim, x.shape[2] - 2 * heads * dim], -1)
    if cached_key is not None:
        k = torch.cat([cached_key.to(k.dtype), k])
    products = torch.matmul(by_head(q), by_head(k).transpose(-1, -2))
    if pos is None or not products.numel():
        return products if pos is None else products + 0 * (p.sum() + pos.sum())
    by_offset = torch.matmul(by_head(p), by_head(pos.transpose(0, 1)).transpose(-1, -2))
    return products + relative_shift(by_offset)


def outside_chunks(scores: Tensor, chunk_size: int, left_context_chunks: int) -> Tensor:
    """Returns (T, left + T), True where a key is neither in a query's chunk nor in the earlier chunks that it sees."""
    frames, keys = scores.shape[-2:]
    query, key = (
        torch.arange(n, frames, device=scores.device, dtype=torch.int64) for n in (0, frames - keys)
    )
    query, key = (torch.div(t, chunk_size, rounding_mode="floor") for t in (query[:, None], key))
    hidden = key > query
    return hidden if left_context_chunks < 0 else hidden | (key < query - left_context_chunks)


class Penalty(Function):
    """Passes scores through unchanged; their gradient gets penalty · sign(s) where |s| > limit."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, penalty: float | Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.penalty, ctx.limit = penalty, limit
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scores,) = ctx.saved_tensors
        return grad + ctx.penalty * (scores.sign() * (scores.abs() > ctx.limit)), None, None


def softmax(
    s: Tensor,
    x: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    chunk_size: int,
    left_context_chunks: int,
) -> Tensor:
    """Returns the weights of scores, in the dtype that x asks for."""
    padding = None if key_padding_mask is None else key_padding_mask[:, None]
    chunks = None if chunk_size < 0 else outside_chunks(s, chunk_size, left_context_chunks)
    for mask in (chunks, attn_mask, padding):
        s = s if mask is None else s.masked_fill(mask, MASKED)
    weights = s.softmax(-1)
    return weights.to(autocast_dtype(x) or s.dtype) if x.dtype != torch.float64 else weights
