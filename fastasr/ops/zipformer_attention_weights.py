# SPDX-License-Identifier: Apache-2.0
r"""Attention weights with relative positions of Zipformer (Yao et al., 2023; positions after Dai et al., 2019).

    s[h,b,i,j] = q[i]·k[j] + p[i]·R[T−1−i+j],  masked scores −1000,  W = softmax_j(s)

x holds q | k | p side by side, R = pos holds 2T−1+left offsets, the keys are [cached_key | k]. There is no 1/√d.
Recordings may lie one after the other in one sequence: a query then sees the keys of its own recording alone, and the
others have no weight at all. Kernels read the boundaries where they lie. R then needs the offsets of the longest alone.
With g = dW and δ = Σ_j W g: dS = W (g − δ), 0 where masked, plus penalty · sign(s) where |s| > limit (before masking);
dq = dS k, dk = dSᵀ q, dp[i] = Σ_j dS R[T−1−i+j], dR[r] = Σ p[i] dS[i,j] over the diagonal r = T−1−i+j.
Upstream: ``RelPositionMultiheadAttentionWeights`` in ``zipformer.modules.zipformer``.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from fastasr.ops._op import OPS, op
from fastasr.ops._zipformer_attention import (
    AttentionMask,
    CachedKey,
    ChunkSize,
    Count,
    LeftContext,
    NotNegative,
    PaddingMask,
    Positions,
    Projection,
    Starts,
    check_recordings,
    penalised,
    scores,
    separate,
    softmax,
)

ROW_PADDING = 16  # as in csrc/bindings and kernels: rows of W start at multiples of this many elements


# --------------------------------------------------------------------------- parts
def _empty(shape: tuple[int, ...], **options: Any) -> Tensor:
    """Allocates rows with the strides that the kernels use."""
    _, batch, frames, keys = shape
    row = (keys + ROW_PADDING - 1) // ROW_PADDING * ROW_PADDING
    return torch.empty_strided(shape, (batch * frames * row, frames * row, row, 1), **options)


_TENSORS = "x pos cached_key key_padding_mask attn_mask starts"
_FORWARD = f"{_TENSORS} num_heads query_head_dim chunk_size left_context_chunks"


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    one_dtype="x pos cached_key",
    strides={"grad": "rows", "weights": _empty},
    forward=_FORWARD,
    backward=f"grad weights {_FORWARD} score_penalty score_limit",
    check=check_recordings,
)
def zipformer_attention_weights(
    x: Projection,
    pos: Positions,
    num_heads: Count,
    query_head_dim: Count,
    *,
    key_padding_mask: PaddingMask = None,
    attn_mask: AttentionMask = None,
    starts: Starts = None,
    chunk_size: ChunkSize = -1,
    left_context_chunks: LeftContext = -1,
    cached_key: CachedKey = None,
    score_penalty: NotNegative = 0.0,
    score_limit: NotNegative = 25.0,
) -> Annotated[Tensor, "weights: num_heads B T T+L", "x"]:
    """softmax_j(q[i]·k[j] + p[i]·pos[T−1−i+j]), masked scores being −1000.

    Args:
        x: (T, B, H·(2·dq + dp)): queries, keys and position queries side by side, heads inside each; float32, bfloat16,
            float16 or float64.
        pos: (1 or B, 2T−1+left, H·dp), row T−1 is offset 0; None: no position scores. With ``starts`` (1 or B, 2L−1,
            H·dp), row L−1 is offset 0, for recordings of up to L frames: frames L or more apart do not see each other.
        num_heads, query_head_dim: H and dq; dp is what remains of x.
        key_padding_mask: bool (B, left + T), True: no query sees this key.
        attn_mask: bool (T, left + T) or (B, T, left + T), True: hidden.
        starts: int64 (N,): where recordings begin in every sequence, and behind them where the last one ends. Frames of
            different recordings do not see each other, and frames outside of all see nothing. Their order does not
            matter, and equal numbers are recordings without frames. On a GPU nothing waits for them. There is no cache.
            Weights, their gradients and those of scores still have H·B·T² elements each, most of them 0:
            :func:`fastasr.ops.zipformer_attention` has none of these tensors.
        chunk_size: a query sees the keys up to the end of its chunk of this many frames; -1: all. No mask is made. With
            ``starts`` chunks count from the first frame of the recording.
        left_context_chunks: it sees keys from this many chunks before its own on; -1: from the first.
        cached_key: (left, B, H·dq), keys before the first frame (streaming).
        score_penalty, score_limit: the gradient of every score s with |s| > score_limit, hidden or not, gets
            score_penalty · sign(s), but for keys of other recordings; values are not changed.
    Returns:
        (H, B, T, left + T), of x's dtype (autocast's under autocast), computed in float32 or better and rounded once.
        A query that sees no key has equal weights, on the keys of its recording with ``starts``, and no gradient of its
        scores; the weights are 0 if it belongs to none. Rows lie a multiple of 16 elements apart in memory: for `view`,
        call `contiguous` first.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; a number is out of range.
    """
    s = scores(x, pos, cached_key, num_heads, query_head_dim)
    hidden = separate(s, pos, starts)
    s = penalised(s, hidden, score_penalty, score_limit)
    return softmax(s, x, key_padding_mask, attn_mask, chunk_size, left_context_chunks, starts, hidden)


# --------------------------------------------------------------------------- recorded passes
def gradients(
    grad: Tensor,
    weights: Tensor,
    x: Tensor,
    pos: Tensor,
    num_heads: int,
    query_head_dim: int,
    masks: dict,
    penalty: float,
    limit: float,
    act: Tensor,
) -> Sequence[Tensor]:
    """Returns the gradients of x and pos. ``act`` is one number on the device: where it is 0, there is no penalty.
    ``masks`` are the op's arguments of masks and chunks.
    """
    kernels: Any = OPS["zipformer_attention_weights"].family.kernels(x)
    masks = _MASKS | masks
    if kernels is None or kernels.backend != "triton" or x.dtype is torch.float64:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (x, pos)]
            s = scores(inputs[0], inputs[1], None, num_heads, query_head_dim)
            w = softmax(penalised(s, None, penalty, limit, act), inputs[0], **masks)
        return torch.autograd.grad(w, inputs, grad.to(w.dtype))
    hidden = [None if masks[name] is None else masks[name].contiguous() for name in _MASKS if "mask" in name]
    chunks = masks["chunk_size"], masks["left_context_chunks"]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    sizes = num_heads, query_head_dim
    found = kernels.backward(
        grad,
        weights,
        x.contiguous(),
        pos.contiguous(),
        None,
        *hidden,
        None,
        *sizes,
        *chunks,
        penalty,
        limit,
        act,
    )
    return found[:2]


_MASKS = {"key_padding_mask": None, "attn_mask": None, "chunk_size": -1, "left_context_chunks": -1}
