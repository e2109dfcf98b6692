# SPDX-License-Identifier: Apache-2.0
r"""A residual and the two norms that follow, where a block ends with a norm and the next one begins with a norm.

s = x + scale · u;  t = n ⊙ weight + bias, the stream of the next block, with n = (s − mean s) / √(var s + eps);
y = m ⊙ next_weight + next_bias, the input of its first branch, with m = (t − mean t) / √(var t + next_eps). With
gradients T of t and Y of y, d = Y ⊙ next_weight and e = g ⊙ weight:
g = T + (d − mean d − m mean(d m)) / √(var t + next_eps);  dx = (e − mean e − n mean(e n)) / √(var s + eps);
du = scale · dx;
dweight = Σ_rows g ⊙ n, dbias = Σ_rows g, dnext_weight = Σ_rows Y ⊙ m, dnext_bias = Σ_rows Y.

Under autocast the stream is float32 and a branch computes in 16 bits: y has the dtype of u. Memory traffic per element
then: read x and u, write t and y, 12 bytes; read these gradients, x and u, write dx and du, 18 bytes backward.

Upstream: ``norm_out`` of one ``ParakeetEncoderBlock`` in transformers and ``norm_feed_forward1`` of the next.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fastasr.ops._dispatch import Kernels, triton_kernels
from fastasr.ops._linear import LateFamily, late_sums
from fastasr.ops._norm import normed
from fastasr.ops._op import Needs, Op, Saved, op
from fastasr.ops._runtime import operand


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor, ...]:
    late = late_sums(kernels, saved.weight, saved.bias, saved.next_weight, saved.next_bias)
    operands = (operand(t, None) for t in (*grads, *saved[:6]))
    return kernels.backward(*operands, *saved[6:], *(() if late is None else (late,)))


FAMILY = LateFamily("add_two_norms", ("add_two_norms",), (triton_kernels("add_two_norms"),))


@op(FAMILY, gradients=_gradients)
def add_two_norms(
    x: Annotated[Tensor, "*S C, C >= 1"],
    update: Annotated[Tensor, "*S C"],
    weight: Annotated[Tensor, "C"],
    bias: Annotated[Tensor, "C"],
    next_weight: Annotated[Tensor, "C"],
    next_bias: Annotated[Tensor, "C"],
    eps: Annotated[float, ">= 0"] = 1e-5,
    next_eps: Annotated[float, ">= 0"] = 1e-5,
    scale: float = 1.0,
) -> tuple[Annotated[Tensor, "t: *S C", "x + update"], Annotated[Tensor, "y: *S C", "update"]]:
    """Returns the LayerNorm of x + scale · update over the last dimension, and the LayerNorm of this result.

    Args:
        x, update: (..., C), one shape. float32, bfloat16, float16 or float64.
        weight, bias: (C,), of the first norm; next_weight, next_bias: (C,), of the second.
        eps, next_eps: added to the variances.
        scale: the factor of the update.
    Returns:
        The first norm, in the promoted dtype of x and update, and the norm of this norm as it is rounded, in update's
        dtype. Both have x's shape, are computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    t = normed(torch.add(x, update, alpha=scale), weight, bias, eps, "layer")
    return t, normed(t, next_weight, next_bias, next_eps, "layer").to(update.dtype)
