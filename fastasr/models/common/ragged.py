# SPDX-License-Identifier: Apache-2.0
"""Batches without padding: the frames of all recordings lie one after the other, as rows of one tensor.

Products, norms and activations run on these rows as on any others. Attention runs per recording, on views; short
recordings of similar length share a call. A convolution over time runs once over all rows, with frames of zeros between
the recordings. The copies are concatenations of views, so that a backward pass takes time linear in the rows.
"""

import functools
import warnings
from contextlib import contextmanager

import torch
from torch import Tensor

# Shorter recordings share a call of attention or of a front end with others that lack at most so many frames: there
# a call costs more than the padding. On a GPU, which has work for many recordings at once, all do that lack an eighth.
SHORT, LACKING = 64, 8

_all_padded = False


@contextmanager
def padded():
    """Inside the block encoders run on padded batches whatever ``ragged`` says. The setting holds for all threads."""
    global _all_padded
    before, _all_padded = _all_padded, True
    try:
        yield
    finally:
        _all_padded = before


def is_paused() -> bool:
    """Says whether the call is inside ``padded``, or under torch.compile, which lengths as numbers would specialise."""
    return _all_padded or torch.compiler.is_compiling()


def warn(reason: str) -> None:
    """Warns that a batch runs padded. Python shows a warning of the same words once."""
    warnings.warn(f"fastasr: this batch runs on its padding too: {reason}", stacklevel=3)


class Packing:
    """Where the recordings of a batch lie in rows (N, ...), N the sum of ``lengths``; those may be 0."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths, self.device = list(lengths), device

    @functools.cached_property
    def groups(self) -> list[tuple[list[int], int, Tensor | None]]:
        """Returns which recordings share a call: (their numbers, the longest length, hidden frames or None)."""
        groups, longest = [], 0
        for i in sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]):
            length = self.lengths[i]
            on_gpu = self.device.type != "cpu"
            lacking = longest // 8 if on_gpu else LACKING if longest <= SHORT else -1
            if groups and longest - length <= lacking and length:
                groups[-1].append(i)
            elif length:
                groups.append([i])
                longest = length
        return [self._described(members) for members in groups]

    def _described(self, members):
        lengths = [self.lengths[i] for i in members]
        if min(lengths) == lengths[0]:
            return members, lengths[0], None
        frame = torch.arange(lengths[0], device=self.device)
        return members, lengths[0], frame >= torch.tensor(lengths, device=self.device)[:, None]

    def by_group(self, function, *rows: Tensor | list[Tensor], lengths: list[int] | None = None) -> Tensor:
        """Calls ``function(*tensors (G, T, ...), hidden (G, T) or None) -> (G, T', ...)`` for each group of recordings
        and returns the rows of all. ``rows`` are rows, or lists of a tensor per recording; ``lengths`` are those of the
        result, if others."""
        pieces = [t if isinstance(t, list) else t.split(self.lengths) for t in rows]
        lengths, done = lengths or self.lengths, [None] * len(self.lengths)
        for members, longest, hidden in self.groups:
            y = function(*(_stacked([p[i] for i in members], longest) for p in pieces), hidden)
            for i, one in zip(members, y.unbind(0), strict=True):
                done[i] = one[: lengths[i]]
        return torch.cat([one for one in done if one is not None])

    def spread(self, rows: Tensor, slots: list[int]) -> Tensor:
        """Returns rows (N, ...) with zeros behind each recording, so that it takes its number of ``slots``."""
        return _with_zeros(rows.split(self.lengths), slots)

    def gathered(self, rows: Tensor, slots: list[int]) -> Tensor:
        """Undoes ``spread``."""
        sizes = [size for n, slot in zip(self.lengths, slots, strict=True) for size in (n, slot - n)]
        return torch.cat(rows.split(sizes)[::2])

    def with_gaps(self, frames: int) -> list[int]:
        """Returns the slots that leave so many zeros behind each recording."""
        return [length + frames for length in self.lengths]

    def batch(self, rows: Tensor, frames: int) -> Tensor:
        """Returns (B, frames, ...), 0 behind each recording's end."""
        return self.spread(rows, [frames] * len(self.lengths)).unflatten(0, (len(self.lengths), frames))


def _with_zeros(pieces, slots):
    zeros = pieces[0].new_zeros(max(slots), *pieces[0].shape[1:])
    return torch.cat([
        part
        for piece, slot in zip(pieces, slots, strict=True)
        for part in (piece, zeros[: slot - len(piece)])
    ])  # fmt: skip


def _stacked(pieces, longest):
    """Returns (G, longest, ...): one recording as it lies in memory, or several with zeros behind."""
    if len(pieces) == 1:
        return pieces[0].unsqueeze(0)
    return _with_zeros(pieces, [longest] * len(pieces)).unflatten(0, (len(pieces), longest))
