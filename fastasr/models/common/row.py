# SPDX-License-Identifier: Apache-2.0
"""Batches in one row of a fixed number of frames: recordings lie one after the other, with frames of nobody between
and behind them. Where they begin and end is known on the device alone, so that one recorded call serves every batch.

Products, norms and activations run on these frames as on any others, and nobody reads what they give for the frames of
nobody. Those between two recordings are as many as a convolution sees on one side, and the gate before it sets them to
0: so convolutions need not know where recordings end. Attention does, and BatchNorm's statistics leave frames out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function


class Row(NamedTuple):
    """What blocks get in place of a mask. ``hidden`` (1, N): True at frames of nobody. ``starts`` (2R,): where
    recordings begin and end, as ``ops.rel_attention`` takes it."""

    hidden: Tensor
    starts: Tensor


class Spans(NamedTuple):
    """The frames [begins, ends) of recordings that lie one after the other, both (R,), with a frame or more between.
    ``begins`` does not decrease."""

    begins: Tensor
    ends: Tensor

    @classmethod
    def laid_out(cls, lengths: Tensor, slots: Tensor, count: int) -> "Spans":
        """Returns those of recordings of ``lengths`` (B,) that take ``slots`` (B,) frames, and behind them empty ones,
        ``count`` in all."""
        begins = slots.cumsum(0) - slots
        more = count - len(lengths)
        begins = torch.cat([begins, slots.sum()[None].expand(more)])
        return cls(begins, begins + torch.cat([lengths, lengths.new_zeros(more)]))

    def inside(self, begin: int, count: int, device: torch.device) -> Tensor:
        """Returns which of the frames begin … begin + count − 1 belong to a recording, (1, count)."""
        frame = torch.arange(begin, begin + count, device=device, dtype=torch.int64)
        before = torch.searchsorted(self.begins, frame, right=True) - 1
        return ((before >= 0) & (frame < self.ends[before]))[None]

    def row(self, frames: int) -> Row:
        """Returns the Row of these frames."""
        hidden = ~self.inside(0, frames, self.begins.device)
        return Row(hidden, torch.stack([self.begins, self.ends], 1).flatten())

    def packed(self, batch: Tensor, frames: int) -> Tensor:
        """Returns the row (1, ``frames``, ...) of a batch (B, T, ...), 0 at frames of nobody."""
        of_row, of_batch = self._places(frames, *batch.shape[:2])
        return _Moved.apply(batch.flatten(0, 1), of_row, of_batch)[None]

    def unpacked(self, row: Tensor, batch: int, frames: int) -> Tensor:
        """Returns the batch (B, T, ...) of a row (1, N, ...), 0 behind each recording's end."""
        of_row, of_batch = self._places(row.shape[1], batch, frames)
        return _Moved.apply(row[0], of_batch, of_row).unflatten(0, (batch, frames))

    def _places(self, frames: int, batch: int, longest: int) -> tuple["_Places", "_Places"]:
        """Returns where the frames of a row lie among those of a batch, and the other way round."""
        frame = torch.arange(frames, device=self.begins.device, dtype=torch.int64)
        recording = (torch.searchsorted(self.begins, frame, right=True) - 1).clamp(min=0)
        missing = frame >= self.ends[recording]
        place = (frame - self.begins[recording] + recording * longest).masked_fill(missing, 0)
        frame = torch.arange(longest, device=frame.device, dtype=torch.int64)
        inside = self.begins[:batch, None] + frame
        behind = inside >= self.ends[:batch, None]
        return (place, missing), (inside.masked_fill(behind, 0).flatten(), behind.flatten())


_Places = tuple[Tensor, Tensor]  # of each row among others, and True where it has none


class _Moved(Function):
    """Returns the rows at ``places``, and 0 where they have none. ``back`` are the places of the given rows among
    these: no row is at two of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: _Places, back: _Places) -> Tensor:
        ctx.back = back
        return _moved(rows, *places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _moved(grad, *ctx.back), None, None


def _moved(rows: Tensor, places: Tensor, missing: Tensor) -> Tensor:
    found = rows.index_select(0, places)
    return found.masked_fill_(missing.view(-1, *(1,) * (rows.dim() - 1)), 0.0)


class Capacity(Protocol):
    """What a row has room for: frames of features in all, recordings, and frames of one recording."""

    @property
    def frames(self) -> int | None: ...
    @property
    def recordings(self) -> int | None: ...
    @property
    def longest(self) -> int | None: ...


class Packed(NamedTuple):
    """A call on a row: the arguments of the function that takes the row, which have the same shapes for every batch;
    the frames () of its recordings; and what makes the call's result of that function's."""

    arguments: tuple[Any, ...]
    used: Tensor
    unpack: Callable[[Any], Any]


def why_beyond(capacity: Capacity, batch: int, frames: int, lengths: Tensor) -> str | None:
    """Returns what of a batch (B, T) the row has no room for, or None. It waits for the lengths only where B · T frames
    would be too many."""
    most, recordings, longest = capacity.frames or 0, capacity.recordings or 0, capacity.longest or 0
    if not batch * frames:
        return "it has no frames"
    if batch > recordings:
        return f"it has {batch} recordings, and Graphs allows {recordings}"
    if frames > longest:
        return f"it is padded to {frames} frames, and Graphs allows a recording of {longest}"
    used = int(lengths.sum()) if batch * frames > most else 0
    return f"it has {used} frames, and Graphs allows {most}" if used > most else None


def batch_norm(norm: Any, z: Tensor, hidden: Tensor) -> Tensor:
    """Returns ``norm(z)`` of z (B, T, C) in training mode, with statistics over the frames where ``hidden`` (B, T) is
    False, which change the running ones. ``norm`` is torch's BatchNorm. It has no frame to normalise where all are
    hidden: then it gives finite numbers, and the running statistics stay."""
    exists = (~hidden).unsqueeze(-1)
    y, mean, variance, count = _Normalised.apply(z, exists, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        share = momentum * (count > 0).to(count.dtype)
        unbiased = variance * (count / (count - 1.0).clamp(min=1.0))
        for running, found in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.lerp_(found.to(running.dtype), share.to(running.dtype))
    return y


class _Normalised(Function):
    """(y, mean (C,), biased variance (C,), number of frames ()) of z (B, T, C), in float32 or better."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, exists: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(z.dtype, torch.float32)
        count = exists.sum(dtype=wide)
        share = 1.0 / count.clamp(min=1.0)
        mean = (z * exists).sum((0, 1), dtype=wide) * share
        centred = (z - mean) * exists
        variance = centred.square().sum((0, 1)) * share
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(z, exists, weight, mean, scale, share)
        y = torch.addcmul(bias.to(wide), centred, scale * weight.to(wide)).to(z.dtype)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        z, exists, weight, mean, scale, share = ctx.saved_tensors
        grad = grad * exists.to(mean.dtype)
        normal = (z - mean) * scale
        dbias, dweight = grad.sum((0, 1)), (grad * normal).sum((0, 1))
        inner = grad - (dbias + normal * dweight) * share
        dz = inner * exists * (scale * weight.to(scale.dtype))
        return dz.to(z.dtype), None, dweight.to(weight.dtype), dbias.to(weight.dtype), None
