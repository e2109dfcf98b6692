# SPDX-License-Identifier: Apache-2.0
"""Attention weights that are not in memory. Weighted sums are computed from the projection when they are needed.

For long inputs the weights (heads, batch, time, time) would be the model's largest tensor by far. The layer passes
:class:`UnmaterialisedWeights` to its consumers instead, and each of them runs a kernel that needs O(time) memory. Any
other operation on the weights works too, but materialises them for its own duration. Gradients flow from every consumer
to the projection and the positions.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.models.zipformer.self_attention import Weights
from fastasr.ops import zipformer_attention, zipformer_attention_weights
from fastasr.ops._zipformer_attention import equalised
from fastasr.ops.zipformer_attention import gradients


class UnmaterialisedWeights:
    """The weights of the first ``heads`` heads, (heads, batch, time, time), of the arguments of
    ``fastasr.ops.zipformer_attention_weights``.

    ``weights[0:n]``, ``weights @ values`` and ``weighted(values)`` stay unmaterialised; anything else (comparisons,
    sums, products, other indices, torch functions) works on ``materialised()``. ``equal`` and the arguments in
    ``penalty``, which the first weighted sum applies, are those of ``fastasr.ops.zipformer_attention``. The first
    weighted sums take their projection and positions from the end of ``first``, and leave the rest to later ones. With
    ``sums`` the positions are of :func:`collected`.
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

    @property
    def dtype(self) -> torch.dtype:
        return self.projected.dtype

    @property
    def device(self) -> torch.device:
        return self.projected.device

    @property
    def ndim(self) -> int:
        return 4

    def weighted(self, values: Tensor) -> Tensor:
        """values (time, batch, heads * dim) -> their weighted sums, same shape."""
        penalty, self.penalty = self.penalty, {}
        projected, positions = self.first.pop() if self.first else (self.projected, self.positions)
        sizes = self.num_heads, self.query_head_dim
        options = {"value_heads": self.heads, "equal": self.equal, **penalty, **self.masks}
        if self.sums is not None:
            return _Weighted.apply(projected, positions, values, sizes, options, self.sums)
        return zipformer_attention(projected, positions, values, *sizes, **options)

    def materialised(self) -> Tensor:
        """Returns the weights as a tensor."""
        projected, positions = self.projected, self.positions
        if self.heads < self.num_heads:
            q, k, p = self._parts()
            projected = torch.cat([q, k, p], -1)
            if positions is not None:
                positions = positions[..., : p.shape[-1]]
        weights = zipformer_attention_weights(
            projected, positions, self.heads, self.query_head_dim, **self.masks
        )
        return weights if self.equal is None else torch.where(self.equal != 0, equalised(weights), weights)

    def constant(self, act: Tensor | None = None) -> "UnmaterialisedWeights":
        """Returns equal weights on all sources whose weight is not 0, where the number ``act`` is not 0 (None:
        always). They pass no gradient to these weights."""
        act = self.projected.new_ones(1, dtype=torch.float32) if act is None else act
        return self._of(self.heads, act)

    def _of(self, heads: int, equal: Tensor | None) -> "UnmaterialisedWeights":
        """Returns weights of the first ``heads`` heads, without the penalty."""
        call = self.projected, self.positions, self.num_heads, self.query_head_dim, heads, equal
        return UnmaterialisedWeights(*call, first=self.first, sums=self.sums, **self.masks)

    def _parts(self) -> Iterable:
        """Returns q, k and p of the first ``heads`` heads."""
        dim = self.query_head_dim
        dims = (dim, dim, self.projected.shape[-1] // self.num_heads - 2 * dim)
        parts = self.projected.split([self.num_heads * dim for dim in dims], -1)
        return (part[..., : self.heads * dim] for part, dim in zip(parts, dims, strict=True))

    def __getitem__(self, index: tuple[Any, int] | int | slice) -> Weights:
        if isinstance(index, slice) and index.step in (None, 1) and not index.start:
            heads = len(range(self.heads)[index])
            if heads > 0:
                return self._of(heads, self.equal)
        return self.materialised()[index]

    def __matmul__(self, values: Tensor) -> Tensor:
        shape = self.shape
        same = isinstance(values, Tensor) and values.dtype == self.dtype and values.shape[:-1] == shape[:3]
        if not same:
            return self.materialised() @ values
        y = self.weighted(values.permute(2, 1, 0, 3).flatten(2))
        return y.reshape(shape[2], shape[1], shape[0], values.shape[-1]).permute(2, 1, 0, 3)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function in (torch.matmul, Tensor.matmul) and not kwargs and isinstance(args[0], cls):
            return args[0] @ args[1]

        def plain(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(plain, value))
            return value.materialised() if isinstance(value, cls) else value

        return function(*map(plain, args), **{name: plain(value) for name, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.materialised(), name)

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
        y = zipformer_attention(projected, positions, values, *sizes, **options)
        ctx.dtypes = projected.dtype, values.dtype
        ctx.save_for_backward(*(t.to(y.dtype).contiguous() for t in (projected, positions, values)))
        ctx.sizes, ctx.options, ctx.sums = sizes, options, sums
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, positions, values = ctx.saved_tensors
        heads, dim = ctx.sizes
        found = gradients(grad.contiguous(), x, positions, values, heads, dim, ctx.sums, **ctx.options)
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


def _on_tensors(name: str) -> Callable[..., Tensor]:
    def operator(self: UnmaterialisedWeights, *others: Any) -> Tensor:
        tensors = (o.materialised() if isinstance(o, UnmaterialisedWeights) else o for o in others)
        return getattr(self.materialised(), name)(*tensors)

    return operator


for _name in (
    "gt",
    "ge",
    "lt",
    "le",
    "mul",
    "rmul",
    "add",
    "radd",
    "sub",
    "rsub",
    "truediv",
    "rtruediv",
    "neg",
    "pow",
):
    setattr(UnmaterialisedWeights, f"__{_name}__", _on_tensors(f"__{_name}__"))
