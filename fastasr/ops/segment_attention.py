# SPDX-License-Identifier: Apache-2.0
r"""Attention of the Emformer (Shi et al., 2021): segments that see memory, right context, left context and themselves.

An utterance of T frames is cut into n segments of S frames, the last one maybe shorter. Queries and keys are

    queries  [right-context blocks (n R) | utterance (T) | summaries (n)]
    keys     [memory (m + n − 1) | right-context blocks (n R) | left context (l) | utterance (T)]

with summaries and the n − 1 memory rows only where M > 0. The m rows of memory and the l frames of left context are
the past of a stream. The queries of segment s, its block of right context and its summary see

    memory [m + s − M, m + s)    right context [s R, (s + 1) R)    l + utterance [l + s S − L, l + (s + 1) S)

as far as there are such rows; summaries see no memory, and nobody sees frames beyond a sequence's length. With
P = softmax(q kᵀ / √d) over what is seen: y = (P ⊙ dropout) v. A query that sees nothing gives 0.

With dP = (g vᵀ) ⊙ dropout: dS = P (dP − Σ P dP), dq = dS k / √d, dk = dSᵀ q / √d, dv = (P ⊙ dropout)ᵀ g.

Upstream: ``_EmformerAttention`` in ``torchaudio.models.emformer``, between its projections. It computes all scores and
hides those that are not seen behind −1e8: 93 % of them at T = 400, S = 16, R = 4, L = 30. Here no score outside a
segment's window is formed except at the edges of tiles, and there is no mask.
"""

from typing import Annotated

import torch
from torch import Tensor

from fastasr.ops._op import OPS, Arguments, Op, op
from fastasr.ops._segments import hidden_lanes, key_rows, query_rows, rows_of


# --------------------------------------------------------------------------- parts
def _sizes(a: Arguments) -> tuple[int, int, int]:
    """Returns the rows of queries and of keys, and the lanes of a window."""
    memory, right, segment = a.max_memory_size, a.right_context_length, a.segment_length
    if a.past_memory and not memory:
        OPS["segment_attention"].fail("past_memory", "0 without memory", a.past_memory)
    rows = rows_of(a.frames, segment, right, memory, a.past_frames, a.past_memory)
    return *rows, memory + right + a.left_context_length + segment


def _query_rows(op: Op, a: Arguments) -> None:
    queries, batch, width = a.query.shape
    if queries != _sizes(a)[0]:
        op.fail("query", f"shape {(_sizes(a)[0], batch, width)}", tuple(a.query.shape))


Size = Annotated[int, ">= 0"]


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    one_dtype="query key value",
    sizes={"Q K lanes": _sizes},
    check=_query_rows,
    strides={
        **dict.fromkeys(("query", "key", "value", "grad"), "channels"),
        **dict.fromkeys(("lengths", "history"), "int64"),
    },
)
def segment_attention(
    query: Annotated[Tensor, "N B num_heads*D, D >= 1"],
    key: Annotated[Tensor, "K B num_heads*D"],
    value: Annotated[Tensor, "K B num_heads*D"],
    *,
    num_heads: Annotated[int, ">= 1"],
    frames: Size,
    segment_length: Annotated[int, ">= 1"],
    left_context_length: Size = 0,
    right_context_length: Size = 0,
    max_memory_size: Size = 0,
    past_frames: Size = 0,
    past_memory: Size = 0,
    lengths: Annotated[Tensor, "B", int] | None = None,
    history: Annotated[Tensor, "2", int] | None = None,
    weights_dropout: Annotated[Tensor, "B num_heads Q lanes", "constant", "wide"] | None = None,
) -> Annotated[Tensor, "N B num_heads*D", "query"]:
    """The Emformer's attention: every segment over its memory, right context, left context and itself, without a mask.

    Args:
        query: (Q, B, D), Q = n R + T and, where there is memory, n more: right-context blocks, utterance, summaries;
            n = ceil(T / S). float32, bfloat16, float16 or float64. Slices of a projection need no copy.
        key, value: (K, B, D), of query's dtype outside autocast; K = n R + l + T and, where there is memory,
            m + n − 1 more in front: memory, right-context blocks, left context of the past, utterance.
        num_heads: H; d = D / H channels each.
        frames: T. segment_length: S. left_context_length, right_context_length: L, R. max_memory_size: M.
        past_frames, past_memory: l, m: rows of an utterance's past among the keys.
        lengths: (B,) of integers: frames of each sequence that may be seen; default: all.
        history: (2,) of integers: how many of the past frames and of the past memory, counted from the end, may be
            seen; default: all. They are read on the device, so a stream needs no synchronisation.
        weights_dropout: (B, H, Q, M + R + L + S), multiplied on the weights after the softmax: by query and place in
            its window. Bool or floating, a constant.
    Returns:
        (Q, B, D) in query's dtype; 0 for a query that sees no key.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: sizes, shapes or devices do not match.
    """
    batch, width, memory = query.shape[1], query.shape[2] // num_heads, max_memory_size
    rows = query_rows(frames, segment_length, right_context_length, memory, query.device)
    at, position, there = key_rows(
        frames, segment_length, left_context_length, right_context_length, memory, past_frames, past_memory,
        query.device,
    )  # fmt: skip

    def windows(t: Tensor, at: Tensor) -> Tensor:  # (rows, B, H·d) -> (B, H, n, rows of a window, d)
        t = t.index_select(0, at.clamp(min=0).flatten())
        return t.reshape(*at.shape, batch, num_heads, width).permute(2, 3, 0, 1, 4)

    at = torch.where(there, at, 0)
    gone = hidden_lanes(position, there, lengths, history, right_context_length, memory)[:, None, :, None]
    hidden = gone
    if memory:  # the summary, a window's last query, does not see them
        summary = (
            torch.arange(rows.shape[1], device=query.device, dtype=torch.int64)[:, None] == rows.shape[1] - 1
        )
        hidden = gone | (
            summary & (torch.arange(at.shape[1], device=query.device, dtype=torch.int64) < memory)
        )
    scores = torch.matmul(windows(query, rows) * width**-0.5, windows(key, at).transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(hidden, 0).to(value.dtype)
    if weights_dropout is not None:
        kept = weights_dropout.index_select(2, rows.clamp(min=0).flatten())
        weights = weights * kept.reshape(weights.shape).to(weights.dtype)
    # hidden values do not leak, whatever they are
    values = windows(value, at).masked_fill(gone.transpose(-1, -2), 0)
    mixed = torch.matmul(weights, values)
    if memory:
        summary = torch.matmul(weights[..., -1:, memory:], values[..., memory:, :])
        mixed = torch.cat([mixed[..., :-1, :], summary], -2)
    mixed = mixed.permute(2, 3, 0, 1, 4).reshape(rows.numel(), batch, query.shape[2])
    return mixed.index_select(0, rows.flatten().argsort()[rows.numel() - len(query) :])
