# SPDX-License-Identifier: Apache-2.0
r"""Swoosh, dropout with a mask shared over one dimension, and a linear layer: y = (swoosh(x) ⊙ m) Wᵀ + b.

m = 1 outside training, else [u > p] / (1 − p) with u uniform, of size 1 along the shared dimension. Only x is saved:
backward recomputes a = swoosh(x) ⊙ m in the pass that forms dx = (g W) ⊙ m ⊙ swoosh'(x), then dW = gᵀ a, db = Σ g.
Upstream: ``ActivationDropoutAndLinear`` in ``zipformer.modules.scaling``.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _gemm, _reduced_weights, _swoosh
from fastasr.ops._dropout import draw_mask
from fastasr.ops._linear import FITS, bias_grad
from fastasr.ops._op import op
from fastasr.ops._swoosh import KINDS


# --------------------------------------------------------------------------- kernels
def _activate(kernels, a) -> Tensor:
    """Returns swoosh(x) ⊙ mask, computed in x's dtype; only under autocast does the weight have another one."""
    return kernels.forward(a.x.contiguous(), KINDS[a.kind], a.mask, a.shared_dim).to(a.weight.dtype)


def _launch(op, kernels, a, dtype, keep: bool) -> Tensor:
    return _gemm.forward(_activate(kernels, a), a.weight, a.bias)


def _reduced(kernels, x: Tensor, weight: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    """Returns swoosh(x) Wᵀ + b where weights have copies in fewer bits, whose products activate x themselves."""
    copy = _reduced_weights.of(x, weight)
    if copy is None or copy.watch is not None:  # who watches sees the product's own input
        return _gemm.forward(kernels.forward(x, kind, None, -1), weight, bias)
    return copy.product(x, bias, 1 + kind)


def _gradients(op, kernels, grads, saved, needs) -> tuple[Tensor | None, ...]:
    (grad,) = grads
    x, weight = saved.x, saved.weight
    dx = activation = None
    if needs.x:
        dy = _gemm.input_grad(grad, weight).to(x.dtype).contiguous()
        options = KINDS[saved.kind], saved.mask, saved.shared_dim
        dx, activation = kernels.backward(dy, x.contiguous(), *options, needs.weight)
    elif needs.weight:
        activation = _activate(kernels, saved)
    dweight = _gemm.weight_grad(grad, activation.to(weight.dtype)) if needs.weight else None
    return dx, dweight, bias_grad(grad, kernels.backend) if needs.bias else None


# --------------------------------------------------------------------------- the op
@op(
    _swoosh.FAMILY,
    one_dtype="x weight bias",
    autocast="weight bias",  # upstream computes the activation in x's dtype
    deciding="x",
    launch=_launch,
    gradients=_gradients,
    fast="_gemm.forward(_kernels.forward(x, KINDS[kind], mask, shared_dim), weight, bias) "
    "if mask is not None or not _reduced_weights.copies else _reduced(_kernels, x, weight, bias, KINDS[kind])",
    fast_strides="x",
    fits=FITS,
    summary="activation, dropout with a shared mask, linear layer; saves only x",
)
def swoosh_linear(
    x: Annotated[Tensor, "*S K"],
    weight: Annotated[Tensor, "N K"],
    bias: Annotated[Tensor, "N"] | None = None,
    kind: Annotated[Literal["SwooshL", "SwooshR"], KINDS] = "SwooshL",
    mask: Annotated[Tensor, "...", "constant"] | None = None,
    shared_dim: int = -1,
) -> Annotated[Tensor, "*S N", "weight"]:
    """(swoosh(x) ⊙ mask) weightᵀ + bias for a mask that is given; of size 1 along ``shared_dim``."""
    y = _swoosh.definition(x, kind)
    return F.linear(y if mask is None else y * mask, weight, bias)


with_mask = swoosh_linear


@with_mask.op.public
def swoosh_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: Literal["SwooshL", "SwooshR"] = "SwooshL",
    dropout_p: float = 0.0,
    dropout_shared_dim: int | None = None,
    training: bool = False,
) -> Tensor:
    """(swoosh(x) ⊙ mask) weightᵀ + bias, saving only x for backward.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); bias: (N,) or None; x's dtype, except under autocast, which casts the product as
            ``torch.nn.functional.linear`` does and leaves the activation in x's dtype.
        kind: "SwooshL" or "SwooshR".
        dropout_p: probability of dropping an activation, 0 <= p < 1; used when ``training``.
        dropout_shared_dim: the dimension of x over which the mask is shared; None: every element has its own.
        training: draw a mask (one ``torch.rand`` call) when dropout_p > 0.
    Returns:
        (..., N).
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; kind, dropout_p or dropout_shared_dim out of range.
    """
    if dropout_shared_dim is None and not training and type(dropout_p) is float and 0.0 <= dropout_p < 1.0:
        return with_mask(x, weight, bias, kind)
    if not isinstance(dropout_p, int | float) or isinstance(dropout_p, bool):
        with_mask.op.fail("dropout_p", "a float", type(dropout_p).__name__, TypeError)
    if not 0.0 <= dropout_p < 1.0:
        with_mask.op.fail("dropout_p", "0 <= p < 1", dropout_p)
    if not training or dropout_p == 0.0:
        if dropout_shared_dim is not None:
            _dimension(dropout_shared_dim, x)
        return with_mask(x, weight, bias, kind)
    with_mask.op.checks(x, weight, bias, kind, None, -1)
    dim = None if dropout_shared_dim is None else _dimension(dropout_shared_dim, x)
    return with_mask(x, weight, bias, kind, draw_mask(x, dropout_p, dim), -1 if dim is None else dim)


def _dimension(value: object, x: Tensor) -> int:
    """Returns the shared dimension counted from 0; other checks report a wrong x."""
    if not isinstance(x, Tensor) or not x.dim():
        return -1
    op = with_mask.op
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        op.fail("dropout_shared_dim", "an int", type(value).__name__, TypeError)
    if not -x.dim() <= value < x.dim():
        op.wrong_dimension("dropout_shared_dim", value, x)
    return value % x.dim()
