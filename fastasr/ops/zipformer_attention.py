# SPDX-License-Identifier: Apache-2.0
r"""Values weighted by attention with relative positions of Zipformer, without the T×T weights.

    y[t,b,h] = Σ_j W[h,b,t,j] v[j,b,h],  W as in :mod:`fastasr.ops.zipformer_attention_weights`

v holds the values of the first ``value_heads`` heads side by side. With G = dy: dV = Wᵀ G, dW = G Vᵀ, and the rest as
there. W is never stored: forward and backward meet blocks of queries with all keys, O(T) memory for one block, and the
backward pass computes the scores again from the inputs: nothing else is kept.

Zipformer's training gives dS the penalty of large scores on some calls, and replaces W by [W > 0] / Σ_j [W > 0] on
others, which is a constant: dW is 0 there, and dV = Wᵀ G with the new W.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fastasr.ops._dispatch import Kernels
from fastasr.ops._op import Arguments, Needs, Op, Saved, op
from fastasr.ops._runtime import formula_gradients, operand
from fastasr.ops._zipformer_attention import (
    AttentionMask,
    CachedKey,
    ChunkSize,
    Count,
    Decision,
    LeftContext,
    NotNegative,
    PaddingMask,
    Positions,
    Projection,
    Starts,
    check_recordings,
    equalised,
    penalised,
    scores,
    separate,
    softmax,
)

_FORWARD = (
    "x pos value cached_key key_padding_mask attn_mask starts "
    "num_heads query_head_dim (value_heads or num_heads) chunk_size left_context_chunks"
)


def _check(op: Op, a: Arguments) -> None:
    check_recordings(op, a)
    heads = a.value_heads or a.num_heads
    if heads > a.num_heads:
        op.fail("value_heads", f"an int in 1..{a.num_heads}", heads)
    if a.value.shape[2] % heads:
        keys, batch, _ = a.value.shape
        op.fail("value", f"shape ({keys}, {batch}, a multiple of {heads})", tuple(a.value.shape))


# --------------------------------------------------------------------------- kernels
def _fast(
    kernels: Kernels,
    keep: bool,
    x: Tensor,
    pos: Tensor | None,
    value: Tensor,
    num_heads: int,
    query_head_dim: int,
    value_heads: int | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    left_context_chunks: int,
    cached_key: Tensor | None,
    score_penalty: float,
    score_limit: float,
    act: Tensor | None,
    equal: Tensor | None,
) -> Tensor:
    if score_penalty or equal is not None or not x.is_contiguous():
        raise NotImplementedError
    return kernels.forward(
        x, pos, value, cached_key, key_padding_mask, attn_mask, starts, num_heads, query_head_dim,
        value_heads or num_heads, chunk_size, left_context_chunks,
    )  # fmt: skip


def _call(kernels: Kernels, a: Arguments | Saved, dtype: torch.dtype, *grads: Tensor) -> tuple:
    """Returns the arguments of the kernels."""
    work = dtype if kernels.backend == "cpu" else None
    floating, others = (a.x, a.pos, a.value, a.cached_key), (a.key_padding_mask, a.attn_mask, a.starts)
    tensors = *(operand(t, work) for t in (*grads, *floating)), *(operand(t, None) for t in others)
    sizes = a.num_heads, a.query_head_dim, a.value_heads or a.num_heads
    return *tensors, *sizes, a.chunk_size, a.left_context_chunks


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Tensor:
    return op.definition(**a._asdict()) if a.equal is not None else kernels.forward(*_call(kernels, a, dtype))


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], s: Saved, needs: Needs
) -> Sequence[Tensor | None]:
    if s.equal is not None or s.score_penalty:
        return formula_gradients(op, grads, s)
    return kernels.backward(*_call(kernels, s, s.x.dtype, *grads))


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    one_dtype="x pos value cached_key",
    launch=_launch,
    gradients=_gradients,
    fast=_fast,
    forward=_FORWARD,
    backward=f"grad {_FORWARD} -> x pos value cached_key",
    check=_check,
)
def zipformer_attention(
    x: Projection,
    pos: Positions,
    value: Annotated[Tensor, "T+L B E"],
    num_heads: Count,
    query_head_dim: Count,
    *,
    value_heads: Count | None = None,
    key_padding_mask: PaddingMask = None,
    attn_mask: AttentionMask = None,
    starts: Starts = None,
    chunk_size: ChunkSize = -1,
    left_context_chunks: LeftContext = -1,
    cached_key: CachedKey = None,
    score_penalty: NotNegative = 0.0,
    score_limit: NotNegative = 25.0,
    act: Decision = None,
    equal: Decision = None,
) -> Annotated[Tensor, "T B E", "x"]:
    """softmax_j(q[i]·k[j] + p[i]·pos[T−1−i+j]) · value, without the weights in memory.

    Args:
        x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size, left_context_chunks,
            cached_key: as for :func:`fastasr.ops.zipformer_attention_weights`.
        value: (left + T, B, value_heads·dv), of x's dtype.
        value_heads: how many of the heads, from the first on, have values; None: all.
        score_penalty, score_limit: the gradient of every score s of these heads with |s| > score_limit, hidden or not,
            gets score_penalty · sign(s), but for keys of other recordings; values are not changed.
        act: one number on the device of x. If it is 0, there is no penalty.
        equal: one number on the device of x. If it is not 0, the weights are equal on all keys whose weight, rounded to
            the dtype of the weights, is not 0; no gradient but that of the penalty flows to x, pos and cached_key then.
    Returns:
        (T, B, value_heads·dv), of x's dtype (autocast's under autocast), accumulated in float32 or better. A query that
        sees no key gets the mean of all values, of its recording with ``starts``, and 0 if it belongs to none.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; a number is out of range.
    """
    s = scores(x, pos, cached_key, num_heads, query_head_dim)[:value_heads]
    hidden = separate(s, pos, starts)
    s = penalised(s, hidden, score_penalty, score_limit, act)
    weights = softmax(s, x, key_padding_mask, attn_mask, chunk_size, left_context_chunks, starts, hidden)
    if equal is not None:
        weights = torch.where(equal != 0, equalised(weights), weights)
    heads = len(weights)
    value = value.reshape(*value.shape[:2], heads, value.shape[2] // heads).permute(2, 1, 0, 3)
    return torch.matmul(weights, value).permute(2, 1, 0, 3).flatten(2)
