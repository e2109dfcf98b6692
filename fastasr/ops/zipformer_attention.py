# SPDX-License-Identifier: Apache-2.0
r"""Values weighted by attention with relative positions of Zipformer, without the T×T weights.

    y[t,b,h] = Σ_j W[h,b,t,j] v[j,b,h],  W as in :mod:`fastasr.ops.zipformer_attention_weights`

v holds the values of the first ``value_heads`` heads side by side. With G = dy: dV = Wᵀ G, dW = G Vᵀ, and the rest as
there. W is never stored: forward and backward meet blocks of queries with all keys, O(T) memory for one block, and the
backward pass computes the scores again from the inputs. Triton's kernels keep the maximum and the sum of each row, and
in 16 bits what rounding takes from y: with it δ is G · y without a sweep over the keys.

Zipformer's training gives dS the penalty of large scores on some calls, and replaces W by [W > 0] / Σ_j [W > 0] on
others, which is a constant: dW is 0 there, and dV = Wᵀ G with the new W.
"""

import importlib
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from fastasr.ops._op import OPS, Arguments, Op, op
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


def _statistics_shape(backend: str, a: Arguments) -> tuple[int, ...]:
    """Returns the shape of maximum, 1 / sum and, with ``equal``, 1 / number of the rows. C++ kernels keep nothing."""
    frames, batch, _ = a.x.shape
    heads = a.value_heads or a.num_heads
    return (2 if a.equal is None else 3, heads, batch, frames) if backend == "triton" else (0,)


def _remainder_shape(backend: str, a: Arguments) -> tuple[int, ...]:
    kept = backend == "triton" and a.x.dtype != torch.float32
    return (*a.x.shape[:2], a.value.shape[2]) if kept else (0,)


@op(
    "cpu triton",
    one_dtype="x pos value cached_key",
    keeps={
        "statistics": Annotated[Tensor, _statistics_shape, "wide x"],
        "remainder": Annotated[Tensor, _remainder_shape, "x"],
    },
    forward=f"{_FORWARD} equal keep",
    backward=f"grad y statistics remainder {_FORWARD} equal score_penalty score_limit act -> x pos value cached_key",
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


# --------------------------------------------------------------------------- recorded passes
def position_sums(x: Tensor) -> Any:
    """Returns what :func:`gradients` adds the gradient of positions to, for x like this one; None where no kernels for
    it serve x."""
    kernels = OPS["zipformer_attention"].family.kernels(x)
    if kernels is None or kernels.backend != "triton":
        return None
    return importlib.import_module("fastasr.kernels.zipformer_attention").PositionSums()


def kept_values(
    x: Tensor, pos: Tensor, value: Tensor, num_heads: int, query_head_dim: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the op returns for valid arguments of one dtype, and behind it what :func:`gradients` reads."""
    op = OPS["zipformer_attention"]
    arguments = op.written.Arguments(x, pos, value, num_heads, query_head_dim, **options)
    found: tuple[Tensor, Tensor, Tensor] = op.written.run_kernels(op.family.kernels(x), *arguments, True)
    return found


def gradients(
    grad: Tensor,
    kept: Sequence[Tensor],
    x: Tensor,
    pos: Tensor,
    value: Tensor,
    num_heads: int,
    query_head_dim: int,
    sums: Any,
    *,
    value_heads: int,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = -1,
    left_context_chunks: int = -1,
    score_penalty: float = 0.0,
    score_limit: float = 0.0,
    act: Tensor | None = None,
    equal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and value, and adds that of pos to ``sums``. ``kept`` is what :func:`kept_values`
    returned; the other arguments are those of the op, of one dtype, contiguous."""
    kernels: Any = OPS["zipformer_attention"].family.kernels(x)
    dx, _, dvalue, _ = kernels.backward(
        grad, *kept, x, pos, value, None, key_padding_mask, attn_mask, starts, num_heads, query_head_dim, value_heads,
        chunk_size, left_context_chunks, equal, score_penalty, score_limit, act, sums,
    )  # fmt: skip
    return dx, dvalue
