# SPDX-License-Identifier: Apache-2.0
r"""Attention weights with relative positions of Zipformer (Yao et al., 2023; positions after Dai et al., 2019).

    s[h,b,i,j] = q[i]·k[j] + p[i]·R[T−1−i+j],  masked scores −1000,  W = softmax_j(s)

x holds q | k | p side by side, R = pos holds 2T−1+left offsets, the keys are [cached_key | k]. There is no 1/√d.
With g = dW and δ = Σ_j W g: dS = W (g − δ), 0 where masked, plus penalty · sign(s) where |s| > limit (before masking);
dq = dS k, dk = dSᵀ q, dp[i] = Σ_j dS R[T−1−i+j], dR[r] = Σ p[i] dS[i,j] over the diagonal r = T−1−i+j.
Upstream: ``RelPositionMultiheadAttentionWeights`` in ``zipformer.modules.zipformer``.

Memory traffic: write W forward; read W and g backward. Scores exist in the cache alone.
"""

import torch
from torch import Tensor, is_grad_enabled

from fastasr.ops import _check
from fastasr.ops._dispatch import (
    KernelFamily,
    direct,
    native_kernels,
    served,
    triton_kernels,
)
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register

NAME = "zipformer_attention_weights"
FAMILY = KernelFamily(NAME, (NAME,), (native_kernels(NAME), triton_kernels(NAME)))

MASKED = -1000.0  # a row with nothing to attend to is uniform, not NaN


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor,
    pos: Tensor | None,
    num_heads: int,
    query_head_dim: int,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    chunk_size: int = -1,
    left_context_chunks: int = -1,
    cached_key: Tensor | None = None,
    score_penalty: float = 0.0,
    score_limit: float = 25.0,
) -> Tensor:
    """The formula in eager PyTorch."""
    s = scores(x, pos, cached_key, num_heads, query_head_dim)
    if score_penalty:
        s = _Penalty.apply(s, score_penalty, score_limit)
    for mask in hidden(s, key_padding_mask, attn_mask, chunk_size, left_context_chunks):
        s = s.masked_fill(mask, MASKED)
    weights = s.softmax(-1)
    return weights.to(autocast_dtype(x) or s.dtype) if x.dtype != torch.float64 else weights


def scores(x: Tensor, pos: Tensor | None, cached_key: Tensor | None, heads: int, dim: int) -> Tensor:
    """(H, B, T, left + T), before the masks."""
    frames, batch, width = x.shape
    q, k, p = x.split([heads * dim, heads * dim, width - 2 * heads * dim], -1)
    if cached_key is not None:
        k = torch.cat([cached_key.to(k.dtype), k])
    keys = k.shape[0]
    q = q.reshape(frames, batch, heads, dim).permute(2, 1, 0, 3)
    k = k.reshape(keys, batch, heads, dim).permute(2, 1, 3, 0)
    products = torch.matmul(q, k)
    if pos is None or not products.numel():
        return products if pos is None else products + 0 * (p.sum() + pos.sum())
    pos_dim = width // heads - 2 * dim
    p = p.reshape(frames, batch, heads, pos_dim).permute(2, 1, 0, 3)
    r = pos.reshape(pos.shape[0], pos.shape[1], heads, pos_dim).permute(2, 0, 3, 1)
    return products + by_key(torch.matmul(p, r), keys)


def by_key(by_offset: Tensor, keys: int) -> Tensor:
    """(..., T, W) by offset, W = T - 1 + keys, as (..., T, keys): row i from column T-1-i on. The rows laid end to end
    from there on are W - 1 apart."""
    frames, width = by_offset.shape[-2:]
    if frames == 1:
        return by_offset
    rows = by_offset.flatten(-2)[..., frames - 1 : frames * width - 1]
    return rows.unflatten(-1, (frames, width - 1))[..., :keys]


def hidden(
    scores: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    chunk_size: int,
    left_context_chunks: int,
) -> list[Tensor]:
    """Masks that broadcast with the scores, True: hidden."""
    frames, keys = scores.shape[-2:]
    masks = []
    if chunk_size > 0:
        query = torch.arange(frames, device=scores.device)[:, None] // chunk_size
        key = torch.div(
            torch.arange(frames - keys, frames, device=scores.device), chunk_size, rounding_mode="floor"
        )
        masks.append(key > query)
        if left_context_chunks >= 0:
            masks.append(key < query - left_context_chunks)
    if attn_mask is not None:
        masks.append(attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None])
    return masks


class _Penalty(torch.autograd.Function):
    """Scores as they are; their gradient gets penalty · sign(s) where |s| > limit."""

    @staticmethod
    def forward(ctx, scores: Tensor, penalty: float, limit: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.penalty, ctx.limit = penalty, limit
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (scores,) = ctx.saved_tensors
        return grad + ctx.penalty * (scores.sign() * (scores.abs() > ctx.limit)), None, None


# --------------------------------------------------------------------------- kernels
def _by_position(
    x, pos, cached_key, key_padding_mask, attn_mask, heads, dim, chunk, left_chunks, penalty, limit
):
    """:func:`definition` with the registered op's arguments."""
    return definition(
        x, pos, heads, dim,
        key_padding_mask=key_padding_mask, attn_mask=attn_mask, chunk_size=chunk, left_context_chunks=left_chunks,
        cached_key=cached_key, score_penalty=penalty, score_limit=limit,
    )  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def forward(x, pos, cached_key, key_padding_mask, attn_mask, heads, dim, chunk, left_chunks, penalty, limit):
    """W without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return _by_position(
            x, pos, cached_key, key_padding_mask, attn_mask, heads, dim, chunk, left_chunks, penalty, limit
        )
    tensors = _contiguous(x, pos, cached_key, key_padding_mask, attn_mask)
    return kernels.forward(*tensors, heads, dim, chunk, left_chunks)


def backward(
    grad, weights, x, pos, cached_key, key_padding_mask, attn_mask, heads, dim, chunk, left_chunks, penalty, limit
):  # fmt: skip
    """(dx, dpos, dcached_key) without autograd, by the best kernel for x; no elements for an argument that is None."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, pos, cached_key)]
        with torch.enable_grad():
            out = _by_position(
                *leaves, key_padding_mask, attn_mask, heads, dim, chunk, left_chunks, penalty, limit
            )
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad))
        return tuple(x.new_empty(0) if t is None else next(grads) for t in leaves)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    tensors = _contiguous(x, pos, cached_key, key_padding_mask, attn_mask)
    return kernels.backward(grad, weights, *tensors, heads, dim, chunk, left_chunks, penalty, limit)


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pos, cached_key, key_padding_mask, attn_mask, *numbers):
        weights = forward(x, pos, cached_key, key_padding_mask, attn_mask, *numbers)
        ctx.save_for_backward(weights, x, pos, cached_key, key_padding_mask, attn_mask)
        ctx.numbers = numbers
        return weights

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(NAME)
        grads = backward(grad, *ctx.saved_tensors, *ctx.numbers)
        needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *needed, *(None,) * (2 + len(ctx.numbers))


# --------------------------------------------------------------------------- registration
_ROW_PADDING = 16  # as in csrc/bindings and kernels: rows of W start at multiples of this many elements


def _fake_forward(x, pos, cached_key, key_padding_mask, attn_mask, heads, dim, *numbers) -> Tensor:
    frames, batch, _ = x.shape
    keys = frames + (0 if cached_key is None else cached_key.shape[0])
    if FAMILY.kernels(x) is None:
        return x.new_empty(heads, batch, frames, keys)
    stride = (keys + _ROW_PADDING - 1) // _ROW_PADDING * _ROW_PADDING
    strides = (batch * frames * stride, frames * stride, stride, 1)
    return torch.empty_strided((heads, batch, frames, keys), strides, dtype=x.dtype, device=x.device)


def _fake_backward(grad, weights, x, pos, cached_key, *rest):
    return tuple(x.new_empty((0,) if t is None else t.shape) for t in (x, pos, cached_key))


_TENSORS = "Tensor x, Tensor? pos, Tensor? cached_key, Tensor? key_padding_mask, Tensor? attn_mask"
_NUMBERS = (
    "int num_heads, int query_head_dim, int chunk_size, int left_context_chunks, float score_penalty, "
    "float score_limit"
)

_BACKWARD_OP = register(
    f"{NAME}_backward(Tensor grad, Tensor weights, {_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output, *inputs[:5])
    ctx.numbers = inputs[5:]


def _op_backward(ctx, grad: Tensor):
    grads = _BACKWARD_OP(grad, *ctx.saved_tensors, *ctx.numbers)
    needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
    return *needed, *(None,) * (2 + len(ctx.numbers))


def _autocast(dtype: torch.dtype, x, pos, cached_key, *rest):
    return *cast(dtype, x, pos, cached_key), *rest


_OP = register(
    f"{NAME}({_TENSORS}, {_NUMBERS}) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
    autocast=_autocast,
)


# --------------------------------------------------------------------------- checks
def _mask(op: str, name: str, mask: Tensor | None, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.layout is not torch.strided:
        raise TypeError(f"fastasr.{op}: {name}: expected a strided torch.Tensor or None, got {_kind(mask)}")
    if mask.dtype is not torch.bool:
        raise TypeError(f"fastasr.{op}: {name}: expected dtype bool (True: hidden), got {mask.dtype}")
    _check.shape(op, name, mask, " or ".join(map(str, shapes)), tuple(mask.shape) in shapes)
    _check.same_device(op, name, mask, x, "x")


def _kind(value: object) -> str:
    return f"layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__


def _number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
        raise TypeError(f"fastasr.{op}: {name}: expected a float, got {type(value).__name__}")
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"fastasr.{op}: {name}: expected a number >= 0, got {value}")
    return float(value)


def _at_least(op: str, name: str, value: object, least: int) -> int:
    _check.integer(op, name, value)
    if value < least:
        raise ValueError(f"fastasr.{op}: {name}: expected an int >= {least}, got {value}")
    return value


def _companion(op: str, name: str, value: Tensor, x: Tensor, any_dtype: bool) -> None:
    _check.floating_tensor(op, name, value)
    _check.same_device(op, name, value, x, "x")
    if value.dtype != x.dtype and not any_dtype:
        raise TypeError(f"fastasr.{op}: {name}: expected dtype {x.dtype} (that of x), got {value.dtype}")


def check_arguments(
    op: str,
    x: Tensor,
    pos: Tensor | None,
    heads: int,
    dim: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    chunk_size: int,
    left_context_chunks: int,
    cached_key: Tensor | None,
) -> int:
    """The number of keys; raises where the arguments that the attention ops share do not fit each other."""
    _check.floating_tensor(op, "x", x)
    _at_least(op, "num_heads", heads, 1)
    _at_least(op, "query_head_dim", dim, 1)
    _check.shape(op, "x", x, "(T, B, C)", x.dim() == 3)
    frames, batch, width = x.shape
    expected = f"(T, B, C), C a multiple of num_heads {heads} and at least {2 * heads * dim}"
    _check.shape(op, "x", x, expected, width % heads == 0 and width >= 2 * heads * dim)
    any_dtype = autocast_dtype(x) is not None
    left = 0
    if cached_key is not None:
        _companion(op, "cached_key", cached_key, x, any_dtype)
        expected = f"(left, {batch}, {heads * dim})"
        ok = cached_key.dim() == 3 and tuple(cached_key.shape[1:]) == (batch, heads * dim)
        _check.shape(op, "cached_key", cached_key, expected, ok)
        left = cached_key.shape[0]
    keys = left + frames
    if pos is not None:
        _companion(op, "pos", pos, x, any_dtype)
        rest = (max(2 * frames - 1 + left, 0) if frames else 0, width - 2 * heads * dim)
        ok = pos.dim() == 3 and tuple(pos.shape[1:]) == rest and pos.shape[0] in (1, batch)
        _check.shape(op, "pos", pos, f"(1 or {batch}, {rest[0]}, {rest[1]})", ok)
    _mask(op, "key_padding_mask", key_padding_mask, x, ((batch, keys),))
    _mask(op, "attn_mask", attn_mask, x, ((frames, keys), (batch, frames, keys)))
    _at_least(op, "chunk_size", chunk_size, -1)
    if chunk_size == 0:
        raise ValueError(f"fastasr.{op}: chunk_size: expected an int > 0, or -1, got 0")
    _at_least(op, "left_context_chunks", left_context_chunks, -1)
    return keys


def zipformer_attention_weights(
    x: Tensor,
    pos: Tensor | None,
    num_heads: int,
    query_head_dim: int,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    chunk_size: int = -1,
    left_context_chunks: int = -1,
    cached_key: Tensor | None = None,
    score_penalty: float = 0.0,
    score_limit: float = 25.0,
) -> Tensor:
    """softmax_j(q[i]·k[j] + p[i]·pos[T−1−i+j]), masked scores being −1000.

    Args:
        x: (T, B, H·(2·dq + dp)): queries, keys and position queries side by side, heads inside each; float32, bfloat16,
            float16 or float64.
        pos: (1 or B, 2T−1+left, H·dp), row T−1 is offset 0; None: no position scores.
        num_heads, query_head_dim: H and dq; dp is what remains of x.
        key_padding_mask: bool (B, left + T), True: no query sees this key.
        attn_mask: bool (T, left + T) or (B, T, left + T), True: hidden.
        chunk_size: a query sees the keys up to the end of its chunk of this many frames; -1: all. No mask is made.
        left_context_chunks: and from this many chunks before its own; -1: from the first.
        cached_key: (left, B, H·dq), keys before the first frame (streaming).
        score_penalty, score_limit: the gradient of every score s with |s| > score_limit, hidden or not, gets
            score_penalty · sign(s); values are not changed.
    Returns:
        (H, B, T, left + T), of x's dtype (autocast's under autocast), computed in float32 or better and rounded once.
        A query that sees no key has equal weights, and no gradient of its scores. Rows lie a multiple of 16 elements
        apart in memory: for `view`, call `contiguous` first.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; a number is out of range.
    """
    heads, dim = num_heads, query_head_dim
    check_arguments(
        NAME, x, pos, heads, dim, key_padding_mask, attn_mask, chunk_size, left_context_chunks, cached_key
    )
    dtype = autocast_dtype(x)
    penalty, limit = _number(NAME, "score_penalty", score_penalty), _number(NAME, "score_limit", score_limit)
    rest = (key_padding_mask, attn_mask, heads, dim, chunk_size, left_context_chunks, penalty, limit)
    if not direct(x, pos, cached_key, key_padding_mask, attn_mask):
        return (_OP if served(NAME, x) else _by_position)(x, pos, cached_key, *rest)
    if FAMILY.kernels(x) is None:
        return _by_position(x, pos, cached_key, *rest)
    if dtype is not None:
        x, pos, cached_key = cast(dtype, x, pos, cached_key)
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, pos, cached_key)):
        return _Weights.apply(x, pos, cached_key, *rest)
    return forward(x, pos, cached_key, *rest)
