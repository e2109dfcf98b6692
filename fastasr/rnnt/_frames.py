# SPDX-License-Identifier: Apache-2.0
"""The frames that a loss takes: a padded batch (B, T, ...), or packed ones (N, ...), which become one row (1, N, ...).

Everything as wide as the channels or the vocabulary is computed on these, so packed frames have no padding there. The
lattice (B, T, ...) holds a few numbers of each cell, and is always padded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.packed_frames import PackedFrames, begins_in_batch, places, taken
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check

Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Padded:
    """The frames of a padded batch."""

    def __init__(self, batch: int, frames: int) -> None:
        self.batch, self.frames = batch, frames

    def recordings(self, device: torch.device) -> Tensor:
        """Returns the recording of each frame, (N,)."""
        return torch.arange(self.batch, device=device, dtype=torch.int64).repeat_interleave(self.frames)

    def repeated(self, values: Tensor) -> Tensor:
        """Returns values (B, ...) of recordings for each frame."""
        return values.unsqueeze(1).expand(self.batch, self.frames, *values.shape[1:])

    def rows(self, lattice: Tensor) -> Tensor:
        """Returns numbers (B, T, ...) of a lattice by frames."""
        return lattice

    def lattice(self, rows: Tensor) -> Tensor:
        """Returns numbers of each frame as a lattice's, (B, T, ...)."""
        return rows

    def owned(self, rows: Tensor) -> Tensor:
        """Returns rows (..., D) of frames, with zeros in place of those of nobody: gradients of formulas in eager
        PyTorch would be NaN there if the rows are."""
        return rows

    def boundary(self, op: str, value: Tensor | None, length: int, like: Tensor) -> Tensor | None:
        """Returns the boundary of lattices with ``length`` symbols as int64, after checking it."""
        return arguments.boundary(op, value, self.batch, length, self.frames, like)

    def joined(self, lm: Tensor, symbols: Tensor, starts: Tensor, boundary: Tensor | None) -> Operands:
        """Returns contexts, symbols, windows' starts and the boundary as ``ops.rnnt_joiner`` takes them for the
        frames."""
        return lm, symbols, starts, boundary


class Packed(Padded):
    """Packed frames, with lattices of ``longest`` frames."""

    def __init__(self, lengths: Tensor, count: int, longest: int) -> None:
        super().__init__(len(lengths), longest)
        ends = lengths.cumsum(0)
        self.lengths, self.used = lengths, ends[-1]
        begins, after = ends - lengths, begins_in_batch(self.batch, longest, lengths.device)
        self.to_rows = places(begins, lengths, count, after)
        self.to_lattice = places(after, lengths, self.batch * longest, begins)
        self.recording = self.to_rows[0] // max(longest, 1)  # (N,)

    def recordings(self, device: torch.device) -> Tensor:
        return self.recording

    def repeated(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.recording).unsqueeze(0)

    def rows(self, lattice: Tensor) -> Tensor:
        return taken(lattice.flatten(0, 1), self.to_rows, self.to_lattice).unsqueeze(0)

    def lattice(self, rows: Tensor) -> Tensor:
        return taken(rows.squeeze(0), self.to_lattice, self.to_rows).unflatten(0, (self.batch, self.frames))

    def owned(self, rows: Tensor) -> Tensor:
        return rows.masked_fill(self.to_rows[1].view(-1, *(1,) * (rows.dim() - 2)), 0.0)

    def boundary(self, op: str, value: Tensor | None, length: int, like: Tensor) -> Tensor:
        if value is None:
            zero = torch.zeros_like(self.lengths)
            return torch.stack((zero, zero, zero + length, self.lengths), 1)
        value = arguments.boundary(op, value, self.batch, length, self.frames, like)
        if arguments.has_values(value):
            inside = value[:, 3] <= self.lengths
            arguments.holds(op, "boundary", inside, "t_end of at most the recordings' lengths", value[:, 3])
        return value

    def joined(self, lm: Tensor, symbols: Tensor, starts: Tensor, boundary: Tensor | None) -> Operands:
        """The contexts of all recordings form one sequence, in which a frame's window begins at its recording's
        contexts. The symbol between two recordings is in no lattice."""
        positions = lm.shape[1]
        line = F.pad(symbols, (0, 1)).flatten()[:-1]
        zero = self.used.new_zeros(())
        whole = torch.stack((zero, zero, zero + len(line), self.used))
        starts = starts + self.recording * positions
        return lm.flatten(0, 1).unsqueeze(0), line.unsqueeze(0), starts, whole.unsqueeze(0)


def frames_of(
    op: str, name: str, value: Tensor | PackedFrames, dims: str, longest: int | None = None
) -> tuple[Tensor, Padded]:
    """Checks frames, padded ones for as many dimensions as ``dims``, e.g. "(B, T, C)", names, and returns (B, T, ...)
    or (1, N, ...) with their layout.

    ``longest`` is T of packed frames; None: the largest length, for which the host waits on a GPU.
    """
    if not isinstance(value, PackedFrames):
        if longest is not None:
            raise ValueError(f"fastasr.{op}: longest: expected None for padded frames, got {longest}")
        frames = arguments.floating(op, name, value, dims)
        return frames, Padded(*frames.shape[:2])
    frames = arguments.floating(op, f"{name}.frames", value.frames, dims.replace("B, T", "N"))
    lengths = arguments.integers(op, f"{name}.lengths", value.lengths, (None,), frames, f"{name}.frames")
    _check.shape(op, f"{name}.lengths", lengths, "(B,) with B >= 1", len(lengths) > 0)
    if longest is None:
        longest = int(lengths.amax())
    elif _check.integer(op, "longest", longest) < 0:
        raise ValueError(f"fastasr.{op}: longest: expected a number of at least 0, got {longest}")
    arguments.between(op, f"{name}.lengths", lengths, longest, f"lengths in [0, {longest}]")
    if arguments.has_values(lengths):
        expected = f"lengths with a sum of at most {len(frames)} frames"
        arguments.holds(op, f"{name}.lengths", lengths.sum() <= len(frames), expected, lengths)
    return frames.unsqueeze(0), Packed(lengths, len(frames), longest)
