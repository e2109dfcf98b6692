# SPDX-License-Identifier: Apache-2.0
"""Soft limits on parameter values, by the sign of their gradient.

A parameter outside [min, max] gets a gradient that always pushes it back when the optimizer steps: with
gradient g, below ``min`` it becomes -|g|, above ``max`` it becomes |g|.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.models.zipformer.schedules import FloatLike
from fastasr.ops import _decided
from fastasr.ops._decided import Drawn


class LimitParamValue(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, min: float, max: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.min, ctx.max = min, max
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad = torch.where((x < ctx.min) & (grad > 0), -grad, grad)
        grad = torch.where((x > ctx.max) & (grad < 0), -grad, grad)
        return grad, None, None


def limit_param_value(
    x: Tensor, min: FloatLike, max: FloatLike, prob: float = 0.6, training: bool = True
) -> Tensor:
    """Returns x itself. In training, a call limits its gradient with probability ``prob``.

    A call in training draws one number from Python's ``random``. Raises ValueError if ``min > max`` and the limit
    applies.
    """
    if not training:
        return x
    if recording() is not None:
        return recorded_limit(x, recorded_limits(min, max, prob))
    apply, min, max = _drawn(min, max, prob)
    if not apply:
        return x
    return LimitParamValue.apply(x, min, max)


def _drawn(min: FloatLike, max: FloatLike, prob: float) -> list[bool | float]:
    """Returns whether this call limits the gradient, and the limits."""
    min, max = float(min), float(max)
    apply = random.random() < prob
    if apply and min > max:
        raise ValueError(f"limit_param_value: min must not exceed max, got min={min}, max={max}")
    return [apply, min, max]


def recorded_limits(min: FloatLike, max: FloatLike, prob: float = 0.6) -> Tensor:
    """Returns the numbers on the device of a call that is being recorded: whether it limits the gradient, min, max."""
    now = recording()
    assert now is not None, "expected a call that is being recorded"
    return now.numbers(lambda: _drawn(min, max, prob), 3).values


def recorded_limit(x: Tensor, limits: Tensor, drawn: Drawn | None = None) -> Tensor:
    """Returns x (C,), limited. With ``drawn`` it returns x for each sequence that is kept and 0 for the others, (batch,
    C).
    """
    now = recording()
    later = None if now is None or now.back is None else partial(now.back.later, x)
    return (
        _Limited.apply(later, x, limits)
        if drawn is None
        else _LimitedRows.apply(later, x, limits, *drawn[:2])
    )


class _Limited(Function):
    """LimitParamValue with numbers on the device: (whether it applies, min, max)."""

    @staticmethod
    def forward(ctx: Any, later: Callable[..., bool] | None, x: Tensor, limits: Tensor) -> Tensor:
        ctx.later = later
        ctx.save_for_backward(x, limits)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, limits = ctx.saved_tensors
        return None, _decided.limited(grad, x, limits, later=ctx.later), None


class _LimitedRows(Function):
    @staticmethod
    def forward(
        ctx: Any, later: Callable[..., bool] | None, x: Tensor, limits: Tensor, numbers: Tensor, rate: Tensor
    ) -> Tensor:
        ctx.later = later
        ctx.save_for_backward(x, limits, numbers, rate)
        return _decided.scaled(x, Drawn(numbers, rate))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, limits, *drawn = ctx.saved_tensors
        return None, _decided.limited(grad, x, limits, Drawn(*drawn), ctx.later), None, None, None
