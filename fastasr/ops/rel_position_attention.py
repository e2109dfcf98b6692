# SPDX-License-Identifier: Apache-2.0
r"""Values weighted by attention with relative positions of Zipformer, without the T×T weights.

    y[t,b,h] = Σ_j W[h,b,t,j] v[j,b,h],  W as in :mod:`fastasr.ops.rel_position_attention_weights`

v holds the values of the first ``value_heads`` heads side by side. With G = dy: dV = Wᵀ G, dW = G Vᵀ, and from dW as
there. W is never stored: forward and backward meet blocks of queries with all keys, O(T) memory for one block.

Memory traffic: x, R and v once; read again from the caches by every block of queries.
"""

from functools import partial

import torch
from torch import Tensor, is_grad_enabled

from fastasr.ops import _check
from fastasr.ops._dispatch import FLOATING, Implementation, KernelFamily, Kernels, direct, reason_cpu, served
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register
from fastasr.ops.rel_position_attention_weights import MASKED, by_key, check_arguments
from fastasr.ops.rel_position_attention_weights import definition as weights_definition

NAME = "rel_position_attention"


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor,
    pos: Tensor | None,
    value: Tensor,
    num_heads: int,
    query_head_dim: int,
    *,
    value_heads: int | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    chunk_size: int = -1,
    left_context_chunks: int = -1,
    cached_key: Tensor | None = None,
) -> Tensor:
    """The formula in eager PyTorch: the weights, then their product with the values."""
    weights = weights_definition(
        x, pos, num_heads, query_head_dim,
        key_padding_mask=key_padding_mask, attn_mask=attn_mask, chunk_size=chunk_size,
        left_context_chunks=left_context_chunks, cached_key=cached_key,
    )  # fmt: skip
    heads = num_heads if value_heads is None else value_heads
    return weighted(weights[:heads], value)


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """W (heads, B, T, S), value (S, B, heads * dv) -> (T, B, heads * dv)."""
    heads = weights.shape[0]
    keys, batch, channels = value.shape
    value = value.reshape(keys, batch, heads, channels // heads).permute(2, 1, 0, 3)
    return torch.matmul(weights, value).permute(2, 1, 0, 3).flatten(2)


# --------------------------------------------------------------------------- backward, a block of queries at a time
_BLOCK_ELEMENTS = 1 << 22  # scores that the backward pass holds at once


def _by_offset(by_key: Tensor) -> Tensor:
    """Gradients (..., rows, keys) by key as (..., rows, rows - 1 + keys) by offset; see :func:`by_key`."""
    *outer, rows, keys = by_key.shape
    width = rows - 1 + keys
    out = by_key.new_zeros(*outer, rows, width)
    out.as_strided(by_key.shape, (*out.stride()[:-2], width - 1, 1), rows - 1).copy_(by_key)
    return out


def _block(q, k, p, r, v, grad, masks):
    """(dq, dk, dv, dp, dr) of a block of rows: k (heads, B, dim, keys), r (heads, 1 or B, dim, offsets) or None."""
    s = torch.matmul(q, k)
    if r is not None:
        s = s + by_key(torch.matmul(p, r), s.shape[-1])
    for mask in masks:
        s = s.masked_fill(mask, MASKED)
    w = s.softmax(-1)
    dw = torch.matmul(grad, v.mT)
    ds = w * (dw - (w * dw).sum(-1, keepdim=True))
    for mask in masks:
        ds = ds.masked_fill(mask, 0)
    products = torch.matmul(ds, k.mT), torch.matmul(q.mT, ds), torch.matmul(w.mT, grad)
    if r is None:
        return *products, None, None
    by_offset = _by_offset(ds)
    dr = torch.matmul(p.mT, by_offset)
    if r.shape[1] == 1:
        dr = dr.sum(1, keepdim=True)
    return *products, torch.matmul(by_offset, r.mT), dr


def backward(
    grad, x, pos, value, cached_key, key_padding_mask, attn_mask, heads, dim, value_heads, chunk, left_chunks
):
    """(dx, dpos, dvalue, dcached_key); no elements for an argument that is None. In float64."""
    wide = torch.float64  # the formulas one by one, not fused: in float32 they round more than eager does
    frames, batch, width = x.shape
    pos_dim, n = width // heads - 2 * dim, value_heads
    left = 0 if cached_key is None else cached_key.shape[0]
    keys = left + frames
    q, k, p = (t.to(wide) for t in x.split([heads * dim, heads * dim, heads * pos_dim], -1))
    if left:
        k = torch.cat([cached_key.to(wide), k])

    def apart(t, of):  # (rows, B, of * channels) as (n, B, rows, channels), of the first n
        return t.reshape(*t.shape[:2], of, t.shape[2] // of)[:, :, :n].permute(2, 1, 0, 3)

    q, k, p, v = apart(q, heads), apart(k, heads).mT, apart(p, heads), apart(value.to(wide), n)
    g = apart(grad.to(wide), n)
    positions = pos is not None and pos_dim > 0
    r = (
        pos.to(wide).reshape(*pos.shape[:2], heads, pos_dim)[:, :, :n].permute(2, 0, 3, 1)
        if positions
        else None
    )
    dq, dk, dp, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, p, v))
    dr = torch.zeros_like(r, memory_format=torch.contiguous_format) if positions else None
    rows = max(1, _BLOCK_ELEMENTS // max(1, n * batch * keys))
    for i in range(0, frames if keys and batch else 0, rows):
        end = min(i + rows, frames)
        offsets = slice(frames - end, frames - i + keys - 1)
        masks = _block_masks(i, end, frames, keys, key_padding_mask, attn_mask, chunk, left_chunks, x.device)
        part = r[..., offsets] if positions else None
        found = _block(q[:, :, i:end], k, p[:, :, i:end], part, v, g[:, :, i:end], masks)
        dq[:, :, i:end] = found[0]
        dk += found[1]
        dv += found[2]
        if positions:
            dp[:, :, i:end] = found[3]
            dr[..., offsets] += found[4]

    def together(t, channels, of):  # and zeros for the heads without values
        t = t.permute(2, 1, 0, 3).flatten(2)
        return torch.cat([t, t.new_zeros(*t.shape[:2], (of - n) * channels)], -1) if of > n else t

    dk = together(dk.mT, dim, heads)
    dx = torch.cat([together(dq, dim, heads), dk[left:], together(dp, pos_dim, heads)], -1).to(x.dtype)
    none = x.new_empty(0)
    if pos is None:
        dpos = none
    elif positions:
        dpos = together(dr.mT, pos_dim, heads).transpose(0, 1).to(pos.dtype)
    else:
        dpos = torch.zeros_like(pos)
    dcached = none if cached_key is None else dk[:left].to(cached_key.dtype)
    return dx, dpos.contiguous(), together(dv, 0, n).to(value.dtype), dcached


def _block_masks(i, end, frames, keys, key_padding_mask, attn_mask, chunk, left_chunks, device):
    """Masks that broadcast with the scores of the rows [i, end), True: hidden."""
    masks = []
    if chunk > 0:
        query = torch.arange(i, end, device=device)[:, None] // chunk
        key = torch.div(torch.arange(frames - keys, frames, device=device), chunk, rounding_mode="floor")
        masks.append(key > query)
        if left_chunks >= 0:
            masks.append(key < query - left_chunks)
    if attn_mask is not None:
        masks.append(attn_mask[..., i:end, :])
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None])
    return masks


# --------------------------------------------------------------------------- kernels
def _load() -> Kernels:
    return Kernels("cpu", torch.ops.fastasr_cpu.rel_position_attention_forward.default, backward)


FAMILY = KernelFamily(
    NAME,
    (NAME,),
    (Implementation("cpu", ("cpu",), FLOATING, partial(reason_cpu, f"{NAME}_forward"), _load),),
)


def _by_position(
    x, pos, value, cached_key, key_padding_mask, attn_mask, heads, dim, value_heads, chunk, left_chunks
):
    """:func:`definition` with the registered op's arguments."""
    return definition(
        x, pos, value, heads, dim, value_heads=value_heads, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
        chunk_size=chunk, left_context_chunks=left_chunks, cached_key=cached_key,
    )  # fmt: skip


def forward(
    x, pos, value, cached_key, key_padding_mask, attn_mask, heads, dim, value_heads, chunk, left_chunks
):
    """y without autograd, by the best kernel for x."""
    tensors = (x, pos, value, cached_key, key_padding_mask, attn_mask)
    numbers = (heads, dim, value_heads, chunk, left_chunks)
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return _by_position(*tensors, *numbers)
    return kernels.forward(*(None if t is None else t.contiguous() for t in tensors), *numbers)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pos, value, cached_key, key_padding_mask, attn_mask, *numbers):
        ctx.save_for_backward(x, pos, value, cached_key, key_padding_mask, attn_mask)
        ctx.numbers = numbers
        return forward(x, pos, value, cached_key, key_padding_mask, attn_mask, *numbers)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(NAME)
        return _needed(ctx, backward(grad, *ctx.saved_tensors, *ctx.numbers))


def _needed(ctx, grads):
    needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
    return *needed, *(None,) * (2 + len(ctx.numbers))


# --------------------------------------------------------------------------- registration
def _fake_forward(x, pos, value, *rest) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], value.shape[2])


def _fake_backward(grad, x, pos, value, cached_key, *rest):
    return tuple(x.new_empty((0,) if t is None else t.shape) for t in (x, pos, value, cached_key))


_TENSORS = (
    "Tensor x, Tensor? pos, Tensor value, Tensor? cached_key, Tensor? key_padding_mask, Tensor? attn_mask"
)
_NUMBERS = "int num_heads, int query_head_dim, int value_heads, int chunk_size, int left_context_chunks"

_BACKWARD_OP = register(
    f"{NAME}_backward(Tensor grad, {_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _op_backward(ctx, grad: Tensor):
    return _needed(ctx, _BACKWARD_OP(grad, *ctx.saved_tensors, *ctx.numbers))


def _autocast(dtype: torch.dtype, x, pos, value, cached_key, *rest):
    return *cast(dtype, x, pos, value, cached_key), *rest


_OP = register(
    f"{NAME}({_TENSORS}, {_NUMBERS}) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
    autocast=_autocast,
)


# --------------------------------------------------------------------------- public function
def rel_position_attention(
    x: Tensor,
    pos: Tensor | None,
    value: Tensor,
    num_heads: int,
    query_head_dim: int,
    *,
    value_heads: int | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    chunk_size: int = -1,
    left_context_chunks: int = -1,
    cached_key: Tensor | None = None,
) -> Tensor:
    """softmax_j(q[i]·k[j] + p[i]·pos[T−1−i+j]) · value, without the weights in memory.

    Args:
        x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, chunk_size, left_context_chunks, cached_key: as
            for :func:`fastasr.ops.rel_position_attention_weights`.
        value: (left + T, B, value_heads·dv), of x's dtype.
        value_heads: how many of the heads, from the first on, have values; None: all.
    Returns:
        (T, B, value_heads·dv), of x's dtype (autocast's under autocast), accumulated in float32 or better. A query that
        sees no key gets the mean of all values.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; a number is out of range.
    """
    keys = check_arguments(
        NAME, x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, chunk_size, left_context_chunks,
        cached_key,
    )  # fmt: skip
    heads = num_heads if value_heads is None else value_heads
    _check.integer(NAME, "value_heads", heads)
    if not 1 <= heads <= num_heads:
        raise ValueError(f"fastasr.{NAME}: value_heads: expected an int in 1..{num_heads}, got {heads}")
    dtype = autocast_dtype(x)
    _check.floating_tensor(NAME, "value", value)
    _check.same_device(NAME, "value", value, x, "x")
    if value.dtype != x.dtype and dtype is None:
        raise TypeError(f"fastasr.{NAME}: value: expected dtype {x.dtype} (that of x), got {value.dtype}")
    ok = value.dim() == 3 and tuple(value.shape[:2]) == (keys, x.shape[1]) and value.shape[2] % heads == 0
    _check.shape(NAME, "value", value, f"({keys}, {x.shape[1]}, a multiple of {heads})", ok)
    tensors = (x, pos, value, cached_key, key_padding_mask, attn_mask)
    numbers = (num_heads, query_head_dim, heads, chunk_size, left_context_chunks)
    if not direct(*tensors):
        return (_OP if served(NAME, x) else _by_position)(*tensors, *numbers)
    if FAMILY.kernels(x) is None:
        return _by_position(*tensors, *numbers)
    if dtype is not None:
        tensors = (*cast(dtype, *tensors[:4]), *tensors[4:])
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        return _Attention.apply(*tensors, *numbers)
    return forward(*tensors, *numbers)
