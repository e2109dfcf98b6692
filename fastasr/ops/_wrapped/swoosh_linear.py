# SPDX-License-Identifier: Apache-2.0
"""The public swoosh_linear, which draws the dropout mask that the op takes."""

from typing import Any, Literal

from torch import Tensor

from fastasr.ops._dropout import draw_mask
from fastasr.ops._op import OPS
from fastasr.ops._written.swoosh_linear import swoosh_linear as with_mask

op = OPS["swoosh_linear"]


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
        op.fail("dropout_p", "a float", type(dropout_p).__name__, TypeError)
    if not 0.0 <= dropout_p < 1.0:
        op.fail("dropout_p", "0 <= p < 1", dropout_p)
    if not training or dropout_p == 0.0:
        if dropout_shared_dim is not None:
            _dimension(dropout_shared_dim, x)
        return with_mask(x, weight, bias, kind)
    op.written.check(x, weight, bias, kind, None, None, -1)
    dim = None if dropout_shared_dim is None else _dimension(dropout_shared_dim, x)
    return with_mask(x, weight, bias, kind, draw_mask(x, dropout_p, dim), None, -1 if dim is None else dim)


def _dimension(value: Any, x: Tensor) -> int:
    """Returns the shared dimension counted from 0; other checks report a wrong x."""
    if not isinstance(x, Tensor) or not x.dim():
        return -1
    op.wrong_int("dropout_shared_dim", value)
    if not -x.dim() <= value < x.dim():
        op.wrong_dimension("dropout_shared_dim", value, x)
    return value % x.dim()


op.serve(swoosh_linear)
