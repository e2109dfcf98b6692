# SPDX-License-Identifier: Apache-2.0
"""Identities whose backward pass scales the gradient or adds to it."""

import logging
import random
from typing import Any

import torch
from torch import Tensor

from fastasr._transforms import Function


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.alpha, None


def scale_grad(x: Tensor, alpha: float) -> Tensor:
    """Returns x; the backward pass multiplies its gradient by ``alpha``."""
    return _ScaleGradient.apply(x, alpha)


class ScaleGrad(torch.nn.Module):
    """x -> x; in training the backward pass multiplies its gradient by ``alpha``."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return scale_grad(x, self.alpha) if self.training else x


class _WithLoss(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.shape = loss.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(ctx.shape)


def draw_for_log() -> bool:
    """Draws the number by which one in 500 calls of upstream's function logs."""
    return random.random() < 0.002


def with_loss(x: Tensor, y: Tensor, name: str | None = None) -> Tensor:
    """Returns x; the gradients are as if y.sum() were part of the loss. It draws one number from ``random``."""
    if draw_for_log() and name is not None:
        logging.debug("with_loss: name=%s, sum=%.3e", name, y.sum().item())
    return _WithLoss.apply(x, y)


class _Penalize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, penalty: float) -> Tensor:
        ctx.save_for_backward((x > limit).to(torch.int8) - (x < -limit).to(torch.int8))
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (sign,) = ctx.saved_tensors
        return torch.add(grad, sign, alpha=ctx.penalty), None, None


def penalize_abs_values_gt(x: Tensor, limit: float, penalty: float, name: str | None = None) -> Tensor:
    """Returns x; the backward pass adds penalty * sign(x) to its gradient where |x| > limit. It draws one number from
    ``random``."""
    if draw_for_log() and name is not None:
        excess = (x.detach().abs() - limit).clamp_(min=0).sum()
        logging.debug("penalize_abs_values_gt: name=%s, loss=%.3e", name, penalty * excess.item())
    return _Penalize.apply(x, limit, penalty)
