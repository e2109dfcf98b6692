# SPDX-License-Identifier: Apache-2.0
"""Computes scores of attention with relative positions, some rows at a time, in O(time) memory. Operations on
unmaterialised weights that have no kernel use it.

    s[h,b,i,j] = q[h,b,i] . k[h,b,j] + p[h,b,i] . R[h, T-1-i+j]
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastasr.ops._relative_positions import relative_shift
from fastasr.ops._zipformer_attention import MASKED

BLOCK_ELEMENTS = 1 << 22  # the most scores in memory at once


class ScoreBlocks:
    """Iterates over (first row, end row, scores (heads, batch, rows, time), the rows' operands) of the first ``heads``
    of ``num_heads`` heads, in float32 or better.

    projected is (time, batch, q | k | p), positions (1 or batch, 2 time - 1, num_heads * dim) or None.
    """

    def __init__(
        self,
        projected: Tensor,
        positions: Tensor | None,
        num_heads: int,
        query_head_dim: int,
        heads: int | None = None,
    ) -> None:
        wide = torch.promote_types(projected.dtype, torch.float32)
        self.frames, self.batch, width = projected.shape
        self.heads = num_heads if heads is None else heads
        dims = (query_head_dim, query_head_dim, width // num_heads - 2 * query_head_dim)
        q, k, p = projected.detach().split([num_heads * dim for dim in dims], -1)
        self.q, self.k, self.p = (
            t.reshape(self.frames, self.batch, num_heads, dim)[:, :, : self.heads]
            .permute(2, 1, 0, 3)
            .to(wide)
            for t, dim in zip((q, k, p), dims, strict=True)
        )  # [H, B, T, dim]
        self.r = None
        if positions is not None and dims[2] > 0:
            r = positions.detach().reshape(*positions.shape[:2], num_heads, dims[2])
            self.r = r[:, :, : self.heads].permute(2, 0, 1, 3).to(wide)  # [H, 1 or B, 2T - 1, dim]

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        rows = max(1, BLOCK_ELEMENTS // max(1, self.heads * self.batch * self.frames))
        for first in range(0, self.frames, rows):
            end = min(first + rows, self.frames)
            scores = torch.matmul(self.q[:, :, first:end], self.k.mT)
            if self.r is not None:
                products = torch.matmul(self.p[:, :, first:end], self.r[:, :, self.offsets(first, end)].mT)
                scores += relative_shift(products)
            yield first, end, scores

    def offsets(self, first: int, end: int) -> slice:
        """Returns the rows of R that the queries [first, end) need."""
        return slice(self.frames - end, 2 * self.frames - 1 - first)


def fill_hidden(
    scores: Tensor,
    first: int,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    chunk_size: int = -1,
    left_context_chunks: int = -1,
) -> Tensor:
    """Sets the hidden scores of (heads, batch, rows, time), whose rows begin at ``first``, to -1000."""
    rows, frames = scores.shape[-2:]
    if chunk_size > 0:
        query = (
            torch.arange(first, first + rows, device=scores.device, dtype=torch.int64)[:, None] // chunk_size
        )
        age = query - torch.arange(frames, device=scores.device, dtype=torch.int64) // chunk_size
        hidden = age < 0 if left_context_chunks < 0 else (age < 0) | (age > left_context_chunks)
        scores = scores.masked_fill(hidden, MASKED)
    if attn_mask is not None:
        scores = scores.masked_fill(attn_mask[..., first : first + rows, :], MASKED)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None], MASKED)
    return scores
