# SPDX-License-Identifier: Apache-2.0
r"""Swoosh, dropout with a mask shared over one dimension, and a linear layer: y = (swoosh(x) ⊙ m) Wᵀ + b.

m = 1 outside training, else [u > p] / (1 − p) with u uniform, of size 1 along the shared dimension, or a row for each
recording of frames that lie one after the other. Only x is saved:
backward recomputes a = swoosh(x) ⊙ m in the pass that forms dx = (g W) ⊙ m ⊙ swoosh'(x), then dW = gᵀ a, db = Σ g.
Upstream: ``ActivationDropoutAndLinear`` in ``zipformer.modules.scaling``.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _gemm, _reduced_weights, _swoosh
from fastasr.ops._dispatch import Kernels
from fastasr.ops._linear import bias_grad, fits, late
from fastasr.ops._op import Arguments, Needs, Op, Saved, op
from fastasr.ops._swoosh import KINDS


# --------------------------------------------------------------------------- kernels
def _activate(kernels: Kernels, a: Arguments) -> Tensor:
    """Returns swoosh(x) ⊙ mask, computed in x's dtype; only under autocast does the weight have another one."""
    return kernels.forward(a.x.contiguous(), KINDS[a.kind], a.mask, a.shared_dim, a.mask_row).to(
        a.weight.dtype
    )


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Tensor:
    return _gemm.forward(_activate(kernels, a), a.weight, a.bias)


def _reduced(kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    """Returns swoosh(x) Wᵀ + b where weights have copies in fewer bits, whose products activate x themselves."""
    copy = _reduced_weights.of(x, weight)
    if copy is None or copy.watch is not None:  # who watches sees the product's own input
        return _gemm.forward(kernels.forward(x, kind, None, -1, None), weight, bias)
    return copy.product(x, bias, 1 + kind)


def _fast(
    kernels: Kernels,
    keep: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    mask: Tensor | None,
    mask_row: Tensor | None,
    shared_dim: int,
) -> Tensor:
    if not fits(x, weight, bias):
        raise NotImplementedError
    if mask is None and _reduced_weights.copies:
        return _reduced(kernels, x, weight, bias, KINDS[kind])
    return _gemm.forward(kernels.forward(x, KINDS[kind], mask, shared_dim, mask_row), weight, bias)


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor | None, ...]:
    (grad,) = grads
    x, weight = saved.x, saved.weight
    dx = activation = None
    if needs.x:
        dy = _gemm.input_grad(grad, weight).to(x.dtype).contiguous()
        options = KINDS[saved.kind], saved.mask, saved.shared_dim, saved.mask_row
        dx, activation = kernels.backward(dy, x.contiguous(), *options, needs.weight)
    elif needs.weight:
        activation = _activate(kernels, saved)
    dweight = None
    if activation is not None and needs.weight:
        dweight = _gemm.weight_grad(grad, activation.to(weight.dtype))
    later = late(kernels, saved.bias, grad)
    return dx, dweight, bias_grad(grad, kernels.backend, later) if needs.bias else None


# --------------------------------------------------------------------------- the op
@op(
    _swoosh.FAMILY,
    one_dtype="x weight bias",
    autocast="weight bias",  # upstream computes the activation in x's dtype
    launch=_launch,
    gradients=_gradients,
    fast=_fast,
)
def swoosh_linear(
    x: Annotated[Tensor, "*S K"],
    weight: Annotated[Tensor, "N K"],
    bias: Annotated[Tensor, "N"] | None = None,
    kind: Annotated[Literal["SwooshL", "SwooshR"], KINDS] = "SwooshL",
    mask: Annotated[Tensor, "...", "constant"] | None = None,
    mask_row: Annotated[Tensor, "*S", torch.int64] | None = None,
    shared_dim: int = -1,
) -> Annotated[Tensor, "*S N", "weight"]:
    """Swoosh, dropout with a shared mask, and a linear layer, saving only x: (swoosh(x) ⊙ mask) weightᵀ + bias.

    The mask is given; its size along ``shared_dim`` is 1. With ``mask_row`` it is (R, K), and the rows of x (..., K)
    name their rows of it.
    """
    y = _swoosh.definition(x, kind)
    if mask is not None and mask_row is not None:
        mask = mask[mask_row]
    return F.linear(y if mask is None else y * mask, weight, bias)
