# SPDX-License-Identifier: Apache-2.0
r"""A residual and the LayerNorm that follows, as blocks with the norm before each branch have between two branches.

t = x + scale · update, the stream of the block;  y = n ⊙ weight + bias, n = (t − mean t) / √(var t + eps), over the
channels, is the input of the next branch. With gradients T of t and Y of y, and d = Y ⊙ weight:
dx = T + (d − mean d − n mean(d n)) / √(var t + eps), dupdate = scale · dx, dweight = Σ_rows Y ⊙ n, dbias = Σ_rows Y.

Under autocast the stream is float32 and a branch computes in 16 bits: y has the dtype of update, the last branch's
output, so that no pass over memory casts it.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _layout
from fastasr.ops._dispatch import Kernels
from fastasr.ops._op import Arguments, Needs, Op, Saved, op


# --------------------------------------------------------------------------- kernels
def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    x, update = _layout.rows(a.x), _layout.rows(a.update)
    return kernels.forward(x, update, a.weight.contiguous(), a.bias.contiguous(), a.eps, a.scale)


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor | None], saved: Saved, needs: Needs
) -> tuple[Tensor, ...]:
    grad_t, grad_y = (None if grad is None else grad.contiguous() for grad in grads)
    if grad_y is None:
        grad_y = torch.zeros_like(saved.update, memory_format=torch.contiguous_format)
    x, update = _layout.rows(saved.x), _layout.rows(saved.update)
    weight, bias = saved.weight.contiguous(), saved.bias.contiguous()
    return kernels.backward(grad_t, grad_y, x, update, weight, bias, saved.eps, saved.scale)


# --------------------------------------------------------------------------- the op
@op(
    "triton",
    returns="t y",
    deciding="x update weight bias",
    launch=_launch,
    gradients=_gradients,
    summary="x + scale · update, and its LayerNorm",
)
def add_norm(
    x: Annotated[Tensor, "*S C, C >= 1"],
    update: Annotated[Tensor, "*S C"],
    weight: Annotated[Tensor, "C"],
    bias: Annotated[Tensor, "C"],
    eps: Annotated[float, ">= 0"] = 1e-5,
    scale: float = 1.0,
) -> tuple[Annotated[Tensor, "*S C", "x + update"], Annotated[Tensor, "*S C", "update"]]:
    """Returns x + scale · update, and its LayerNorm over the last dimension.

    Args:
        x, update: (..., C), one shape. float32, bfloat16, float16 or float64.
        weight, bias: (C,).
        eps: added to the variance.
        scale: the factor of the update.
    Returns:
        The sum, in the promoted dtype of x and update, and the LayerNorm of the sum as it is rounded, computed in
        float32 or better and rounded once to update's dtype. Both have x's shape.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    t = torch.add(x, update, alpha=scale)
    return t, F.layer_norm(t, t.shape[-1:], weight.to(t.dtype), bias.to(t.dtype), eps).to(update.dtype)
