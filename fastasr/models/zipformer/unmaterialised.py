# SPDX-License-Identifier: Apache-2.0
"""Attention weights that are not in memory. Weighted sums are computed from the projection when they are needed.

For long inputs the weights (heads, batch, time, time) would be the model's largest tensor by far. The layer passes
:class:`UnmaterialisedWeights` to its consumers instead, and each of them runs a kernel that needs O(time) memory.
Gradients flow from every consumer to the projection and the positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.ops import zipformer_attention
from fastasr.ops._register import autocast_dtype, cast
from fastasr.ops.zipformer_attention import gradients, kept_values


class UnmaterialisedWeights:
    """The weights of the first ``heads`` heads, (heads, batch, time, time), of the arguments of
    ``fastasr.ops.zipformer_attention_weights``.

    ``equal`` and the arguments in ``penalty``, which the first weighted sum applies, are those of
    ``fastasr.ops.zipformer_attention``. The first weighted sums take their projection and positions from the end of
    ``first``, and leave the rest to later ones. With ``sums`` the positions are of :func:`collected`.
    """

    def __init__(
        self,
        projected: Tensor,
        positions: Tensor | None,
        num_heads: int,
        query_head_dim: int,
        heads: int | None = None,
        equal: Tensor | None = None,
        penalty: dict[str, Any] | None = None,
        first: list[tuple[Tensor, Tensor | None]] | None = None,
        sums: Any = None,
        **masks: Any,
    ) -> None:
        self.projected, self.positions, self.first = projected, positions, [] if first is None else first
        self.num_heads, self.query_head_dim, self.masks = num_heads, query_head_dim, masks
        self.heads = num_heads if heads is None else heads
        self.equal, self.penalty, self.sums = equal, penalty or {}, sums

    @property
    def shape(self) -> tuple[int, ...]:
        frames, batch, _ = self.projected.shape
        return torch.Size((self.heads, batch, frames, frames))

    def weighted(self, values: Tensor) -> Tensor:
        """values (time, batch, heads * dim) -> their weighted sums, same shape."""
        penalty, self.penalty = self.penalty, {}
        projected, positions = self.first.pop() if self.first else (self.projected, self.positions)
        sizes = self.num_heads, self.query_head_dim
        options = {"value_heads": self.heads, "equal": self.equal, **penalty, **self.masks}
        if self.sums is not None:
            return _Weighted.apply(projected, positions, values, sizes, options, self.sums)
        return zipformer_attention(projected, positions, values, *sizes, **options)

    def constant(self, act: Tensor | None = None) -> "UnmaterialisedWeights":
        """Returns equal weights on all sources whose weight is not 0, where the number ``act`` is not 0 (None:
        always). They pass no gradient to these weights."""
        act = self.projected.new_ones(1, dtype=torch.float32) if act is None else act
        return self._of(self.heads, act)

    def _of(self, heads: int, equal: Tensor | None) -> "UnmaterialisedWeights":
        """Returns weights of the first ``heads`` heads, without the penalty."""
        call = self.projected, self.positions, self.num_heads, self.query_head_dim, heads, equal
        return UnmaterialisedWeights(*call, first=self.first, sums=self.sums, **self.masks)

    def __getitem__(self, index: slice) -> "UnmaterialisedWeights":
        if index != slice(0, 1):
            raise IndexError(f"UnmaterialisedWeights: only the first head is given apart, got {index}")
        return self._of(1, self.equal)

    def __len__(self) -> int:
        return self.heads


class _Weighted(Function):
    """The weighted sums of a recorded pass, whose gradient of positions goes to ``sums``."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        positions: Tensor,
        values: Tensor,
        sizes: tuple[int, int],
        options: dict[str, Any],
        sums: Any,
    ) -> Tensor:
        ctx.dtypes = projected.dtype, values.dtype
        dtype = autocast_dtype(projected) or projected.dtype
        x, positions, values = (t.contiguous() for t in cast(dtype, projected, positions, values))
        kept = kept_values(x, positions, values, *sizes, **options)
        ctx.save_for_backward(x, positions, values, *kept)
        ctx.sizes, ctx.options, ctx.sums = sizes, options, sums
        return kept[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, positions, values, *kept = ctx.saved_tensors
        heads, dim = ctx.sizes
        found = gradients(grad.contiguous(), kept, x, positions, values, heads, dim, ctx.sums, **ctx.options)
        of_x, of_values = (g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True))
        return of_x, None, of_values, None, None, None


class _Collected(Function):
    @staticmethod
    def forward(ctx: Any, positions: Tensor, sums: Any, count: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(positions)
        ctx.sums = sums
        ctx.set_materialize_grads(False)
        return tuple(positions.view_as(positions) for _ in range(count))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        found = [g for g in grads if g is not None]
        if ctx.sums.parts is not None:
            found.append(ctx.sums.total(positions))
            ctx.sums.parts = None
        return sum(found[1:], found[0]) if found else None, None, None


def collected(positions: Tensor, sums: Any, count: int) -> tuple[Tensor, ...]:
    """Returns the positions for ``count`` consumers, whose backward passes add their gradients to ``sums``."""
    result: tuple[Tensor, ...] = _Collected.apply(positions, sums, count)
    return result
