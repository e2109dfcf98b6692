# SPDX-License-Identifier: Apache-2.0
"""Attention weights of a recorded training pass, whose consumers add up their gradient in one tensor.

Each consumer returns the weights for the next one. In the backward pass the last one computes the gradient of what it
was given, and those before it add their products to it in place: no consumer's part is a tensor of its own.
"""

import torch
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.ops import _decided, _gemm, _layout
from fastasr.ops.nonlin_attention import passes


class SharedWeights:
    """``weights`` (heads, batch, T, T), for consumers in the order of their calls."""

    def __init__(self, weights):
        self._weights = weights
        self.shape = weights.shape

    def __getitem__(self, index):
        if index != slice(0, 1):
            raise IndexError(f"SharedWeights: only the first head is given apart, got {index}")
        return FirstHead(self)

    def weighted(self, values):
        """values (T, batch, heads * dim) -> their weighted sums, same shape."""
        y, self._weights = _Weighted.apply(self._weights, values)
        return y

    def gated(self, projected, constant):
        y, self._weights = _Gated.apply(self._weights, projected, constant)
        return y


class FirstHead:
    """The first head of shared weights, or equal weights where the first number of ``constant`` is not 0. The second
    one is 1 where the first is 0.
    """

    in_memory = True

    def __init__(self, shared, constant=None):
        self.shared, self.constant = shared, constant
        self.shape = torch.Size((1, *shared.shape[1:]))

    def __len__(self):
        return 1

    def gated(self, projected):
        """projected (T, batch, 3 channels) -> what ``ops.nonlin_attention`` makes of it."""
        return self.shared.gated(projected, self.constant)


def _by_head(t, heads):
    """(T, B, H * d) -> (H * B, T, d), contiguous."""
    frames, batch, channels = t.shape
    t = t.reshape(frames, batch, heads, channels // heads).permute(2, 1, 0, 3)
    return t.reshape(heads * batch, frames, channels // heads)


def _together(t, heads):
    """(H * B, T, d) -> (T, B, H * d), contiguous."""
    _, frames, dim = t.shape
    return t.view(heads, -1, frames, dim).permute(2, 1, 0, 3).reshape(frames, -1, heads * dim)


def _flat(weights):
    return weights.view(-1, *weights.shape[2:])


def _room(weights):
    """Returns memory for the gradient, with rows as far apart as those of the weights."""
    return torch.empty_strided(weights.shape, weights.stride(), dtype=weights.dtype, device=weights.device)


class _Weighted(Function):
    @staticmethod
    def forward(ctx, weights, values):
        values = _by_head(values, len(weights)).to(weights.dtype)
        ctx.save_for_backward(weights, values)
        ctx.set_materialize_grads(False)
        return _together(torch.bmm(_flat(weights), values), len(weights)), weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, total):
        if grad is None:
            return total, None
        weights, values = ctx.saved_tensors
        grad = _by_head(grad, len(weights))
        if total is None:
            total = _room(weights)
            torch.bmm(grad, values.mT, out=_flat(total))
        else:
            _flat(total).baddbmm_(grad, values.mT)
        return total, _together(torch.bmm(_flat(weights).mT, grad), len(weights))


class _Gated(Function):
    @staticmethod
    def forward(ctx, weights, projected, constant):
        first = weights[:1]
        if constant is not None:
            first = _decided.either(first, constant.values[:1])
        projected = _layout.rows(projected.to(weights.dtype))
        kernels = passes(weights, projected)
        o = _gemm.batched(first[0], kernels.forward(projected).transpose(0, 1))
        ctx.save_for_backward(weights, first, projected, o)
        ctx.constant = constant
        ctx.set_materialize_grads(False)
        return kernels.product(projected, o), weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, total):
        if grad is None:
            return total, None, None
        weights, first, projected, o = ctx.saved_tensors
        kernels, grad = passes(weights, projected), grad.contiguous()
        x, u = kernels.backward(grad, projected)
        u = u.transpose(0, 1)  # [B, T, D]
        dx = _gemm.batched(first[0].mT, u)
        if ctx.constant is not None:
            x.mul_(ctx.constant.values[1])  # equal weights have no gradient
        if total is None:
            total = _room(weights).zero_()
        total[0].baddbmm_(u, x.permute(1, 2, 0))
        return total, kernels.gradient(dx, grad, projected, o), None
