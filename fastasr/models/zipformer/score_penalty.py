# SPDX-License-Identifier: Apache-2.0
"""Attention weights of a recorded pass, whose scores have a penalty where a number on the device says so.

It adds penalty sign(S) to dS where |S| > limit; dq, dk, dp and dR follow from dS as in attention.
"""

from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.models.zipformer.decisions import Numbers
from fastasr.ops import zipformer_attention_weights
from fastasr.ops.zipformer_attention_weights import gradients


class _Recorded(Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        positions: Tensor,
        numbers: Numbers,
        sizes: tuple[int, int],
        penalty: float,
        limit: float,
        masks: Any,
    ) -> Tensor:
        weights = zipformer_attention_weights(projected, positions, *sizes, **masks)
        ctx.dtypes = projected.dtype, positions.dtype
        ctx.save_for_backward(weights, *(t.to(weights.dtype) for t in (projected, positions)))
        ctx.sizes, ctx.masks = sizes, masks
        ctx.penalty = penalty, limit, numbers.values[:1]
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, projected, positions = ctx.saved_tensors
        heads, dim = ctx.sizes
        found = gradients(grad, weights, projected, positions, heads, dim, ctx.masks, *ctx.penalty)
        return (
            *(g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)),
            None,
            None,
            None,
            None,
            None,
        )


def recorded_weights(
    projected: Tensor,
    positions: Tensor,
    numbers: Numbers,
    sizes: tuple[int, int],
    penalty: float,
    limit: float,
    masks: dict[str, Any],
) -> Tensor:
    """Returns the attention weights of a call that is recorded; their gradient has the penalty where the first of
    ``numbers`` is not 0.
    """
    return _Recorded.apply(projected, positions, numbers, sizes, penalty, limit, masks)
