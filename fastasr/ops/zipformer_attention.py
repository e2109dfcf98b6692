# SPDX-License-Identifier: Apache-2.0
r"""Values weighted by attention with relative positions of Zipformer, without the T×T weights.

    y[t,b,h] = Σ_j W[h,b,t,j] v[j,b,h],  W as in :mod:`fastasr.ops.zipformer_attention_weights`

v holds the values of the first ``value_heads`` heads side by side. With G = dy: dV = Wᵀ G, dW = G Vᵀ, and from dW as
there. W is never stored: forward and backward meet blocks of queries with all keys, O(T) memory for one block, and the
backward pass computes the scores again from the inputs: nothing else is kept.

Memory traffic: x, R and v once; read again from the caches by every block of queries.
"""

import torch
from torch import Tensor, is_grad_enabled

from fastasr.ops import _check
from fastasr.ops._dispatch import KernelFamily, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register
from fastasr.ops.zipformer_attention_weights import check_arguments
from fastasr.ops.zipformer_attention_weights import definition as weights_definition

NAME = "zipformer_attention"


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


# --------------------------------------------------------------------------- kernels
FAMILY = KernelFamily(NAME, (NAME,), (native_kernels(NAME), triton_kernels(NAME)))


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
    return kernels.forward(*_contiguous(*tensors), *numbers)


def backward(grad, x, pos, value, cached_key, key_padding_mask, attn_mask, *numbers):
    """(dx, dpos, dvalue, dcached_key) without autograd, by the best kernel for x; no elements for an argument that is
    None."""
    kernels = FAMILY.kernels(x)
    if kernels is not None:
        tensors = _contiguous(grad, x, pos, value, cached_key, key_padding_mask, attn_mask)
        return kernels.backward(*tensors, *numbers)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, pos, value, cached_key)]
    with torch.enable_grad():
        out = _by_position(*leaves, key_padding_mask, attn_mask, *numbers)
    grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad))
    return tuple(x.new_empty(0) if t is None else next(grads) for t in leaves)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


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
def zipformer_attention(
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
            for :func:`fastasr.ops.zipformer_attention_weights`.
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
