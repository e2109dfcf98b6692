# SPDX-License-Identifier: Apache-2.0
"""Soft limits on parameter values, by the sign of their gradient.

A parameter outside [min, max] gets a gradient that always pushes it back when the optimizer steps: with
gradient g, below ``min`` it becomes -|g|, above ``max`` it becomes |g|.
"""

import random

import torch

from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.ops import _decided
from fastasr.ops._decided import Drawn


class LimitParamValue(Function):
    @staticmethod
    def forward(ctx, x, min, max):
        ctx.save_for_backward(x)
        ctx.min, ctx.max = min, max
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad = torch.where((x < ctx.min) & (grad > 0), -grad, grad)
        grad = torch.where((x > ctx.max) & (grad < 0), -grad, grad)
        return grad, None, None


def limit_param_value(x, min, max, prob=0.6, training=True):
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


def _drawn(min, max, prob):
    """Returns whether this call limits the gradient, and the limits."""
    min, max = float(min), float(max)
    apply = random.random() < prob
    if apply and min > max:
        raise ValueError(f"limit_param_value: min must not exceed max, got min={min}, max={max}")
    return [apply, min, max]


def recorded_limits(min, max, prob=0.6):
    """Returns the numbers on the device of a call that is being recorded: whether it limits the gradient, min, max."""
    return recording().numbers(lambda: _drawn(min, max, prob), 3).values


def recorded_limit(x, limits, drawn=None):
    """Returns x (C,), limited. With ``drawn`` it returns x for each sequence that is kept and 0 for the others, (batch,
    C).
    """
    return _Limited.apply(x, limits) if drawn is None else _LimitedRows.apply(x, limits, *drawn)


class _Limited(Function):
    """LimitParamValue with numbers on the device: (whether it applies, min, max)."""

    @staticmethod
    def forward(ctx, x, limits):
        ctx.save_for_backward(x, limits)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _decided.limited(grad, *ctx.saved_tensors), None


class _LimitedRows(Function):
    @staticmethod
    def forward(ctx, x, limits, numbers, rate):
        ctx.save_for_backward(x, limits, numbers, rate)
        return _decided.scaled(x, Drawn(numbers, rate))

    @staticmethod
    def backward(ctx, grad):
        x, limits, *drawn = ctx.saved_tensors
        return _decided.limited(grad, x, limits, Drawn(*drawn)), None, None, None
