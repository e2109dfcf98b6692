# SPDX-License-Identifier: Apache-2.0
"""Attention with Zipformer's relative positions: the arguments that its ops share, and their formula."""

from typing import Annotated, Any

import torch
from torch import Tensor

from fastasr._transforms import Function
from fastasr.ops._op import Arguments, Op
from fastasr.ops._register import autocast_dtype
from fastasr.ops._relative_positions import apart, outside_context, relative_shift, rows_by_offset

MASKED = -1000.0  # a row with nothing to attend to is uniform, not NaN

# Arguments of attention with Zipformer's positions. P is a head's share of x beside q and k.
Projection = Annotated[Tensor, "T B num_heads*P, P >= 2*query_head_dim"]
Positions = Annotated[Tensor, "S R num_heads*(P-2*query_head_dim), (S == 1 or S == B)"] | None
CachedKey = Annotated[Tensor, "L B num_heads*query_head_dim"] | None
PaddingMask = Annotated[Tensor, "B T+L", bool] | None
AttentionMask = Annotated[Tensor, "T T+L | B T T+L", bool] | None
Starts = Annotated[Tensor, "N, N >= 1", torch.int64] | None
Count = Annotated[int, ">= 1"]
ChunkSize = Annotated[int, "-1 or > 0"]
LeftContext = Annotated[int, ">= -1"]
NotNegative = Annotated[float, ">= 0 and < inf"]
Decision = Annotated[Tensor, " | 1", "constant"] | None  # one number on the device: no where it is 0


def check_recordings(op: Op, a: Arguments) -> None:
    """Refuses a cache with ``starts``, and a table of positions of other rows."""
    frames, left = a.x.shape[0], 0 if a.cached_key is None else a.cached_key.shape[0]
    if a.starts is not None and left:
        op.fail("cached_key", "none with starts", tuple(a.cached_key.shape))
    if a.pos is None:
        return
    rows, most = a.pos.shape[1], frames and 2 * frames - 1 + left
    if a.starts is None and rows != most:
        op.fail("pos", f"{most} rows", tuple(a.pos.shape))
    if a.starts is not None and (rows > most or rows % 2 == 0) and rows != most:
        op.fail("pos", f"an odd number of rows up to {most}", tuple(a.pos.shape))


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
    rows = pos.transpose(0, 1)
    if cached_key is None and len(rows) < 2 * len(x) - 1:  # recordings in a row, see ``separate``
        rows = rows_by_offset(rows, len(x), len(x), (len(rows) // 2, len(rows) // 2))
    by_offset = torch.matmul(by_head(p), by_head(rows).transpose(-1, -2))
    return products + relative_shift(by_offset)


def separate(scores: Tensor, pos: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """Returns (T, T), True where two frames are not in the same recording, or further apart than ``pos`` has rows."""
    if starts is None or not scores.numel():
        return None
    hidden = apart(starts, scores.shape[-1])
    if pos is None:
        return hidden
    reach = pos.shape[1] // 2
    return hidden | outside_context(scores, (reach, reach), 1)


def outside_chunks(
    scores: Tensor, chunk_size: int, left_context_chunks: int, starts: Tensor | None = None
) -> Tensor:
    """Returns (T, left + T), True where a key is neither in a query's chunk nor in the earlier chunks that it sees.
    Chunks count from the first frame, of the recording where there are ``starts``.
    """
    frames, keys = scores.shape[-2:]
    query, key = (
        torch.arange(n, frames, device=scores.device, dtype=torch.int64) for n in (0, frames - keys)
    )
    if starts is not None:
        begun = torch.where(starts <= query[:, None], starts, 0).amax(1).clamp(min=0)
        query, key = query - begun, key - begun
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


def penalised(
    s: Tensor, hidden: Tensor | None, penalty: float, limit: float, act: Tensor | None = None
) -> Tensor:
    """Returns the scores, whose gradient gets the penalty unless ``act`` is 0, but not where ``hidden`` (what
    ``separate`` returns) is True.
    """
    if not penalty:
        return s
    s = s if hidden is None else s.masked_fill(hidden, 0)
    return Penalty.apply(s, penalty if act is None else penalty * (act != 0).to(s.dtype), limit)


def equalised(weights: Tensor) -> Tensor:
    """Returns [W > 0] / (number of W > 0 in the row), a constant; 0 in rows without any."""
    seen = weights.detach() > 0
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    return (seen / count.to(torch.promote_types(weights.dtype, torch.float32))).to(weights.dtype)


def softmax(
    s: Tensor,
    x: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    chunk_size: int,
    left_context_chunks: int,
    starts: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Returns the weights of scores, in the dtype that x asks for; ``hidden`` is what ``separate`` returns."""
    padding = None if key_padding_mask is None else key_padding_mask[:, None]
    chunks = None if chunk_size < 0 else outside_chunks(s, chunk_size, left_context_chunks, starts)
    for mask in (chunks, attn_mask, padding):
        s = s if mask is None else s.masked_fill(mask, MASKED)
    if hidden is None:
        weights = s.softmax(-1)
    else:
        nothing = hidden.all(-1, keepdim=True)  # a row of -inf would be NaN
        s = s.masked_fill(hidden, -torch.inf).masked_fill(nothing, 0)
        weights = s.softmax(-1).masked_fill(hidden, 0)
    return weights.to(autocast_dtype(x) or s.dtype) if x.dtype != torch.float64 else weights
