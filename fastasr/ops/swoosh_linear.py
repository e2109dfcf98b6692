# SPDX-License-Identifier: Apache-2.0
r"""Swoosh, dropout with a mask shared over one dimension, and a linear layer: y = (swoosh(x) ⊙ m) Wᵀ + b.

m = 1 outside training, else [u > p] / (1 − p) with u uniform, of size 1 along the shared dimension. Only x is saved:
backward recomputes a = swoosh(x) ⊙ m in the pass that forms dx = (g W) ⊙ m ⊙ swoosh'(x), then dW = gᵀ a, db = Σ g.
Upstream: ``ActivationDropoutAndLinear`` in ``zipformer.modules.scaling``.

Memory traffic per element of x besides the products: read x, write a forward; read x and g W, write a and dx backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check, _gemm, swoosh
from fastasr.ops._dispatch import direct, served
from fastasr.ops._register import autocast_dtype, refuse_double_backward, register
from fastasr.ops.linear import bias_grad, check_affine, plain_affine

FAMILY = swoosh.FAMILY
KINDS = {"SwooshL": False, "SwooshR": True}


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    mask: Tensor | None = None,
    shared_dim: int = -1,
) -> Tensor:
    """The formula in eager PyTorch, for a given mask."""
    y = swoosh.definition(x, KINDS[kind])
    if mask is not None:
        y = y * mask
    return F.linear(y, weight, bias)


def draw_mask(x: Tensor, dropout_p: float, dropout_shared_dim: int | None) -> Tensor:
    """The dropout mask: one ``torch.rand`` call of x's dtype, as upstream draws it."""
    shape = list(x.shape)
    if dropout_shared_dim is not None:
        shape[dropout_shared_dim] = 1
    kept = torch.rand(*shape, device=x.device, dtype=x.dtype) > dropout_p
    return kept.to(x.dtype) * (1.0 / (1.0 - dropout_p))


# --------------------------------------------------------------------------- kernels
def activate(x: Tensor, kind: str, mask: Tensor | None, shared_dim: int) -> Tensor:
    """swoosh(x) ⊙ mask without autograd, in one pass."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        y = swoosh.definition(x, KINDS[kind])
        return y if mask is None else y * mask
    return kernels.forward(x.contiguous(), KINDS[kind], mask, shared_dim)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, mask: Tensor | None, shared_dim: int
) -> Tensor:
    """y without autograd. The activation is computed in x's dtype and cast to the weight's (they differ under autocast
    alone)."""
    return _gemm.forward(activate(x, kind, mask, shared_dim).to(weight.dtype), weight, bias)


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kind: str,
    mask: Tensor | None,
    shared_dim: int,
    needs: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) without autograd; None for each that ``needs`` does not ask for."""
    dx = activation = None
    if needs[0]:
        dy = _gemm.input_grad(grad, weight).to(x.dtype)
        kernels = FAMILY.kernels(x)
        if kernels is None:
            dx, activation = swoosh.definition_backward(dy, x, KINDS[kind], mask, needs[1])
        else:
            dx, activation = kernels.backward(
                dy.contiguous(), x.contiguous(), KINDS[kind], mask, shared_dim, bool(needs[1])
            )
    elif needs[1]:
        activation = activate(x, kind, mask, shared_dim)
    dweight = _gemm.weight_grad(grad, activation.to(weight.dtype)) if needs[1] else None
    return dx, dweight, bias_grad(grad) if needs[2] else None


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kind: str,
    mask: Tensor | None,
    shared_dim: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gradients` as a registered op returns them: an empty tensor for None."""
    dx, dweight, dbias = gradients(grad, x, weight, kind, mask, shared_dim, needs)
    return (
        x.new_empty(0) if dx is None else dx,
        grad.new_empty(0) if dweight is None else dweight,
        grad.new_empty(0) if dbias is None else dbias,
    )


class _SwooshLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, kind, mask, shared_dim):
        ctx.save_for_backward(x, weight, mask)
        ctx.kind, ctx.shared_dim = kind, shared_dim
        return forward(x, weight, bias, kind, mask, shared_dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward("swoosh_linear")
        x, weight, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return *gradients(grad, x, weight, ctx.kind, mask, ctx.shared_dim, needs), None, None, None


# --------------------------------------------------------------------------- registration
def _fake_forward(x, weight, bias, kind, mask, shared_dim) -> Tensor:
    return weight.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(grad, x, weight, kind, mask, shared_dim, needs):
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        grad.new_empty(weight.shape if needs[1] else (0,)),
        grad.new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


_BACKWARD_OP = register(
    "swoosh_linear_backward(Tensor grad, Tensor x, Tensor weight, str kind, Tensor? mask, int shared_dim, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.kind, mask, ctx.shared_dim = inputs
    ctx.save_for_backward(x, weight, mask)


def _op_backward(ctx, grad: Tensor):
    x, weight, mask = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = _BACKWARD_OP(grad, x, weight, ctx.kind, mask, ctx.shared_dim, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


def _autocast(dtype: torch.dtype, x, weight, bias, kind, mask, shared_dim):
    # upstream computes the activation in the dtype it comes in; only the product is autocast's
    return x, weight.to(dtype), None if bias is None else bias.to(dtype), kind, mask, shared_dim


_OP = register(
    "swoosh_linear(Tensor x, Tensor weight, Tensor? bias, str kind, Tensor? mask, int shared_dim) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
    autocast=_autocast,
)


def swoosh_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: str = "SwooshL",
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
    if (
        not is_compiling()
        and FAMILY.native is not None
        and not training
        and plain_affine(x, weight, bias)
        and type(kind) is str
        and type(dropout_p) is float
        and 0.0 <= dropout_p < 1.0
        and (
            dropout_shared_dim is None
            or (type(dropout_shared_dim) is int and -x.dim() <= dropout_shared_dim < x.dim())
        )
        and x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return _SwooshLinear.apply(x, weight, bias, kind, None, -1)
            return _gemm.forward(FAMILY.native.forward(x, KINDS[kind], None, -1), weight, bias)
        except (RuntimeError, KeyError):
            pass  # the checked path tells why
    op = "swoosh_linear"
    dtype = autocast_dtype(x) if isinstance(x, Tensor) else None
    check_affine(op, x, weight, bias, dtype is None)
    if not isinstance(kind, str):
        raise TypeError(f"fastasr.{op}: kind: expected a str, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"fastasr.{op}: kind: expected 'SwooshL' or 'SwooshR', got {kind!r}")
    mask, shared_dim = None, -1
    if not isinstance(dropout_p, int | float) or isinstance(dropout_p, bool):
        raise TypeError(f"fastasr.{op}: dropout_p: expected a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"fastasr.{op}: dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if dropout_shared_dim is not None:
        dropout_shared_dim = _check.dimension(op, "dropout_shared_dim", dropout_shared_dim, x.dim())
    if training and dropout_p > 0.0:
        mask = draw_mask(x, dropout_p, dropout_shared_dim)
        shared_dim = -1 if dropout_shared_dim is None else dropout_shared_dim
    if not direct(x, weight, bias, mask):
        if not served("swoosh", x):
            return definition(x, weight, bias, kind, mask)
        return _OP(x, weight, bias, kind, mask, shared_dim)
    if FAMILY.kernels(x) is None:
        return definition(x, weight, bias, kind, mask)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _SwooshLinear.apply(x, weight, bias, kind, mask, shared_dim)
    return forward(x, weight, bias, kind, mask, shared_dim)
