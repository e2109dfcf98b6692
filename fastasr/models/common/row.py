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

from fastasr.packed_frames import moved, places


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
        of_row, of_batch = places(*self, frames, *batch.shape[:2])
        return moved(batch.flatten(0, 1), of_row, of_batch)[None]

    def unpacked(self, row: Tensor, batch: int, frames: int) -> Tensor:
        """Returns the batch (B, T, ...) of a row (1, N, ...), 0 behind each recording's end."""
        of_row, of_batch = places(*self, row.shape[1], batch, frames)
        return moved(row[0], of_batch, of_row).unflatten(0, (batch, frames))


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
