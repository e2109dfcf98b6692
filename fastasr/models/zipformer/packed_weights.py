# SPDX-License-Identifier: Apache-2.0
"""Attention weights of packed frames: tensors of each recording, where the native kernels form them in one call,
and elsewhere of each group of recordings, as tensors or unmaterialised."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.models.common.ragged import Packing, current
from fastasr.models.common.row import RowFrames
from fastasr.models.zipformer.self_attention import Weights, weighted
from fastasr.ops import _dispatch, nonlin_attention

_native = torch.ops.fastasr_cpu
# Of recordings up to this length the kernel for few columns computes weighted sums for many columns too.
MOST_FRAMES = 128


class PackedWeights:
    """``parts`` are the weights (heads, G, T, T) of each group of recordings of the packing, which see themselves; with
    ``alone`` those (heads, 1, T, T) of each recording that has frames. ``first`` are those of the first head, if the
    gradients of these do not pass through ``parts``."""

    def __init__(
        self,
        packing: Packing,
        parts: Sequence[Weights],
        alone: bool = False,
        first: Sequence[Tensor] | None = None,
    ) -> None:
        self.packing, self.parts, self.alone, self.first = packing, parts, alone, first

    @property
    def shape(self) -> tuple[int, ...]:
        frames = sum(self.packing.lengths)
        return torch.Size((len(self), 1, frames, frames))

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: slice) -> "PackedWeights":
        if self.first is not None and index == slice(0, 1):
            return PackedWeights(self.packing, self.first, self.alone)
        return self.mapped(lambda part: part[index])

    def mapped(self, function: Callable[[Weights], Weights]) -> "PackedWeights":
        return PackedWeights(self.packing, [function(part) for part in self.parts], self.alone)

    def weighted(self, values: Tensor) -> Tensor:
        """values (N, 1, heads * dim) -> their weighted sums, same shape."""
        if self.alone:
            return _Weighted.apply(values.contiguous(), *self.parts)
        pieces = (v.transpose(0, 1) for v in self.packing.stacked(values[:, 0]))
        sums = (weighted(part, v).transpose(0, 1) for part, v in zip(self.parts, pieces, strict=True))
        return self.packing.unstacked(sums).unsqueeze(1)

    @property
    def in_memory(self) -> bool:
        return all(isinstance(part, Tensor) for part in self.parts)

    def gated(self, projected: Tensor) -> Tensor:
        """projected (N, 1, 3 channels) -> the result of ``ops.nonlin_attention`` with the first head's weights."""
        if self.alone:
            return _Gated.apply(projected.contiguous(), *self.parts)
        values = (p.transpose(0, 1) for p in self.packing.stacked(projected[:, 0]))
        parts = zip(self.parts, values, strict=True)
        return self.packing.unstacked(
            nonlin_attention(part[0], p).transpose(0, 1) for part, p in parts
        ).unsqueeze(1)

    def constant(self) -> "PackedWeights":
        """Returns equal weights on all sources whose weight is not 0."""
        return self.mapped(constant_weights)


def constant_weights(weights: Weights) -> Weights:
    """Replaces the weights by equal weights on all sources whose weight is not 0."""
    if not isinstance(weights, Tensor):
        return weights.constant()
    weights = (weights > 0.0).to(weights.dtype)
    return weights * (1.0 / weights.sum(dim=-1, keepdim=True))


def dropped(weights: Tensor, p: float, training: bool) -> Tensor:
    if isinstance(weights, PackedWeights):
        return weights.mapped(lambda part: dropped(part, p, training))
    return torch.nn.functional.dropout(weights, p=p, training=training)


def of_recordings(
    function: Callable[..., Weights],
    projected: Tensor,
    positions: Tensor | None,
    masks: dict[str, Tensor | int | None],
) -> Weights:
    """Returns ``function(projected (T, B, C), positions, **masks)``, for packed frames (N, 1, C) as PackedWeights."""
    packing = current()
    if isinstance(packing, RowFrames):
        return function(projected, positions, **masks, starts=packing.starts)
    if packing is None:
        return function(projected, positions, **masks)
    parts = []
    for group, part in zip(packing.groups, packing.stacked(projected[:, 0]), strict=True):
        rows = positions
        if positions is not None:
            first = positions.shape[1] // 2 + 1 - group.longest
            rows = positions[:, first : first + 2 * group.longest - 1]
        parts.append(function(part.transpose(0, 1), rows, **{**masks, "key_padding_mask": group.hidden}))
    return PackedWeights(packing, parts)


def of_one_call(
    packing: Packing | RowFrames | None,
    projected: Tensor,
    positions: Tensor | None,
    heads: int,
    query_head_dim: int,
    masks: dict[str, Tensor | int | None],
    penalty: float,
    limit: float,
) -> PackedWeights | None:
    """Returns the weights of each recording by one call of the native kernel, or None where that does not serve."""
    if not isinstance(packing, Packing) or not _is_native(projected, positions):
        return None
    window = masks["chunk_size"], masks["left_context_chunks"]
    parts = _Weights.apply(
        projected, positions, packing.lengths, heads, query_head_dim, *window, penalty, limit
    )
    count = len(parts) // 2
    return PackedWeights(packing, parts[:count], True, parts[count:])


def _is_native(first: Tensor, *more: Tensor | None) -> bool:
    """Says whether the native kernels serve these tensors, of one dtype, as they lie in memory."""
    return (
        _dispatch.direct(first, *more)
        and all(
            t is None or (t.is_cpu and t.is_contiguous() and t.dtype is first.dtype) for t in (first, *more)
        )
        and not torch.is_autocast_enabled("cpu")
        and _dispatch.forced_backend() in ("auto", "cpu")
        and not _dispatch.why_not_cpu("zipformer_attention_weights_packed_forward")
    )


class _Weights(Function):
    """Returns the weights of each recording, then those of each one's first head."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, positions: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        call = _native.zipformer_attention_weights_packed_forward.default
        parts = tuple(call(projected, positions, *options[:-2]))
        ctx.save_for_backward(projected, positions, *parts)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return *parts, *(part[:1] for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        projected, positions, *parts = ctx.saved_tensors
        count = len(parts)
        first = [g.contiguous() for g in grads[count:] if g is not None]
        rows = [_of_rows(g, part) for g, part in zip(grads[:count], parts, strict=True)]
        call = _native.zipformer_attention_weights_packed_backward.default
        found = call(rows, first, parts, projected, positions, *ctx.options)
        return found[0], None if positions is None else found[1], *[None] * len(ctx.options)


def _of_rows(grad: Tensor, part: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(part)
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _by_head(rows: Tensor, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yields of each recording the rows (N, 1, heads * dim) as a view (heads, T, dim)."""
    heads = len(parts[0])
    for one in rows[:, 0].unflatten(-1, (heads, -1)).split([part.shape[-1] for part in parts]):
        yield one.transpose(0, 1)


def _is_few(values: Tensor, parts: Sequence[Tensor], columns: bool) -> bool:
    """Says whether the kernel for few ``columns`` computes the sums, as it does for many where recordings are short."""
    few = columns or max(part.shape[-1] for part in parts) <= MOST_FRAMES
    return few and values.dtype is torch.float32 and all(part.stride(-1) == 1 for part in parts)


def _sums(values: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Returns the weighted sums (N, 1, heads * dim) of values of the same shape."""
    if _is_few(values, parts, values.shape[-1] // len(parts[0]) <= 32):
        return _native.weighted_values_packed.default(parts, values)
    y = torch.empty_like(values)
    for part, v, out in zip(parts, _by_head(values, parts), _by_head(y, parts), strict=True):
        out.copy_(torch.bmm(part[:, 0], v))
    return y


def _sums_gradients(
    grad: Tensor, values: Tensor, parts: list[Tensor], needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the gradients of the values and of those weights that need one."""
    if _is_few(values, parts, False) and all(needed):
        return _native.weighted_values_packed_backward.default(grad, parts, values)
    dvalues, dparts = torch.empty_like(values), []
    views = (_by_head(rows, parts) for rows in (grad, values, dvalues))
    for part, g, v, dv, wanted in zip(parts, *views, needed, strict=True):
        dv.copy_(torch.bmm(part[:, 0].transpose(1, 2), g))
        dparts.append(torch.bmm(g, v.transpose(1, 2)).unsqueeze(1) if wanted else None)
    return dvalues, dparts


class _Weighted(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, *parts: Any) -> Tensor:
        ctx.save_for_backward(values, *parts)
        return _sums(values, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, *parts = ctx.saved_tensors
        dvalues, dparts = _sums_gradients(grad.contiguous(), values, parts, ctx.needs_input_grad[1:])
        return dvalues, *dparts


class _Gated(Function):
    """``ops.nonlin_attention``: its passes run over all rows at once."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, *parts: Any) -> Tensor:
        o = _sums(_native.nonlin_attention_gate.default(projected), parts).transpose(0, 1)
        ctx.save_for_backward(projected, o, *parts)
        return _native.nonlin_attention_product.default(projected, o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, o, *parts = ctx.saved_tensors
        grad = grad.contiguous()
        x, u = _native.nonlin_attention_operands.default(grad, projected)
        dx, dparts = _sums_gradients(u, x, parts, ctx.needs_input_grad[1:])
        return _native.nonlin_attention_gradient.default(dx.transpose(0, 1), grad, projected, o), *dparts
