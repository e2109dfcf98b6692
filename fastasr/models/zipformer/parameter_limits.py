# SPDX-License-Identifier: Apache-2.0
"""Soft limits on parameter values, by the sign of their gradient.

A parameter outside [min, max] gets a gradient that always pushes it back when the optimizer steps: with
gradient g, below ``min`` it becomes -|g|, above ``max`` it becomes |g|.
"""

import random

import torch

from fastasr._transforms import Function


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
    if not training or random.random() >= prob:
        return x
    if min > max:
        raise ValueError(f"limit_param_value: min must not exceed max, got min={min}, max={max}")
    return LimitParamValue.apply(x, min, max)
