# SPDX-License-Identifier: Apache-2.0
"""The penalty on large attention scores when the scores are not in memory.

It adds penalty sign(S) to dS where |S| > limit; dq, dk, dp and dR follow from dS as in attention.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.models.zipformer.decisions import Numbers
from fastasr.models.zipformer.score_blocks import ScoreBlocks
from fastasr.ops import zipformer_attention_weights
from fastasr.ops.zipformer_attention_weights import gradients


class _Penalized(Function):
    """Returns the projection and the positions unchanged. The backward pass adds the penalty's gradient once, for any
    number of consumers of the attention weights."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, positions: Tensor | None, *numbers: Any
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(projected, positions)
        ctx.numbers = numbers
        return projected.view_as(projected), None if positions is None else positions.view_as(positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_positions: Any) -> tuple[Tensor | None, ...]:
        projected, positions = ctx.saved_tensors
        added_positions: Any
        added, added_positions = penalty_gradients(projected, positions, *ctx.numbers)
        if positions is not None:
            grad_positions = grad_positions + added_positions
        return grad + added, grad_positions, None, None, None, None


def penalized(
    projected: Tensor,
    positions: Tensor | None,
    num_heads: int,
    query_head_dim: int,
    penalty: float,
    limit: float,
) -> tuple[Tensor, Tensor | None]:
    """Returns (projected, positions), whose backward pass adds the gradient of the penalty; see the module."""
    return _Penalized.apply(projected, positions, num_heads, query_head_dim, penalty, limit)


class _Recorded(Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        positions: Tensor,
        numbers: Numbers,
        sizes: tuple[int, int],
        penalty: float,
        limit: float,
        masks: Any,
    ) -> Tensor:
        weights = zipformer_attention_weights(projected, positions, *sizes, **masks)
        ctx.dtypes = projected.dtype, positions.dtype
        ctx.save_for_backward(weights, *(t.to(weights.dtype) for t in (projected, positions)))
        ctx.sizes, ctx.masks = sizes, masks
        ctx.penalty = penalty, limit, numbers.values[:1]
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, projected, positions = ctx.saved_tensors
        heads, dim = ctx.sizes
        found = gradients(grad, weights, projected, positions, heads, dim, ctx.masks, *ctx.penalty)
        return (
            *(g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)),
            None,
            None,
            None,
            None,
            None,
        )


def recorded_weights(
    projected: Tensor,
    positions: Tensor,
    numbers: Numbers,
    sizes: tuple[int, int],
    penalty: float,
    limit: float,
    masks: dict[str, Any],
) -> Tensor:
    """Returns the attention weights of a call that is recorded; their gradient has the penalty where the first of
    ``numbers`` is not 0.
    """
    return _Recorded.apply(projected, positions, numbers, sizes, penalty, limit, masks)


def penalty_gradients(
    projected: Tensor,
    positions: Tensor | None,
    num_heads: int,
    query_head_dim: int,
    penalty: float,
    limit: float,
) -> tuple[Tensor, Tensor | None]:
    """Returns the penalty's own gradients of ``projected`` and ``positions`` (None without positions)."""
    blocks = ScoreBlocks(projected, positions, num_heads, query_head_dim)
    dq, dk, dp = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (blocks.q, blocks.k, blocks.p)
    )
    dr = None if blocks.r is None else torch.zeros_like(blocks.r, memory_format=torch.contiguous_format)
    for first, end, scores in blocks:
        ds = penalty * (scores.sign() * (scores.abs() > limit))
        q, p = blocks.q[:, :, first:end], blocks.p[:, :, first:end]
        dq[:, :, first:end] = torch.matmul(ds, blocks.k)
        dk += torch.matmul(ds.mT, q)
        if dr is None or blocks.r is None:
            continue
        offsets = blocks.offsets(first, end)
        ds = _by_offset(ds)
        dp[:, :, first:end] = torch.matmul(ds, blocks.r[:, :, offsets])
        part = torch.matmul(ds.mT, p)
        dr[:, :, offsets] += part if dr.shape[1] == part.shape[1] else part.sum(1, keepdim=True)

    def together(t: Tensor) -> Tensor:  # [H, B, rows, dim] -> [rows, B, H * dim]
        return t.permute(2, 1, 0, 3).flatten(2)

    dprojected = torch.cat([together(dq), together(dk), together(dp)], -1).to(projected.dtype)
    if positions is None:
        return dprojected, None
    dpositions = (
        torch.zeros_like(positions) if dr is None else together(dr).transpose(0, 1).to(positions.dtype)
    )
    return dprojected, dpositions


def _by_offset(by_key: Tensor) -> Tensor:
    """Rearranges gradients (..., rows, keys) by key to (..., rows, rows - 1 + keys) by offset."""
    *outer, rows, keys = by_key.shape
    width = rows - 1 + keys
    out = by_key.new_zeros(*outer, rows, width)
    if rows == 1:
        return out.copy_(by_key)
    out.as_strided(by_key.shape, (*out.stride()[:-2], width - 1, 1), rows - 1).copy_(by_key)
    return out
