# SPDX-License-Identifier: Apache-2.0
r"""The core of Zipformer's NonlinAttention (Yao et al., 2023, section 3.2): a gate, a weighted sum and a product.

s, v, z are the thirds of ``projected``, W the attention weights of one head:

    x[j] = v[j] tanh(s[j])        o[i] = Σ_j W[i,j] x[j]        y = o z

With gradient g of y and u = g z:

    dz = g o    dW = u xᵀ    dx = Wᵀ u    dv = dx tanh(s)    ds = dx v (1 − tanh²(s))

Upstream: ``NonlinAttention.forward`` in ``zipformer.modules.zipformer``, between its two projections.

The products with W are the vendor's; around them is one pass each. Memory traffic per element of y beside them:
forward reads s, v, o, z and writes x, y; backward reads s, v, z, g and writes x, u, then reads s, v, dx, g, o and
writes ds, dv, dz. FLOPs of the products: 2 T² B D forward, 4 T² B D backward.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, is_grad_enabled

from fastasr.ops import _check, _layout
from fastasr.ops._dispatch import (
    PLAIN,
    KernelFamily,
    Kernels,
    direct,
    native_kernels,
    reason_cpu,
    served,
    triton_kernels,
)
from fastasr.ops._register import autocast_dtype, refuse_double_backward, register

OP = "nonlin_attention"


# --------------------------------------------------------------------------- definition
def definition(weights: Tensor, projected: Tensor) -> Tensor:
    """The formula in eager PyTorch."""
    s, v, z = projected.chunk(3, dim=-1)
    return _weighted(weights, v * torch.tanh(s)).transpose(0, 1) * z


def definition_backward(grad: Tensor, weights: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """(dW, dprojected), computed in float32 or better."""
    compute = torch.promote_types(projected.dtype, torch.float32)
    g, w = grad.to(compute), weights.to(compute)
    s, v, z = projected.to(compute).chunk(3, dim=-1)
    t = torch.tanh(s)
    x, u = v * t, g * z
    dz = g * _weighted(w, x).transpose(0, 1)
    dweights, dx = _products(w, u, x)
    dx = dx.transpose(0, 1)
    dprojected = torch.cat([dx * v * (1 - t * t), dx * t, dz], dim=-1)
    return dweights.to(weights.dtype), dprojected.to(projected.dtype)


def _weighted(weights: Tensor, x: Tensor) -> Tensor:
    """o (B, T, D) of W (B, T, S) and x (S, B, D)."""
    return torch.bmm(weights, x.transpose(0, 1))


def _products(weights: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dW (B, T, S) and dx (B, S, D) of W (B, T, S), u (T, B, D) and x (S, B, D)."""
    u = u.transpose(0, 1)
    return torch.bmm(u, x.permute(1, 2, 0)), torch.bmm(weights.transpose(1, 2), u)


# --------------------------------------------------------------------------- kernels
@dataclass(frozen=True)
class _Passes(Kernels):
    """``forward`` is the gate, ``projected -> x``; ``backward`` what precedes the products of the backward pass,
    ``(grad, projected) -> (x, u)``."""

    product: Callable  # (projected, o) -> y
    gradient: Callable  # (dx, grad, projected, o) -> dprojected


def _load(backend: str) -> _Passes:
    if backend == "cpu":
        ops = torch.ops.fastasr_cpu
        found = (getattr(ops, f"{OP}_{name}").default for name in _NAMES)
    else:
        module = importlib.import_module(f"fastasr.kernels.{OP}")
        found = (getattr(module, f"{OP}_{name}") for name in _NAMES)
    return _Passes(backend, *found)


_NAMES = ("gate", "operands", "product", "gradient")
FAMILY = KernelFamily(
    OP,
    (OP,),
    (
        replace(native_kernels(OP), reason=partial(reason_cpu, f"{OP}_gate"), load=partial(_load, "cpu")),
        replace(triton_kernels(OP), load=partial(_load, "triton")),
    ),
)


def forward(weights: Tensor, projected: Tensor) -> Tensor:
    """y without autograd, by the best kernels for the tensors."""
    return _forward(weights, projected)[0]


def _forward(weights: Tensor, projected: Tensor) -> tuple[Tensor, Tensor | None]:
    """y and, where a kernel made it, o."""
    kernels = _kernels(weights, projected)
    if kernels is None:
        return definition(weights, projected).contiguous(), None
    projected = _layout.rows(projected)
    o = _weighted(weights, kernels.forward(projected))
    return kernels.product(projected, o), o


def backward(
    grad: Tensor, weights: Tensor, projected: Tensor, o: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dW, dprojected) without autograd, by the best kernels for the tensors. ``o`` is what the forward pass kept."""
    kernels = _kernels(weights, projected)
    if kernels is None:
        return definition_backward(grad, weights, projected)
    projected, grad = _layout.rows(projected), grad.contiguous()
    x, u = kernels.backward(grad, projected)
    dweights, dx = _products(weights, u, x)
    o = _weighted(weights, x) if o is None else o
    return dweights, kernels.gradient(dx, grad, projected, o)


def _kernels(weights: Tensor, projected: Tensor) -> _Passes | None:
    return FAMILY.kernels(projected) if weights.dtype is projected.dtype else None


class _NonlinAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, projected: Tensor) -> Tensor:
        y, o = _forward(weights, projected)
        ctx.save_for_backward(weights, projected, o)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(OP)
        return backward(grad, *ctx.saved_tensors)


# --------------------------------------------------------------------------- registration
_BACKWARD_OP = register(
    "nonlin_attention_backward(Tensor grad, Tensor weights, Tensor projected) -> (Tensor, Tensor)",
    backward,
    lambda grad, weights, projected: (
        torch.empty(weights.shape, dtype=weights.dtype, device=weights.device),
        torch.empty(projected.shape, dtype=projected.dtype, device=projected.device),
    ),
)


def _fake(weights: Tensor, projected: Tensor) -> Tensor:
    frames, batch, channels = projected.shape
    return projected.new_empty((frames, batch, channels // 3))


_OP = register(
    "nonlin_attention(Tensor weights, Tensor projected) -> Tensor",
    forward,
    _fake,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, grad: _BACKWARD_OP(grad, *ctx.saved_tensors),
    autocast=lambda dtype, *tensors: tensors,  # as they are, and their product with them
)


def nonlin_attention(weights: Tensor, projected: Tensor) -> Tensor:
    """(W (v tanh(s))) z, with s, v, z the thirds of ``projected``.

    Args:
        weights: (B, T, T), any strides; float32, bfloat16, float16 or float64.
        projected: (T, B, 3 D), of the same dtype outside autocast.
    Returns:
        (T, B, D) in that dtype; x and o are rounded to it too, as in eager. Under autocast what eager gives.
    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not match.
    """
    plain = type(weights) in PLAIN and type(projected) in PLAIN
    if not (plain and _fits(weights, projected)):
        _check.floating_tensor(OP, "projected", projected)
        _check.shape(
            OP, "projected", projected, "(T, B, 3 D)", projected.dim() == 3 and projected.shape[-1] % 3 == 0
        )
        _check.floating_tensor(OP, "weights", weights)
        frames, batch, _ = projected.shape
        expected = (batch, frames, frames)
        _check.shape(OP, "weights", weights, f"{expected}", tuple(weights.shape) == expected)
        _check.same_device(OP, "weights", weights, projected, "projected")
    dtype = autocast_dtype(projected)
    if dtype is not None and not (weights.dtype is dtype and projected.dtype is dtype):
        return definition(weights, projected)  # autocast casts its product alone
    if weights.dtype is not projected.dtype:
        raise TypeError(
            f"fastasr.{OP}: weights: expected {projected.dtype} (that of projected), got {weights.dtype}"
        )
    if not direct(weights, projected):
        return (_OP if served(OP, projected) else definition)(weights, projected)
    if FAMILY.kernels(projected) is None:
        return definition(weights, projected)
    if is_grad_enabled() and (weights.requires_grad or projected.requires_grad):
        return _NonlinAttention.apply(weights, projected)
    return forward(weights, projected)


def _fits(weights: Tensor, projected: Tensor) -> bool:
    if projected.dim() != 3 or weights.dim() != 3 or weights.device != projected.device:
        return False
    frames, batch, channels = projected.shape
    return (
        channels % 3 == 0
        and weights.shape == (batch, frames, frames)
        and weights.layout is projected.layout is torch.strided
        and weights.is_floating_point()
        and projected.is_floating_point()
    )
