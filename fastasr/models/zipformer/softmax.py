# SPDX-License-Identifier: Apache-2.0
"""Softmax that keeps only its result for the backward pass, in autocast's dtype where autocast is on (CUDA)."""

from typing import Any

import torch
from torch import Tensor

from fastasr._transforms import Function


class _Softmax(Function):
    formula: Any = staticmethod(torch.softmax)

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        y = x.softmax(dim)
        if torch.is_autocast_enabled("cuda"):
            y = y.to(torch.get_autocast_dtype("cuda"))
        ctx.save_for_backward(y)
        ctx.dim, ctx.dtype = dim, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        compute = torch.promote_types(y.dtype, torch.float32)
        grad, y = grad.to(compute), y.to(compute)
        return torch._softmax_backward_data(grad, y, ctx.dim, compute).to(ctx.dtype), None


def softmax(x: Tensor, dim: int) -> Tensor:
    """Returns softmax(x) over ``dim``; gradients are computed in float32 or better."""
    return _Softmax.apply(x, dim) if x.requires_grad else x.softmax(dim)
