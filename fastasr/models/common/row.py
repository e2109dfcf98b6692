# SPDX-License-Identifier: Apache-2.0
"""Batches in one row of a fixed number of frames: recordings lie one after the other, with frames of nobody between
and behind them. Where they begin and end is known on the device alone, so that one recorded call serves every batch.

Products, norms and activations run on these frames as on any others, and nobody reads what they give for the frames of
nobody. Attention and Zipformer's convolutions know where recordings begin and end, and statistics leave frames of
nobody out. In a FastConformer as many frames of nobody lie between two recordings as a convolution sees on one side,
and the gate before it sets them to 0: so its convolutions need not know.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common import plumbing
from fastasr.ops import _row
from fastasr.packed_frames import PackedFrames, begins_in_batch

MULTIPLE = 16  # At every rate rows have a multiple of so many frames, as tensor cores like them.


class Row(NamedTuple):
    """What blocks get in place of a mask. ``hidden`` (1, N): True at frames of nobody. ``starts`` (2R,): where
    recordings begin and end, as ``ops.rel_attention`` takes it."""

    hidden: Tensor
    starts: Tensor


class Spans(NamedTuple):
    """The frames [begins, ends) of recordings that lie one after the other, both (R,). The first begins at 0, and the
    begins do not decrease."""

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

    def outside(self, begin: int, count: int, like: Tensor) -> Tensor:
        """Returns which of the frames begin … begin + count − 1, which hold what ``like`` does, belong to nobody,
        (1, count)."""
        (tables,) = _row.tables(like, *self, begin + count, (1,))
        return tables.hidden if begin == 0 else F.pad(tables.hidden, (-begin, 0), value=True)

    def row(self, x: Tensor) -> Row:
        """Returns the Row of the frames x (1, N, ...)."""
        (tables,) = _row.tables(x, *self, x.shape[1], (1,))
        return Row(tables.hidden, tables.starts)

    def packed(self, given: Tensor | PackedFrames, frames: int) -> Tensor:
        """Returns the row (1, ``frames``, ...) of a batch (B, T, ...) or of PackedFrames, 0 at frames of nobody."""
        if isinstance(given, PackedFrames):
            rows, begins = given.frames, given.begins
        else:
            rows, begins = given.flatten(0, 1), begins_in_batch(len(given), given.shape[1], given.device)
        return _row.moved(rows, begins, *self._first(len(begins)), frames)[None]

    def unpacked(self, row: Tensor, batch: int, frames: int) -> Tensor:
        """Returns the batch (B, T, ...) of a row (1, N, ...), 0 behind each recording's end."""
        begins, lengths = self._first(batch)
        rows = _row.moved(row[0], begins, begins_in_batch(batch, frames, row.device), lengths, batch * frames)
        return rows.unflatten(0, (batch, frames))

    def without_gaps(self, row: Tensor, batch: int, frames: int) -> PackedFrames:
        """Returns ``frames`` PackedFrames of the first ``batch`` recordings of a row (1, N, ...)."""
        begins, lengths = self._first(batch)
        return PackedFrames(_row.moved(row[0], begins, lengths.cumsum(0) - lengths, lengths, frames), lengths)

    def _first(self, batch: int) -> tuple[Tensor, Tensor]:
        """Returns where the first ``batch`` recordings begin, and their lengths."""
        return self.begins[:batch], (self.ends - self.begins)[:batch]


class RowFrames:
    """The frames of a row of ``count`` recordings at one rate, as modules ask for them by ``ragged.current()``. The
    ``spans`` begin at multiples of all ``factors``, those of ``at_rate``; no recording has more frames than
    ``longest``. ``like`` is what the frames hold."""

    def __init__(
        self, spans: Spans, frames: int, longest: int, like: Tensor, factors: tuple[int, ...] = ()
    ) -> None:
        self.spans, self.frames, self.longest, self._like = spans, frames, longest, like
        self.count = len(spans.begins)
        self._factors = 1, *factors
        self._rates: dict[int, RowRate] = {}

    @functools.cached_property
    def _tables(self) -> dict[int, _row.Tables]:
        found = _row.tables(self._like, *self.spans, self.frames, self._factors)
        return dict(zip(self._factors, found, strict=True))

    @property
    def recording(self) -> Tensor:
        """The number of each frame's recording, (N,): of frames of nobody that of the one before them."""
        return self._tables[1].recording

    @property
    def left(self) -> Tensor:
        """How many frames of its recording begin with each frame, (N,): 0 or less for frames of nobody."""
        return self._tables[1].left

    @property
    def hidden(self) -> Tensor:
        """True at frames of nobody, (1, N)."""
        return self._tables[1].hidden

    @property
    def starts(self) -> Tensor:
        """Where recordings begin and end, (2R,), as ``ops.zipformer_attention`` takes it."""
        return self._tables[1].starts

    @property
    def knows_gaps(self) -> bool:
        """Says whether frames of nobody see nothing in attention by kernels."""
        return self._tables[1].gaps

    def repeated(self, values: Tensor) -> Tensor:
        """Returns values (R, ...) of the recordings, which need no gradient, repeated for their frames, (N, ...)."""
        return values.index_select(0, self.recording)

    def at_rate(self, factor: int) -> "RowRate":
        """Returns the row after downsampling by ``factor``, and how its frames meet these."""
        if factor not in self._rates:
            self._rates[factor] = RowRate(self, factor)
        return self._rates[factor]

    def slower(self, factor: int) -> "RowFrames":
        """Returns the row of which a frame is ``factor`` of these."""
        tables = self._tables[factor]
        spans = Spans(tables.starts[::2], tables.starts[1::2])
        found = RowFrames(spans, self.frames // factor, -(-self.longest // factor), self._like)
        found._tables = {1: tables}
        return found


class RowRate:
    """Maps frames of a row to those of ``slower``, the row after downsampling by ``factor``, and back."""

    def __init__(self, row: RowFrames, factor: int) -> None:
        self.row, self.factor, self.slower = row, factor, row.slower(factor)

    def averaged(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Returns Σ_i weights[i] rows[factor t + i], (N', ...), for weights (factor,): behind a recording's end, its
        last frame counts again."""
        return _row.averaged(rows, self.row.left, weights)

    def upsampled(self, rows: Tensor) -> Tensor:
        """Returns rows (N', ...) of ``slower``, repeated, as (N, ...)."""
        return rows.unsqueeze(1).expand(-1, self.factor, *rows.shape[1:]).flatten(0, 1)


def all_frames(features: Tensor) -> Tensor:
    """Returns the lengths (B,) of features (B, T, ...) without padding."""
    return torch.full(features.shape[:1], features.shape[1], device=features.device, dtype=torch.int64)


class Capacity(Protocol):
    """What a row has room for: frames of features in all, recordings, and frames of one recording. ``parts`` says that
    the layers of the encoder are recorded one by one."""

    @property
    def frames(self) -> int | None: ...
    @property
    def recordings(self) -> int | None: ...
    @property
    def longest(self) -> int | None: ...
    @property
    def parts(self) -> bool: ...


class Room(NamedTuple):
    """The Capacity of a row for one call that is not recorded."""

    frames: int
    recordings: int
    longest: int
    parts: bool = False

    def run(
        self, encoder: Any, packed: Callable[..., Any], encoded: Callable[..., Any], *args: Any, **more: Any
    ) -> Any:
        """Returns the result of the call that ``packed`` lays out in this room for ``encoded``, or as a text why there
        is none."""
        call = packed(encoder, self, *args, **more)
        return call if isinstance(call, str) else call.unpack(encoded(encoder, *call.arguments))


class RowCall(NamedTuple):
    """A call on a row: the arguments of the function that takes the row, which have the same shapes for every batch;
    the frames of features () of its recordings; and what makes the call's result of that function's."""

    arguments: tuple[Any, ...]
    used: Tensor
    unpack: Callable[[Any], Any]


def why_beyond(
    capacity: Capacity, given: Tensor | PackedFrames, lengths: Tensor, factor: int = 1
) -> str | None:
    """Returns what of a batch (B, T, ...) of these lengths (B,), or of PackedFrames (N, ...), the row has no room for,
    or None. The reason has no number of the batch, because it is logged once. ``factor``: how many frames of features
    each of these stands for. On a GPU it waits for the lengths only where B · T or N frames would be too many. That no
    recording among N frames is too long, the GPU asserts itself."""
    recordings = capacity.recordings or 0
    most, longest = (-(-(n or 0) // factor) for n in (capacity.frames, capacity.longest))
    per = "" if factor == 1 else f" / {factor}"
    packed, batch = isinstance(given, PackedFrames), len(lengths)
    frames = len(given.frames) if isinstance(given, PackedFrames) else given.shape[1]
    if not batch * frames:
        return "it has no frames"
    if batch > recordings:
        return f"it has more recordings than Graphs(recordings={recordings}) allows"
    if frames > longest and not packed:
        return f"it is padded to more frames than Graphs(longest={capacity.longest}){per} allows"
    if frames > longest and lengths.is_cpu and int(lengths.max()) > longest:
        return f"it has a recording of more frames than Graphs(longest={capacity.longest}){per} allows"
    if frames > longest and lengths.is_cuda:
        torch._assert_async((lengths <= longest).all(), f"a recording has more than {longest} frames")
    if frames * (1 if packed else batch) > most and int(lengths.sum()) > most:
        return f"it has more frames than Graphs(frames={capacity.frames}){per} allows"
    return None


def laid_out(
    capacity: Capacity,
    features: Tensor | PackedFrames,
    lengths: Tensor,
    finish: Callable[[Any], Any],
    factor: int,
    subsampled: Callable[[Any], Any],
    between: int,
    more: int = 0,
) -> RowCall | str:
    """Returns the call on a row of features (B, T₀, ...) of these lengths (B,), or of PackedFrames (N₀, ...), or what
    of them is too large. Its arguments are the row (1, N₀, ...), the begins and ends (R,) in it, and the frames that
    the longest recording may have.

    The front end makes ``subsampled(n)`` frames of n, one for each ``factor`` of them, the last of which sees ``more``.
    Behind it ``between`` frames of nobody lie between recordings. ``finish`` gets the hidden states (B, T, ...), 0
    behind each recording's end, or PackedFrames (N, ...).
    """
    reason = why_beyond(capacity, features, lengths)
    if reason is not None:
        return reason
    device = features.frames.device if isinstance(features, PackedFrames) else features.device
    lengths = lengths.to(device, non_blocking=True)  # they may be on the CPU
    if isinstance(features, PackedFrames):
        features = features._replace(lengths=lengths)
    batch, recordings = len(lengths), capacity.recordings or 0
    most = -(-(capacity.frames or 0) // factor) + recordings  # frames that exist
    rows = -(-(most + recordings * between) // MULTIPLE) * MULTIPLE
    out_lengths = subsampled(lengths)
    after = Spans.laid_out(out_lengths, out_lengths + between, recordings)
    begins = after.begins * factor
    before = Spans(begins, begins + F.pad(lengths, (0, recordings - batch)))

    def unpack(hidden: Tensor) -> Any:
        if isinstance(features, PackedFrames):
            return finish(after.without_gaps(hidden, batch, most))
        return finish(after.unpacked(hidden, batch, subsampled(features.shape[1])))

    arguments = before.packed(features, rows * factor + more), *before, capacity.longest
    return RowCall(arguments, lengths.sum(), unpack)


def gap(convs: Iterable[Any], least: int = 1) -> int:
    """Returns how many frames of nobody must lie between recordings for these convolutions over time: as many as one
    sees on one side, and at ``least`` these."""
    sides = (conv.weight.shape[-1] // 2 + abs(plumbing.conv_delay(conv) or 0) for conv in convs)
    return max([least, *sides])
