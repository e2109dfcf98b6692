# SPDX-License-Identifier: Apache-2.0
r"""The core of Zipformer's NonlinAttention (Yao et al., 2023, section 3.2): a gate, a weighted sum and a product.

s, v, z are the thirds of ``projected``, W the attention weights of one head:

    x[j] = v[j] tanh(s[j])        o[i] = Σ_j W[i,j] x[j]        y = o z

With gradient g of y and u = g z:

    dz = g o    dW = u xᵀ    dx = Wᵀ u    dv = dx tanh(s)    ds = dx v (1 − tanh²(s))

Upstream: ``NonlinAttention.forward`` in ``zipformer.modules.zipformer``, between its two projections.

The products with W are torch's, or in a forward pass in float32 on the CPU the faster of torch's and fastasr's own
(``_gemm``); around them is one pass each. Memory traffic per element of y beside them:
forward reads s, v, o, z and writes x, y; backward reads s, v, z, g and writes x, u, then reads s, v, dx, g, o and
writes ds, dv, dz. FLOPs of the products: 2 T² B D forward, 4 T² B D backward.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from fastasr.ops import _gemm, _layout
from fastasr.ops._dispatch import FLOATING
from fastasr.ops._nonlin_attention import FAMILY, Passes
from fastasr.ops._op import Arguments, Needs, Op, Saved, op


# --------------------------------------------------------------------------- kernels
def _fits(weights: Tensor, projected: Tensor) -> bool:
    """Checks the operands first, because the vendor's product declines nothing."""
    strided = weights.layout is projected.layout is torch.strided
    if not strided or projected.dim() != 3 or projected.dtype not in FLOATING:
        return False
    frames, batch, channels = projected.shape
    return channels % 3 == 0 and weights.shape == (batch, frames, frames)


def _fast(kernels: Any, keep: bool, weights: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    if not _fits(weights, projected):
        raise NotImplementedError
    return _pass(kernels, weights, projected)


def _pass(kernels: Any, weights: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    projected = _layout.rows(projected)
    o = _gemm.batched(weights, kernels.forward(projected).transpose(0, 1))  # [B, T, D]
    return kernels.product(projected, o), o


def _launch(op: Op, kernels: Passes, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    return _pass(kernels, *a)


def _gradients(
    op: Op, kernels: Passes, grads: Sequence[Tensor], s: Saved, needs: Needs
) -> tuple[Tensor | None, Tensor]:
    projected, grad = _layout.rows(s.projected), grads[0].contiguous()
    x, u = kernels.backward(grad, projected)
    u = u.transpose(0, 1)  # [B, T, D]
    dweights = _gemm.batched(u, x.permute(1, 2, 0)) if needs.weights else None
    dx = _gemm.batched(s.weights.transpose(1, 2), u)
    return dweights, kernels.gradient(dx, grad, projected, s.o)


# --------------------------------------------------------------------------- the op
@op(
    FAMILY,
    one_dtype="projected weights",
    autocast="formula",
    keeps={"o": Annotated[Tensor, "B T D", "projected"]},
    launch=_launch,
    gradients=_gradients,
    fast=_fast,
)
def nonlin_attention(
    weights: Annotated[Tensor, "B T T"], projected: Annotated[Tensor, "T B 3*D"]
) -> Annotated[Tensor, "T B D", "projected"]:
    """The core of Zipformer's NonlinAttention: (W (v tanh(s))) z, with s, v, z the thirds of ``projected``.

    Args:
        weights: (B, T, T), any strides; float32, bfloat16, float16 or float64.
        projected: (T, B, 3 D), of the same dtype outside autocast.
    Returns:
        (T, B, D) in that dtype; x and o are rounded to it too, as in eager. Under autocast the result is eager's.
    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not match.
    """
    s, v, z = projected.chunk(3, dim=-1)
    return torch.bmm(weights, (v * torch.tanh(s)).transpose(0, 1)).transpose(0, 1) * z
