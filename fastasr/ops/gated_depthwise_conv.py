# SPDX-License-Identifier: Apache-2.0
r"""The core of Zipformer's convolution module (Yao et al., 2023): gate, padding mask, depthwise convolution, SwooshR.

For h = (x, s) of shape (T, B, 2C), u = x · sigmoid(s), 0 at padding and outside the sequence; per channel, P = K // 2:

    plain         z[t] = b + Σ_k w[k] u[t + k − P]
    chunk-causal  z[t] = b' + Σ_{j ≤ P} v[j] u[t + j − P] + scale[t mod S] (b + Σ_k w[k] u[t + k − P])

where the last sum is over the frames of t's chunk of S frames alone, and scale[p] = 1 + L[p] (p < K) + R[p − (S − K)]
(p ≥ S − K) for chunk_scale = (L, R). y = SwooshR(z), or z. Upstream: ``ConvolutionModule`` in
``zipformer.modules.zipformer``, ``ChunkCausalDepthwiseConv1d`` in ``zipformer.modules.scaling``.

With q = dy · act'(z), r = q · scale: du[t] = Σ_k w[k] r[t − k + P] (within chunks) + Σ_j v[j] q[t − j + P],
dx = du · sigmoid(s), ds = du · u · (1 − sigmoid(s)), and the weights' gradients are sums of q and r against u.
Only h is saved: backward recomputes u and z.

Memory traffic per element of u: read x and s, write y forward; read x, s and dy, write dx and ds backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check, swoosh
from fastasr.ops._dispatch import (
    PLAIN,
    KernelFamily,
    direct,
    native_kernels,
    served,
    triton_kernels,
)
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register

FAMILY = KernelFamily(
    "gated_depthwise_conv",
    ("gated_depthwise_conv",),
    (native_kernels("gated_depthwise_conv"), triton_kernels("gated_depthwise_conv")),
)

ACTIVATIONS = {"swoosh_r": True, "identity": False}


# --------------------------------------------------------------------------- definition
def definition(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal_weight: Tensor | None = None,
    causal_bias: Tensor | None = None,
    chunk_scale: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    cache: Tensor | None = None,
    chunk_size: int = -1,
    activation: str = "swoosh_r",
    return_cache: bool = False,
):
    """The formula in eager PyTorch."""
    x, s = h.chunk(2, dim=-1)
    u = (x * torch.sigmoid(s)).permute(1, 2, 0)  # [B, C, T]
    if padding_mask is not None:
        u = u.masked_fill(padding_mask.unsqueeze(1), 0.0)
    frames, pad = u.shape[2], weight.shape[-1] // 2
    if causal_weight is None:
        z = _conv(F.pad(u, (pad, pad)), weight, bias, frames)
    else:
        context = F.pad(u, (pad, 0)) if cache is None else torch.cat([cache, u], dim=2)
        new_cache = context[..., frames:]
        z = _conv(context.to(u.dtype), causal_weight, causal_bias, frames)
        z = z + _within_chunks(u, weight, bias, chunk_scale, chunk_size)
    y = z.permute(2, 0, 1)  # [T, B, C]
    if ACTIVATIONS[activation]:
        y = swoosh.definition(y, True)
    return (y, new_cache) if return_cache else y


def _conv(u: Tensor, weight: Tensor, bias: Tensor | None, frames: int) -> Tensor:
    """``frames`` frames of the depthwise convolution of u (B, C, frames + K - 1)."""
    channels, taps = weight.shape[0], weight.shape[-1]
    if not channels:  # a convolution of no groups is an error
        empty = weight.reshape(0, taps).sum(1, keepdim=True)
        return u[..., :frames] + (empty if bias is None else empty + bias.unsqueeze(1))
    if not frames:
        u = F.pad(u, (0, 1))
    return F.conv1d(u, weight.reshape(channels, 1, taps), bias, groups=channels)[..., :frames]


def _within_chunks(u, weight, bias, chunk_scale, chunk_size) -> Tensor:
    batch, channels, frames = u.shape
    pad = weight.shape[-1] // 2
    size = max(1, frames) if chunk_size < 0 or chunk_size > frames else chunk_size
    count = -(-frames // size)
    chunks = F.pad(u, (0, count * size - frames)).reshape(batch, channels, count, size).transpose(1, 2)
    chunks = F.pad(chunks.reshape(batch * count, channels, size), (pad, pad))
    z = _conv(chunks, weight, bias, size) * edge_scale(chunk_scale, size)
    z = z.reshape(batch, count, channels, size).transpose(1, 2)
    return z.reshape(batch, channels, count * size)[..., :frames]


def edge_scale(chunk_scale: Tensor, size: int) -> Tensor:
    """(C, size): 1 plus the correction near the left edge, plus that near the right edge of a chunk."""
    left, right = chunk_scale.unbind(0)
    more = size - left.shape[1]
    if more < 0:
        return 1.0 + (left[:, :size] + right[:, -size:])
    return 1.0 + (F.pad(left, (0, more)) + F.pad(right, (more, 0)))


def definition_backward(
    grad, h, weight, bias, causal_weight, causal_bias, chunk_scale, mask, cache, chunk_size, right
) -> tuple:
    """The gradients of h to chunk_scale, and of cache, computed in float32 or better; None for an absent tensor."""
    tensors = (h, weight, bias, causal_weight, causal_bias, chunk_scale, cache)
    if not grad.numel():
        return tuple(t if t is None else torch.zeros_like(t) for t in tensors)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    wide = [t if t is None else t.to(dtype) for t in tensors]
    x, s = wide[0].chunk(2, dim=-1)
    gate = torch.sigmoid(s)
    u = (x * gate).permute(1, 2, 0)  # [B, C, T]
    if mask is not None:
        u = u.masked_fill(mask.unsqueeze(1), 0.0)
    q = grad.to(dtype)
    if right:
        z = definition(
            *wide[:6], padding_mask=mask, cache=wide[6], chunk_size=chunk_size, activation="identity"
        )
        q = q * (torch.sigmoid(z - swoosh.SHIFT[True]) - 0.08)
    q = q.permute(1, 2, 0)
    pad = weight.shape[-1] // 2
    dcausal_weight = dcausal_bias = dchunk_scale = dcache = None
    if causal_weight is None:
        du, dweight, dbias = _conv_backward(q, F.pad(u, (pad, pad)), wide[1])
        du = du[..., pad : du.shape[2] - pad]
    else:
        context = F.pad(u, (pad, 0)) if cache is None else torch.cat([wide[6], u], dim=2)
        dcontext, dcausal_weight, dcausal_bias = _conv_backward(q, context, wide[3])
        dcache, du = dcontext[..., :pad], dcontext[..., pad:]
        more, dweight, dbias, dchunk_scale = _within_chunks_backward(
            q, u, wide[1], wide[2], wide[5], chunk_size
        )
        du = du + more
    if mask is not None:
        du = du.masked_fill(mask.unsqueeze(1), 0.0)
    du = du.permute(2, 0, 1)
    dh = torch.cat([du * gate, du * x * gate * (1.0 - gate)], dim=-1)
    found = (
        dh,
        dweight,
        dbias,
        dcausal_weight,
        None if causal_bias is None else dcausal_bias,
        dchunk_scale,
        dcache,
    )
    return tuple(
        t if t is None else g.reshape(t.shape).to(t.dtype) for g, t in zip(found, tensors, strict=True)
    )


def _conv_backward(grad: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, weight and bias of a depthwise convolution without padding."""
    channels, taps = weight.shape[0], weight.shape[-1]
    kernel = weight.reshape(channels, 1, taps)
    du = torch.nn.grad.conv1d_input(u.shape, kernel, grad, groups=channels)
    dweight = torch.nn.grad.conv1d_weight(u, kernel.shape, grad, groups=channels)
    return du, dweight, grad.sum((0, 2))


def _within_chunks_backward(grad, u, weight, bias, chunk_scale, chunk_size):
    """Gradients of u, weight, bias and chunk_scale of :func:`_within_chunks`."""
    batch, channels, frames = u.shape
    taps, pad = weight.shape[-1], weight.shape[-1] // 2
    size = frames if chunk_size < 0 or chunk_size > frames else chunk_size
    count = -(-frames // size)

    def cut(t: Tensor) -> Tensor:
        t = F.pad(t, (0, count * size - frames)).reshape(batch, channels, count, size)
        return t.transpose(1, 2).reshape(batch * count, channels, size)

    q, padded = cut(grad), F.pad(cut(u), (pad, pad))
    dscale = (q * _conv(padded, weight, bias, size)).sum(0)  # [C, S]
    reach = min(size, taps)
    dchunk_scale = torch.zeros_like(chunk_scale)
    dchunk_scale[0, :, :reach] = dscale[:, :reach]
    dchunk_scale[1, :, taps - reach :] = dscale[:, size - reach :]
    du, dweight, dbias = _conv_backward(q * edge_scale(chunk_scale, size), padded, weight)
    du = du[..., pad : pad + size].reshape(batch, count, channels, size).transpose(1, 2)
    return du.reshape(batch, channels, count * size)[..., :frames], dweight, dbias, dchunk_scale


# --------------------------------------------------------------------------- kernels
# Every function from here to the registration takes the arguments of the registered op, in its order: h, weight, bias,
# causal_weight, causal_bias, chunk_scale, padding_mask, cache, chunk_size, right (SwooshR, or no activation).
def _dtype(h: Tensor, chunk_scale: Tensor | None) -> torch.dtype:
    """That of the output; h and chunk_scale differ under autocast."""
    return h.dtype if chunk_scale is None else torch.promote_types(h.dtype, chunk_scale.dtype)


def _cache_dtype(h: Tensor, cache: Tensor | None) -> torch.dtype:
    return h.dtype if cache is None else torch.promote_types(h.dtype, cache.dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] < 2 else x.contiguous()


def _operands(kernels, h, weight, bias, causal_weight, causal_bias, chunk_scale, mask, cache) -> tuple:
    """Contiguous (h: its channels), and of one dtype where the kernels need that (Triton's do not)."""
    tensors = (h, weight, bias, causal_weight, causal_bias, chunk_scale, cache)
    if kernels.backend == "cpu":
        dtype = _dtype(h, chunk_scale)
        tensors = tuple(t if t is None else t.to(dtype) for t in tensors)
    h, *others = tensors
    *others, cache = (t if t is None else t.contiguous() for t in others)
    return _channels_last(h), *others, mask if mask is None else mask.contiguous(), cache


def forward(*arguments, need_cache: bool = False):
    """y without autograd, by the best kernel for h; with the new cache where that is needed."""
    *tensors, chunk_size, right = arguments
    h, cache = tensors[0], tensors[7]
    kernels = FAMILY.kernels(h, *_others(tensors))
    if kernels is None:
        return definition(
            *tensors[:6],
            padding_mask=tensors[6],
            cache=cache,
            chunk_size=chunk_size,
            activation="swoosh_r" if right else "identity",
            return_cache=need_cache,
        )
    y, new_cache = kernels.forward(*_operands(kernels, *tensors), chunk_size, right, need_cache)
    return (y, new_cache.to(_cache_dtype(h, cache))) if need_cache else y


def _others(tensors) -> tuple[Tensor, ...]:
    """The parameters that may be of another dtype than h."""
    return tuple(t for t in (tensors[1], tensors[5]) if t is not None)


def backward(grad: Tensor, *arguments) -> tuple:
    """The gradients of h to chunk_scale, and of cache, without autograd; None for an absent tensor."""
    *tensors, chunk_size, right = arguments
    kernels = FAMILY.kernels(tensors[0], *_others(tensors))
    if kernels is None:
        return definition_backward(grad, *arguments)
    operands = _operands(kernels, *tensors)
    dtype = operands[0].dtype if kernels.backend == "cpu" else grad.dtype
    found = kernels.backward(_channels_last(grad.to(dtype)), *operands, chunk_size, right)
    wanted = (*tensors[:6], tensors[7])
    return tuple(
        None if t is None else g.to(t.dtype).reshape(t.shape) for g, t in zip(found, wanted, strict=True)
    )


def add_cache_gradient(grad_cache, dh, dcache, h, mask, cache) -> None:
    """Adds what the new cache's gradient gives to dh and dcache, in place: its frames are the last of (cache, u)."""
    frames, pad = h.shape[0], grad_cache.shape[2]
    taken = min(frames, pad)
    if dcache is not None and taken < pad:
        dcache[..., taken:] += grad_cache[..., : pad - taken]
    if not taken:
        return
    x, s = h[frames - taken :].chunk(2, dim=-1)
    du = grad_cache[..., pad - taken :].permute(2, 0, 1)  # [taken, B, C]
    if mask is not None:
        du = du.masked_fill(mask[:, frames - taken :].t().unsqueeze(-1), 0.0)
    gate = torch.sigmoid(s)
    dh[frames - taken :] += torch.cat([du * gate, du * x * gate * (1.0 - gate)], dim=-1).to(dh.dtype)


class _GatedDepthwiseConv(torch.autograd.Function):
    """y, or (y, new cache)."""

    @staticmethod
    def forward(ctx, need_cache: bool, *arguments):
        ctx.save_for_backward(*arguments[:8])
        ctx.rest = arguments[8:]
        return forward(*arguments, need_cache=need_cache)

    @staticmethod
    def backward(ctx, grad: Tensor, grad_cache: Tensor | None = None):
        refuse_double_backward("gated_depthwise_conv")
        tensors = ctx.saved_tensors
        dh, *found, dcache = backward(grad, *tensors, *ctx.rest)
        if grad_cache is not None:
            add_cache_gradient(grad_cache, dh, dcache, tensors[0], tensors[6], tensors[7])
        return None, dh, *found, None, dcache, None, None


class _Native(torch.autograd.Function):
    """y by the native kernels, for operands that they take as they are: they check that, and raise RuntimeError."""

    @staticmethod
    def forward(ctx, kernels, *arguments):
        y = kernels.forward(*arguments, False)[0]
        ctx.save_for_backward(*arguments[:8])
        ctx.rest = arguments[8:]
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward("gated_depthwise_conv")
        tensors = ctx.saved_tensors
        found = ctx.kernels.backward(_channels_last(grad), *tensors, *ctx.rest)
        *found, dcache = (
            g if t is not None else None for g, t in zip(found, (*tensors[:6], tensors[7]), strict=True)
        )
        return None, *found, None, dcache, None, None


# --------------------------------------------------------------------------- registration
_ARGUMENTS = (
    "Tensor h, Tensor weight, Tensor? bias, Tensor? causal_weight, Tensor? causal_bias, Tensor? chunk_scale, "
    "Tensor? padding_mask, Tensor? cache, int chunk_size, bool right"
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _autocast(dtype, h, weight, bias, causal_weight, causal_bias, chunk_scale, *others):
    """As the convolution's autocast rule, with a float32 output where the scale is float32; a narrower h is widened by
    the kernels."""
    if chunk_scale is not None:
        dtype = torch.promote_types(dtype, chunk_scale.dtype)
    if torch.promote_types(h.dtype, dtype) is not dtype:
        (h,) = cast(dtype, h)
    return h, *cast(dtype, weight, bias, causal_weight, causal_bias), chunk_scale, *others


def _fake_forward(h, weight, bias, causal_weight, causal_bias, chunk_scale, mask, cache, chunk_size, right):
    shape = h.shape[0], h.shape[1], h.shape[2] // 2
    if FAMILY.kernels(h, *_others((h, weight, bias, causal_weight, causal_bias, chunk_scale))) is None:
        # the definition's strides
        return h.new_empty(shape[1], shape[2], shape[0], dtype=_dtype(h, chunk_scale)).permute(2, 0, 1)
    return h.new_empty(shape, dtype=_dtype(h, chunk_scale))


def _fake_with_cache(h, weight, *others):
    cache = others[5]
    shape = h.shape[1], h.shape[2] // 2, weight.shape[-1] // 2
    return _fake_forward(h, weight, *others), h.new_empty(shape, dtype=_cache_dtype(h, cache))


def _backward_implementation(grad, *arguments):
    h = arguments[0]
    return tuple(h.new_empty(0) if g is None else g.contiguous() for g in backward(grad, *arguments))


def _fake_backward(grad, h, *others):
    wanted = (h, *others[:5], others[6])
    return tuple(h.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted)


_BACKWARD_OP = register(
    f"gated_depthwise_conv_backward(Tensor grad, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_implementation,
    _fake_backward,
)


def _gradients(ctx, grad: Tensor, grad_cache: Tensor | None = None) -> tuple:
    tensors = ctx.saved_tensors
    found = _BACKWARD_OP(grad, *tensors, *ctx.rest)
    dh, *parameters, dcache = (
        None if t is None else g for g, t in zip(found, (*tensors[:6], tensors[7]), strict=True)
    )
    if grad_cache is not None:
        dh = dh.clone()
        dcache = None if dcache is None else dcache.clone()
        add_cache_gradient(grad_cache, dh, dcache, tensors[0], tensors[6], tensors[7])
    return dh, *parameters, None, dcache, None, None


_OP = register(
    f"gated_depthwise_conv({_ARGUMENTS}) -> Tensor",
    lambda *arguments: forward(*arguments).contiguous(),
    _fake_forward,
    setup_context=_setup_context,
    backward=_gradients,
    autocast=_autocast,
)

_OP_WITH_CACHE = register(
    f"gated_depthwise_conv_with_cache({_ARGUMENTS}) -> (Tensor, Tensor)",
    lambda *arguments: tuple(t.contiguous() for t in forward(*arguments, need_cache=True)),
    _fake_with_cache,
    setup_context=_setup_context,
    backward=_gradients,
    autocast=_autocast,
)


def gated_depthwise_conv(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    causal_weight: Tensor | None = None,
    causal_bias: Tensor | None = None,
    chunk_scale: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    cache: Tensor | None = None,
    chunk_size: int = -1,
    activation: str = "swoosh_r",
    return_cache: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SwooshR of the depthwise convolution over time of x · sigmoid(s), for h = (x, s); plain, or chunk-causal.

    Args:
        h: (T, B, 2C), both halves of a gated projection; float32, bfloat16, float16 or float64. Its channels are read
            where they lie if they are contiguous, whatever the other strides.
        weight: (C, 1, K) or (C, K), K odd: the taps of the plain convolution, padded with zeros to the same length; in
            chunk-causal form those of the convolution within each chunk.
        bias: (C,), of that convolution.
        causal_weight: (C, 1, (K + 1) / 2) or (C, (K + 1) / 2): the taps on this frame and those before it, whatever
            their chunk. Together with chunk_scale it selects the chunk-causal form.
        causal_bias: (C,).
        chunk_scale: (2, C, K): what the scale of the convolution within the chunk has beyond 1, by the distance from
            the chunk's first frame, and to its last.
        padding_mask: (B, T), bool; True: the frame is padding, and counts as 0.
        cache: (B, C, K // 2), chunk-causal form: x · sigmoid(s) of the frames before the first, which else are 0.
        chunk_size: frames of a chunk; -1, or more than T: one chunk holds the whole sequence.
        activation: "swoosh_r" or "identity".
        return_cache: return (y, cache for the frames that follow).
    Returns:
        y (T, B, C), contiguous, in the promotion of h's and chunk_scale's dtype, computed in float32 or better and
        rounded once. The new cache has the promotion of h's and the cache's dtype.
    Raises:
        TypeError: an argument is of the wrong type, or a tensor not floating (padding_mask: not bool).
        ValueError: shapes, dtypes or devices do not match; chunk_size is 0 or less than -1; an argument of the
            chunk-causal form is given without the others.
    """
    tensors = (h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache)
    if (
        not is_compiling()
        and FAMILY.native is not None
        and all(t is None or type(t) in PLAIN for t in tensors)
        and h is not None
        and h.is_cpu
        and type(chunk_size) is int
        and (chunk_size == -1 or (chunk_size > 0 and causal_weight is not None))
        and type(activation) is str
        and activation in ACTIVATIONS
        and type(return_cache) is bool
        and autocast_dtype(h) is None
    ):
        right = ACTIVATIONS[activation]
        try:
            if not is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
                y, new_cache = FAMILY.native.forward(*tensors, chunk_size, right, return_cache)
                return (y, new_cache) if return_cache else y
            if not return_cache:
                return _Native.apply(FAMILY.native, *tensors, chunk_size, right)
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    _check_call(*tensors, chunk_size, activation, return_cache)
    right = ACTIVATIONS[activation]
    if not direct(*tensors):
        if not served("gated_depthwise_conv", h, *_others(tensors)):
            return _define(tensors, chunk_size, activation, return_cache)
        return (_OP_WITH_CACHE if return_cache else _OP)(*tensors, chunk_size, right)
    if FAMILY.kernels(h, *_others(tensors)) is None:
        return _define(tensors, chunk_size, activation, return_cache)
    dtype = autocast_dtype(h)
    if dtype is not None:
        tensors = _autocast(dtype, *tensors)
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _GatedDepthwiseConv.apply(return_cache, *tensors, chunk_size, right)
    return forward(*tensors, chunk_size, right, need_cache=return_cache)


def _define(tensors, chunk_size, activation, return_cache):
    return definition(
        *tensors[:6],
        padding_mask=tensors[6],
        cache=tensors[7],
        chunk_size=chunk_size,
        activation=activation,
        return_cache=return_cache,
    )


def _check_call(
    h,
    weight,
    bias,
    causal_weight,
    causal_bias,
    chunk_scale,
    mask,
    cache,
    chunk_size,
    activation,
    return_cache,
) -> None:
    op = "gated_depthwise_conv"
    _check.floating_tensor(op, "h", h)
    _check.shape(op, "h", h, "(T, B, 2 C)", h.dim() == 3 and h.shape[2] % 2 == 0)
    frames, batch, channels = h.shape[0], h.shape[1], h.shape[2] // 2
    _check.floating_tensor(op, "weight", weight)
    _check.shape(
        op, "weight", weight, f"({channels}, 1, K) or ({channels}, K), K odd", _is_taps(weight, channels)
    )
    taps = weight.shape[-1]
    parameters = {
        "bias": (bias, (channels,)),
        "causal_weight": (causal_weight, (channels, 1, taps // 2 + 1)),
        "causal_bias": (causal_bias, (channels,)),
        "chunk_scale": (chunk_scale, (2, channels, taps)),
        "cache": (cache, (batch, channels, taps // 2)),
    }
    for name, (value, expected) in parameters.items():
        if value is None:
            continue
        _check.floating_tensor(op, name, value)
        ok = tuple(value.shape) == expected
        if name == "causal_weight":
            ok = ok or tuple(value.shape) == (channels, taps // 2 + 1)
        _check.shape(op, name, value, str(expected), ok)
        _check.same_device(op, name, value, h, "h")
    _check.same_device(op, "weight", weight, h, "h")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.layout is not torch.strided:
            got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"fastasr.{op}: padding_mask: expected a bool tensor, got {got}")
        _check.shape(op, "padding_mask", mask, f"({batch}, {frames})", tuple(mask.shape) == (batch, frames))
        _check.same_device(op, "padding_mask", mask, h, "h")
    _check_form(op, causal_weight, causal_bias, chunk_scale, cache, return_cache)
    _check_options(op, causal_weight is not None, chunk_size, activation, return_cache)
    if autocast_dtype(h) is None:
        for name, value in (("weight", weight), *((n, parameters[n][0]) for n in list(parameters)[:3])):
            if value is not None and value.dtype != h.dtype:
                raise TypeError(
                    f"fastasr.{op}: {name}: expected dtype {h.dtype} (that of h), got {value.dtype}"
                )


def _is_taps(weight: Tensor, channels: int) -> bool:
    shape = tuple(weight.shape)
    return (
        (len(shape) == 2 or (len(shape) == 3 and shape[1] == 1))
        and shape[0] == channels
        and shape[-1] % 2 == 1
    )


def _check_form(op, causal_weight, causal_bias, chunk_scale, cache, return_cache) -> None:
    """causal_weight and chunk_scale come together; what belongs to their form, not without them."""
    if causal_weight is None:
        for name, given in (
            ("chunk_scale", chunk_scale is not None),
            ("causal_bias", causal_bias is not None),
            ("cache", cache is not None),
            ("return_cache", bool(return_cache)),
        ):
            if given:
                raise ValueError(
                    f"fastasr.{op}: {name}: expected it together with causal_weight (the chunk-causal form), "
                    f"got no causal_weight"
                )
    elif chunk_scale is None:
        raise ValueError(f"fastasr.{op}: chunk_scale: expected a tensor with causal_weight, got None")


def _check_options(op, chunked, chunk_size, activation, return_cache) -> None:
    _check.integer(op, "chunk_size", chunk_size)
    if chunk_size == 0 or chunk_size < -1 or (chunk_size != -1 and not chunked):
        expected = "a number of frames, or -1" if chunked else "-1 without causal_weight"
        raise ValueError(f"fastasr.{op}: chunk_size: expected {expected}, got {chunk_size}")
    if not isinstance(activation, str):
        raise TypeError(f"fastasr.{op}: activation: expected a str, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"fastasr.{op}: activation: expected one of {tuple(ACTIVATIONS)}, got {activation!r}"
        )
    if not isinstance(return_cache, bool):
        raise TypeError(f"fastasr.{op}: return_cache: expected a bool, got {type(return_cache).__name__}")
