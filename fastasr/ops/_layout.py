# SPDX-License-Identifier: Apache-2.0
"""Kernels take contiguous memory. Dense tensors in another order (channels_last) are viewed, not copied."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def _by_stride(x: Tensor, dims: Iterable[int]) -> list[int]:
    """Returns dimensions in the order of memory."""
    strides, sizes = x.stride(), x.shape
    return sorted(dims, key=lambda d: (-strides[d], -sizes[d]))


def elementwise(f: Callable[..., Tensor], x: Tensor, *like: Tensor) -> Tensor:
    """Returns ``f(x, *like)`` of an elementwise ``f`` on contiguous tensors; the result has the strides of
    ``empty_like(x)``.

    ``like`` have x's shape and are brought into its order.
    """
    if x.is_contiguous():
        return f(x, *(t.contiguous() for t in like))
    dense = x
    order = _by_stride(x, range(x.dim()))
    if not x.permute(order).is_contiguous():
        dense = torch.empty_like(x).copy_(x)
        order = _by_stride(dense, range(x.dim()))
        if not dense.permute(order).is_contiguous():
            return f(x.contiguous(), *(t.contiguous() for t in like))
    inverse = [order.index(d) for d in range(x.dim())]
    out = f(dense.permute(order), *(t.permute(order).contiguous() for t in like))
    return out.permute(inverse)


def rows(t: Tensor) -> Tensor:
    """Returns ``t`` itself if its rows (the last dimension) are dense and evenly spaced, as in a slice of a projection,
    and a contiguous copy if not.
    """
    if t.is_contiguous():
        return t
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        return t.contiguous()
    expected = None
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return t.contiguous()
        expected = stride * size
    return t


def dense_channels(t: Tensor) -> Tensor:
    """Returns ``t`` (time, batch, channels) itself if its channels are dense, whatever the other strides, and a copy if
    not.
    """
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


class ChannelRows:
    """``x`` as ``rows`` (count, channels): its dimension ``dim`` comes last, the other ones in the order of memory.
    ``rows`` is a copy only where they are not evenly spaced.
    """

    def __init__(self, x: Tensor, dim: int) -> None:
        dim %= x.dim()
        others = [d for d in range(x.dim()) if d != dim]
        self.order = [*_by_stride(x, others), dim]
        last = x.permute(self.order)
        self.shape = last.shape
        self.rows = last.reshape(last.shape[:-1].numel(), last.shape[-1])

    def of(self, t: Tensor, dense: bool = True) -> Tensor:
        """Returns ``t``, of x's shape, as rows in the same order: contiguous ones, or if not ``dense`` evenly spaced
        ones.
        """
        rows = t.permute(self.order).reshape(self.rows.shape)
        return rows.contiguous() if dense or rows.stride(1) != 1 else rows

    def mask(self, mask: Tensor) -> Tensor:
        """Returns ``mask``, of x's shape without ``dim``, as a contiguous vector in the same order."""
        return mask.unsqueeze(self.order[-1]).permute(self.order).flatten().contiguous()

    def back(self, rows: Tensor) -> Tensor:
        """Returns contiguous rows as a tensor of x's shape."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.view(self.shape).permute(inverse)


def as_it_is(t: Tensor) -> Tensor:
    return t


def as_matrix(t: Tensor) -> Tensor:
    return t.flatten(1).contiguous()


def as_vector(t: Tensor) -> Tensor:
    return t.flatten().contiguous()


def as_int64(t: Tensor) -> Tensor:
    return t.to(torch.int64).contiguous()
