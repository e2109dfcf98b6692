# SPDX-License-Identifier: Apache-2.0
"""Attention weights of a recorded training pass, whose consumers add up their gradient in one tensor.

Each consumer returns the weights for the next one. In the backward pass the last one computes the gradient of its
weights, and the earlier ones add their products to it in place: no consumer's part is a tensor of its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.models.zipformer.decisions import Numbers
from fastasr.ops import _decided, _gemm, _layout
from fastasr.ops._nonlin_attention import passes
from fastasr.ops._weighted_values import products


class SharedWeights:
    """``weights`` (heads, batch, T, T), for consumers in the order of their calls. ``padded``: between the end of a row
    and the next row are zeros, so that products may take as many columns as are read fastest.
    """

    def __init__(self, weights: Tensor, padded: bool = False) -> None:
        self._weights, self._padded = weights, padded
        self.shape = weights.shape

    def __getitem__(self, index: slice) -> "FirstHead":
        if index != slice(0, 1):
            raise IndexError(f"SharedWeights: only the first head is given apart, got {index}")
        return FirstHead(self)

    def weighted(self, values: Tensor) -> Tensor:
        """values (T, batch, heads * dim) -> their weighted sums, same shape."""
        y, self._weights = _Weighted.apply(self._weights, values)
        return y

    def gated(self, projected: Tensor, constant: Numbers | None) -> Tensor:
        y, self._weights = _Gated.apply(self._weights, projected, constant, self._padded)
        return y


class FirstHead:
    """The first head of shared weights, or equal weights where the number of ``constant`` is not 0."""

    in_memory = True

    def __init__(self, shared: SharedWeights, constant: Numbers | None = None) -> None:
        self.shared, self.constant = shared, constant
        self.shape = torch.Size((1, *shared.shape[1:]))

    def __len__(self) -> int:
        return 1

    def gated(self, projected: Tensor) -> Tensor:
        """projected (T, batch, 3 channels) -> the result of ``ops.nonlin_attention``."""
        return self.shared.gated(projected, self.constant)


def _sources(weights: Tensor, padded: bool) -> int:
    """Returns how many columns products take: with ``padded`` up to a multiple of 8, as far as rows have zeros."""
    sources = weights.shape[-1]
    wide = -(-sources // 8) * 8
    return wide if padded and weights.stride(2) >= wide and _decided.pads(weights) else sources


def _flat(weights: Tensor, sources: int) -> Tensor:
    """Returns the weights as (heads * batch, T, sources)."""
    heads, batch, targets, _ = weights.shape
    if sources == weights.shape[-1]:
        return weights.view(heads * batch, targets, sources)
    row = weights.stride(2)
    return weights.as_strided((heads * batch, targets, sources), (targets * row, row, 1))


def _room(weights: Tensor) -> Tensor:
    """Returns memory for the gradient, with rows as far apart as those of the weights, to the end of the last one."""
    heads, batch, targets, _ = weights.shape
    return weights.new_empty(heads * batch * targets * weights.stride(2)).as_strided(
        weights.shape, weights.stride()
    )


class _Weighted(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.to(weights.dtype).contiguous()
        ctx.save_for_backward(weights, values)
        ctx.set_materialize_grads(False)
        return products(weights, values).forward(weights, values), weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, total: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return total, None
        weights, values = ctx.saved_tensors
        add, total = total is not None, _room(weights) if total is None else total
        gradients: tuple[Tensor, Tensor] = products(weights, values).backward(
            grad.contiguous(), weights, values, total, add
        )
        return gradients


class _Gated(Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, projected: Tensor, constant: Numbers | None, padded: bool
    ) -> tuple[Tensor, Tensor]:
        first = weights[:1]
        if constant is not None:
            first = _decided.either(first, constant.values[:1])
        projected = _layout.rows(projected.to(weights.dtype))
        kernels, sources = passes(weights, projected), _sources(first, padded)
        ctx.constant, ctx.rows = constant, sources
        x = kernels.forward(projected, sources)
        o = _gemm.batched(_flat(first, sources), x.transpose(0, 1))
        ctx.save_for_backward(weights, first, projected, o)
        ctx.set_materialize_grads(False)
        return kernels.product(projected, o), weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, total: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return total, None, None, None
        weights, first, projected, o = ctx.saved_tensors
        kernels: Any = passes(weights, projected)
        grad = grad.contiguous()
        constant = None if ctx.constant is None else ctx.constant.values[:1]  # equal weights have no gradient
        x, u = kernels.backward(grad, projected, ctx.rows, constant)
        u = u.transpose(0, 1)  # [B, T, D]
        dx = _gemm.batched(first[0].mT, u)
        if total is None:
            total = _room(weights).zero_()
        _flat(total, ctx.rows)[: len(u)].baddbmm_(u, x.permute(1, 2, 0))
        return total, kernels.gradient(dx, grad, projected, o), None, None
