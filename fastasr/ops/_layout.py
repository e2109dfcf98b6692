# SPDX-License-Identifier: Apache-2.0
"""Kernels take contiguous memory. Dense tensors in another order (channels_last) are viewed, not copied."""

from collections.abc import Callable

import torch
from torch import Tensor


def elementwise(f: Callable[..., Tensor], x: Tensor, *like: Tensor):
    """``f(x, *like)`` for an elementwise ``f`` on contiguous tensors; the result has the strides of ``empty_like(x)``.

    ``like`` have x's shape and are brought into its order. ``f`` may return a tuple of tensors of x's shape.
    """
    if x.is_contiguous():
        return f(x, *(t.contiguous() for t in like))
    dense = x
    order = sorted(range(x.dim()), key=lambda d: (-x.stride(d), -x.size(d)))
    if not x.permute(order).is_contiguous():
        dense = torch.empty_like(x).copy_(x)
        order = sorted(range(x.dim()), key=lambda d: (-dense.stride(d), -dense.size(d)))
        if not dense.permute(order).is_contiguous():
            return f(x.contiguous(), *(t.contiguous() for t in like))
    inverse = [order.index(d) for d in range(x.dim())]
    out = f(dense.permute(order), *(t.permute(order).contiguous() for t in like))
    if isinstance(out, tuple):
        return tuple(t.permute(inverse) if t.dim() == x.dim() else t for t in out)
    return out.permute(inverse)
