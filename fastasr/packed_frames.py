# SPDX-License-Identifier: Apache-2.0
"""Packed frames: the recordings of a batch one after the other, in place of a padded batch.

``PackedFrames(frames (N, ...), lengths (B,))`` holds recording b at frames[begin_b : begin_b + lengths_b], where
begin_b = Σ_{a < b} lengths_a. The frames behind the last recording belong to nobody: they fill a fixed capacity, and
nothing reads them, whatever they hold.
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._recording import is_traced
from fastasr._transforms import Function, transforms_active

Places = tuple[Tensor, Tensor]  # of each row among others, and True where it has none


class PackedFrames(NamedTuple):
    """Recordings one after the other without gaps, and frames of nobody behind them.

    Attributes:
        frames: (N, ...).
        lengths: (B,), int64 on the same device, with a sum of at most N. Lengths of 0 are recordings without frames.
            Encoders also take lengths on the CPU with frames on a GPU.
    """

    frames: Tensor
    lengths: Tensor

    def __getattr__(self, name: str) -> NoReturn:
        """Says what to do where a module takes it for a tensor."""
        raise AttributeError(
            f"PackedFrames has no attribute {name!r}. Only some encoders take it, after "
            "fastasr.accelerate(model, ragged=True): pass others the padded batch, packed.unpacked(longest)"
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedFrames":
        """Returns these frames and lengths on a device."""
        return PackedFrames(*(t.to(device, non_blocking=non_blocking) for t in self))

    @property
    def begins(self) -> Tensor:
        """The first frame of each recording, (B,)."""
        return self.lengths.cumsum(0) - self.lengths

    def of_features(self) -> "PackedFrames":
        """Returns these frames for an encoder, with int64 lengths. Their values are checked on the CPU alone.

        Raises TypeError or ValueError unless frames are floating (N, features) and lengths as the class says, of at
        least one recording.
        """
        rows, lengths = self
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            raise TypeError(f"fastasr.PackedFrames: frames: expected a floating tensor, got {_kind(rows)}")
        if rows.dim() != 2:
            raise ValueError(
                f"fastasr.PackedFrames: frames: expected shape (N, features), got {tuple(rows.shape)}"
            )
        _check_lengths("PackedFrames", lengths)
        if not len(lengths):
            raise ValueError("fastasr.PackedFrames: lengths: expected shape (B,) with B >= 1, got (0,)")
        if lengths.device.type != "cpu":
            _check_device("PackedFrames", lengths, rows, "frames")
        else:
            require_lengths("PackedFrames", lengths, len(rows), len(rows))
        return self._replace(lengths=lengths.to(torch.int64))

    def unpacked(self, longest: int) -> Tensor:
        """Returns the padded batch (B, longest, ...), 0 behind each recording's end. No length may be above
        ``longest``."""
        name = "PackedFrames.unpacked"
        if not isinstance(self.frames, Tensor):
            raise TypeError(f"fastasr.{name}: frames: expected a torch.Tensor, got {_kind(self.frames)}")
        _check_lengths(name, self.lengths)
        _check_device(name, self.lengths, self.frames, "frames")
        _check_count(name, "longest", longest)
        require_lengths(name, self.lengths, longest, len(self.frames))
        batch = len(self.lengths)
        after = begins_in_batch(batch, longest, self.lengths.device)
        return moved(self.frames, self.begins, after, self.lengths, batch * longest).unflatten(
            0, (batch, longest)
        )


def packed(batch: Tensor, lengths: Tensor, frames: int | None = None) -> PackedFrames:
    """Packs a padded batch: frames[begin_b + t] = batch[b, t] for t < lengths_b, and 0 at frames of nobody.

    ``PackedFrames.unpacked`` is the inverse. Both are differentiable, and padding and frames of nobody have gradient 0.

    Args:
        batch: (B, T, ...).
        lengths: (B,), integers in [0, T] on the same device.
        frames: N, at least the sum of the lengths; None: the sum, for which the host waits on a GPU.
    Returns:
        PackedFrames of frames (N, ...) and int64 lengths (B,).
    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, devices, lengths or the capacity do not match. A GPU asserts the values itself.
    """
    if not isinstance(batch, Tensor):
        raise TypeError(f"fastasr.packed: batch: expected a torch.Tensor, got {type(batch).__name__}")
    if batch.dim() < 2:
        raise ValueError(f"fastasr.packed: batch: expected shape (B, T, ...), got {tuple(batch.shape)}")
    _check_lengths("packed", lengths)
    if lengths.shape != batch.shape[:1]:
        expected = f"({len(batch)},)"
        raise ValueError(f"fastasr.packed: lengths: expected shape {expected}, got {tuple(lengths.shape)}")
    _check_device("packed", lengths, batch, "batch")
    lengths = lengths.to(torch.int64)
    if frames is None:
        frames = int(lengths.sum())
    else:
        _check_count("packed", "frames", frames, "an int or None")
    require_lengths("packed", lengths, batch.shape[1], frames)
    begins = lengths.cumsum(0) - lengths
    before = begins_in_batch(len(batch), batch.shape[1], lengths.device)
    return PackedFrames(moved(batch.flatten(0, 1), before, begins, lengths, frames), lengths)


def begins_in_batch(batch: int, longest: int, device: torch.device) -> Tensor:
    """Returns where recordings begin among the B · T rows of a padded batch (B, T, ...), (B,)."""
    return torch.arange(batch, device=device, dtype=torch.int64) * longest


def moved(rows: Tensor, before: Tensor, after: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Returns ``count`` rows, in which the recordings of ``lengths`` (B,), which begin at ``before`` (B,) among the
    given ones, begin at ``after``, and 0 elsewhere. Recordings do not overlap, begins are in order, the first is 0."""
    return taken(rows, places(after, lengths, count, before), places(before, lengths, len(rows), after))


def taken(rows: Tensor, places: Places, back: Places) -> Tensor:
    """Returns the rows at ``places``, and 0 where they have none. ``back`` are the places of the given rows among
    these."""
    return _Moved.apply(rows, places, back)


def places(begins: Tensor, lengths: Tensor, count: int, others: Tensor) -> Places:
    """Returns the places of ``count`` rows, in which recordings lie at ``begins``, among those where they lie at
    ``others``."""
    row = torch.arange(count, device=begins.device, dtype=torch.int64)
    if not len(begins):
        return row * 0, row >= 0
    recording = torch.searchsorted(begins, row, right=True) - 1
    within = row - begins[recording]
    missing = within >= lengths[recording]
    return (within + others[recording]).masked_fill(missing, 0), missing


class _Moved(Function):
    """The gradient of a move is the move back: no two gradients of a row meet, so there is nothing to add up."""

    @staticmethod
    def formula(rows: Tensor, places: Places, back: Places) -> Tensor:
        return _moved(rows, *places)

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places, back: Places) -> Tensor:
        ctx.back = back
        return _moved(rows, *places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _moved(grad, *ctx.back), None, None


def _moved(rows: Tensor, places: Tensor, missing: Tensor) -> Tensor:
    if not len(rows):
        return rows.new_zeros(len(places), *rows.shape[1:])
    found, missing = rows.index_select(0, places), missing.view(-1, *(1,) * (rows.dim() - 1))
    # Of a function that fills in place, torch.compile of torch 2.11 makes one without gradients.
    return found.masked_fill(missing, 0) if is_traced() else found.masked_fill_(missing, 0)


def _kind(value: object) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def _check_lengths(name: str, lengths: object) -> None:
    if (
        not isinstance(lengths, Tensor)
        or lengths.is_floating_point()
        or lengths.is_complex()
        or lengths.dtype is torch.bool
    ):
        raise TypeError(f"fastasr.{name}: lengths: expected an integer tensor, got {_kind(lengths)}")
    if lengths.dim() != 1:
        raise ValueError(f"fastasr.{name}: lengths: expected shape (B,), got {tuple(lengths.shape)}")


def _check_device(name: str, lengths: Tensor, like: Tensor, like_name: str) -> None:
    if lengths.device != like.device:
        expected = f"device {like.device} (that of {like_name})"
        raise ValueError(f"fastasr.{name}: lengths: expected {expected}, got {lengths.device}")


def _check_count(name: str, argument: str, count: object, expected: str = "an int") -> None:
    if isinstance(count, bool) or not isinstance(count, int | torch.SymInt):
        raise TypeError(f"fastasr.{name}: {argument}: expected {expected}, got {type(count).__name__}")
    if count < 0:
        raise ValueError(f"fastasr.{name}: {argument}: expected a number of at least 0, got {count}")


def require_lengths(name: str, lengths: Tensor, longest: int, frames: int) -> None:
    """Requires lengths in [0, longest] that fit into ``frames``. A GPU asserts it, so that the host does not wait."""
    if torch.compiler.is_compiling() or transforms_active() or lengths.device.type not in ("cpu", "cuda"):
        return
    total = lengths.sum()
    for right, expected in (
        (((lengths >= 0) & (lengths <= longest)).all(), f"lengths in [0, {longest}]"),
        (total <= frames, f"lengths with a sum of at most {frames} frames"),
    ):
        if lengths.is_cuda:
            torch._assert_async(right, f"fastasr.{name}: expected {expected}")
        elif not right:
            raise ValueError(f"fastasr.{name}: lengths: expected {expected}, got {lengths.tolist()}")
