# SPDX-License-Identifier: Apache-2.0
r"""Attention with relative positions of Transformer-XL (Dai et al., 2019, section 3.3), without the T×T weights.

For every sequence and head, with i, j in 0 … T − 1:

    s[i,j] = ((q[i] + u)·k[j] + (q[i] + w)·R[T − 1 + j − i]) / √d,    y[i] = Σ_j softmax_j(s[i,j]) v[j]

over the keys that query i sees; a query that sees none gives 0. Row r of R stands for the key r − (T − 1) frames behind
the query; u and w are the biases of content and of position. With G = dy, P the weights and D[i] = Σ_j P G vᵀ:

    dv = Pᵀ G        dS = P (G vᵀ − D) / √d
    dq = dS k + dS′ R,    dk = dSᵀ (q + u),    dR = dS′ᵀ (q + w),    du = Σ dS k,    dw = Σ dS′ R

where dS′[i, T − 1 + j − i] = dS[i, j]: the same numbers by offset in place of by key,
every row of them one element further left than the one before.

Upstream: ``RelPositionMultiHeadedAttention`` of ESPnet's Conformer, Branchformer and E-Branchformer between its
projections, and RETURNN's; both form the (T, 2T − 1) scores by offset, shift them, and keep some six (B, H, T, T)
tensors for the backward pass. Here scores by offset are formed for one block of queries and keys at a time and shifted
where they are added. Forward keeps y and the log-sum-exp of each query, backward computes the scores again: memory is
O(T) in both.

Memory traffic: every operand once; blocks of them again from the caches. FLOPs: 6 d per query and key forward, 16 d
backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled

from fastasr.ops import _check
from fastasr.ops._dispatch import KernelFamily, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register

NAME = "rel_attention"


# --------------------------------------------------------------------------- definition
def relative_shift(scores: Tensor) -> Tensor:
    """(..., T, 2T − 1) by offset -> (..., T, T) by key: element (i, j) is that of offset j − i. A view."""
    frames = scores.shape[-2]
    if frames < 2:
        return scores
    # a row less one element apart, each key's scores stand in one column
    flat = scores.flatten(-2)[..., frames - 1 : -1]
    return flat.unflatten(-1, (frames, 2 * frames - 2))[..., :frames]


def hidden_keys(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """True where a query does not see a key, broadcastable to (B, H, T, T); None where all are seen."""
    hidden = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if attn_mask is None:
        return hidden
    attn_mask = attn_mask.unsqueeze(-3)
    return attn_mask if hidden is None else hidden | attn_mask


def scores_of(q: Tensor, k: Tensor, pos: Tensor, bias_u: Tensor, bias_v: Tensor) -> Tensor:
    """s, (B, H, T, T)."""
    scale = q.shape[-1] ** -0.5
    content = ((q + bias_u) * scale).transpose(1, 2)  # (B, H, T, d)
    position = ((q + bias_v) * scale).transpose(1, 2)
    by_offset = torch.matmul(position, pos.permute(1, 2, 0))  # (B, H, T, 2T - 1)
    return torch.matmul(content, k.permute(0, 2, 3, 1)) + relative_shift(by_offset)


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The formula in eager PyTorch."""
    hidden = hidden_keys(key_padding_mask, attn_mask)
    return weighted(scores_of(q, k, pos, bias_u, bias_v), v, hidden)


def definition_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    hidden: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of the six tensors, in their dtype, computed in float32 or better."""
    tensors, wide = (q, k, v, pos, bias_u, bias_v), torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v, pos, bias_u, bias_v = (t.to(wide) for t in (grad, *tensors))
    scale, frames = q.shape[-1] ** -0.5, q.shape[1]
    content, position, g = (t.transpose(1, 2) for t in (q + bias_u, q + bias_v, grad))  # (B, H, T, ...)
    scores = scores_of(q, k, pos, bias_u, bias_v)
    weights = torch.softmax(scores if hidden is None else scores.masked_fill(hidden, float("-inf")), -1)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0)
    dweights = torch.matmul(g, v.permute(0, 2, 3, 1))
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
    by_offset = dscores  # (B, H, T, 2T - 1), zeros where an offset meets no key
    if frames > 1:
        by_offset = F.pad(F.pad(dscores, (0, frames - 2)).flatten(-2), (frames - 1, 1))
        by_offset = by_offset.unflatten(-1, (frames, 2 * frames - 1))
    dcontent = torch.matmul(dscores, k.transpose(1, 2)).transpose(1, 2)
    dposition = torch.matmul(by_offset, pos.transpose(0, 1)).transpose(1, 2)
    found = (
        dcontent + dposition,
        torch.matmul(dscores.transpose(-1, -2), content).transpose(1, 2),
        torch.matmul(weights.transpose(-1, -2), g).transpose(1, 2),
        torch.matmul(by_offset.transpose(-1, -2), position).sum(0).transpose(0, 1),
        dcontent.sum((0, 1)),
        dposition.sum((0, 1)),
    )
    return tuple(d.to(t.dtype).contiguous() for d, t in zip(found, tensors, strict=True))


def weighted(scores: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """softmax(scores) v, (B, T, H, d)."""
    if hidden is None:
        weights = torch.softmax(scores, -1)
    else:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1).masked_fill(hidden, 0)
    return torch.matmul(weights, v.transpose(1, 2)).transpose(1, 2)


def log_sum_exp(scores: Tensor, hidden: Tensor | None) -> Tensor:
    """(B, H, T), in float32 or better; +inf for a query that sees no key: e^(s − that) is its weights, 0."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    return lse.masked_fill(lse == float("-inf"), float("inf"))


# --------------------------------------------------------------------------- kernels
# From here on the six tensors have one dtype, and the functions take the arguments of the kernels.
FAMILY = KernelFamily(NAME, (NAME,), (native_kernels(NAME), triton_kernels(NAME)))


def forward(q, k, v, pos, bias_u, bias_v, key_padding_mask, attn_mask) -> tuple[Tensor, Tensor]:
    """(y, log-sum-exp (B, H, T)) without autograd, by the best kernel for q."""
    kernels = FAMILY.kernels(q)
    if kernels is not None:
        return kernels.forward(*_contiguous(q, k, v, pos, bias_u, bias_v, key_padding_mask, attn_mask))
    hidden, scores = hidden_keys(key_padding_mask, attn_mask), scores_of(q, k, pos, bias_u, bias_v)
    return weighted(scores, v, hidden).contiguous(), log_sum_exp(scores, hidden)


def backward(
    grad, q, k, v, pos, bias_u, bias_v, key_padding_mask, attn_mask, out, lse
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dpos, dbias_u, dbias_v) without autograd, by the best kernel for q. ``out`` and ``lse`` are what
    :func:`forward` gave."""
    kernels = FAMILY.kernels(q)
    tensors = q, k, v, pos, bias_u, bias_v
    if kernels is not None:
        return kernels.backward(*_contiguous(grad, *tensors, key_padding_mask, attn_mask, out, lse))
    return definition_backward(grad, *tensors, hidden_keys(key_padding_mask, attn_mask))


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


class _RelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors: Tensor | None) -> Tensor:
        out, lse = forward(*tensors)
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(NAME)
        return *backward(grad, *ctx.saved_tensors), None, None


# --------------------------------------------------------------------------- registration
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor pos, Tensor bias_u, Tensor bias_v, "
    "Tensor? key_padding_mask, Tensor? attn_mask"
)


def _fake_forward(q, k, v, *rest) -> tuple[Tensor, Tensor]:
    batch, frames, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, frames, heads, v.shape[3]), q.new_empty(batch, heads, frames, dtype=wide)


def _fake_backward(grad, *tensors) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors[:6])


_BACKWARD_OP = register(
    f"{NAME}_backward(Tensor grad, {_TENSORS}, Tensor out, Tensor lse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx, grad: Tensor, *_):
    return *_BACKWARD_OP(grad, *ctx.saved_tensors), None, None


_OP = register(
    f"{NAME}({_TENSORS}) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
    autocast=lambda dtype, *tensors: (*cast(dtype, *tensors[:6]), *tensors[6:]),
)


# --------------------------------------------------------------------------- public function
def rel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """softmax_j(((q[i] + bias_u)·k[j] + (q[i] + bias_v)·pos[T − 1 + j − i]) / √d) · v, without the weights in memory.

    Args:
        q, k: (B, T, H, d), d of at least 1. float32, bfloat16, float16 or float64.
        v: (B, T, H, e), e of at least 1.
        pos: (2T − 1, H, d), the projected positions: row r is that of a key r − (T − 1) frames behind the query. No
            rows where T is 0.
        bias_u, bias_v: (H, d): added to q where it meets keys, and where it meets positions.
        key_padding_mask: bool (B, T), True where a key is hidden from every query of its sequence.
        attn_mask: bool (T, T) or (B, T, T), True where a key (last) is hidden from a query.
        All floating tensors have q's dtype, but for autocast, which casts them.
    Returns:
        (B, T, H, e), of q's dtype (autocast's under autocast), accumulated in float32 or better; 0 for a query that
        sees no key.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match.
    """
    tensors = q, k, v, pos, bias_u, bias_v
    dtype = _check_tensors(*tensors)
    _check_masks(q, key_padding_mask, attn_mask)
    masks = key_padding_mask, attn_mask
    if not direct(*tensors, *masks):
        if served(NAME, q):
            return _OP(*tensors, *masks)[0]
        return definition(*tensors, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
    if FAMILY.kernels(q) is None:
        return definition(*tensors, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
    if dtype is not None:
        tensors = cast(dtype, *tensors)
    if is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _RelAttention.apply(*tensors, *masks)
    return forward(*tensors, *masks)[0]


def _check_tensors(q, k, v, pos, bias_u, bias_v) -> torch.dtype | None:
    """Autocast's dtype, or None."""
    _check.floating_tensor(NAME, "q", q)
    ok = q.dim() == 4 and q.shape[2] > 0 and q.shape[3] > 0
    _check.shape(NAME, "q", q, "(B, T, H, d) with H and d of at least 1", ok)
    batch, frames, heads, width = q.shape
    dtype = autocast_dtype(q)
    offsets = max(0, 2 * frames - 1)
    shapes = {"k": (batch, frames, heads, width), "pos": (offsets, heads, width)}
    shapes |= dict.fromkeys(("bias_u", "bias_v"), (heads, width))
    for name, t in (("k", k), ("v", v), ("pos", pos), ("bias_u", bias_u), ("bias_v", bias_v)):
        _check.floating_tensor(NAME, name, t)
        _check.same_device(NAME, name, t, q, "q")
        if name == "v":
            ok = t.dim() == 4 and t.shape[:3] == q.shape[:3] and t.shape[3] > 0
            _check.shape(NAME, name, t, f"({batch}, {frames}, {heads}, e) with e of at least 1", ok)
        else:
            _check.shape(NAME, name, t, f"{shapes[name]}", t.shape == shapes[name])
        if t.dtype != q.dtype and dtype is None:
            raise TypeError(f"fastasr.{NAME}: {name}: expected dtype {q.dtype} (that of q), got {t.dtype}")
    return dtype


def _check_masks(q: Tensor, key_padding_mask, attn_mask) -> None:
    batch, frames = q.shape[:2]
    if key_padding_mask is not None:
        _check.bool_tensor(NAME, "key_padding_mask", key_padding_mask)
        whole = (batch, frames)
        _check.shape(NAME, "key_padding_mask", key_padding_mask, f"{whole}", key_padding_mask.shape == whole)
        _check.same_device(NAME, "key_padding_mask", key_padding_mask, q, "q")
    if attn_mask is not None:
        _check.bool_tensor(NAME, "attn_mask", attn_mask)
        square = (frames, frames)
        ok = attn_mask.shape == square or attn_mask.shape == (batch, *square)
        _check.shape(NAME, "attn_mask", attn_mask, f"{square} or {(batch, *square)}", ok)
        _check.same_device(NAME, "attn_mask", attn_mask, q, "q")
