# SPDX-License-Identifier: Apache-2.0
"""Sinusoidal encodings of relative positions, one table for all sequences of a batch and for all shorter lengths."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from fastasr._recording import is_traced, recording
from fastasr._transforms import is_transformed
from fastasr.ops import _kept

# module -> its longest table so far, and its sources
_TABLES: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Tensor, _kept.Originals]] = (
    weakref.WeakKeyDictionary()
)
# Tables, and their projections in every layer, are kept for sequences of at most this many frames.
KEPT_FRAMES = 1024


def release(module: torch.nn.Module) -> None:
    """Frees the module's table."""
    _TABLES.pop(module, None)


def table(frames: int, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (2 frames − 1, D): row r is for a key frames − 1 − r before its query. Columns 2k and 2k + 1 are sine
    and cosine of the distance times frequencies[k], computed in float32."""
    place = torch.arange(max(0, 2 * frames - 1), dtype=torch.float32, device=frequencies.device)
    angles = (frames - 1.0 - place)[:, None] * frequencies.float()
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).to(dtype)


class FastConformerPositions(torch.nn.Module):
    """hidden states (B, T, D) -> (B, 2K − 1, D), a view of one table; K is T and the cached frames. Row r is that of a
    key K − 1 − r frames before the query. Columns 2k, 2k + 1: sine and cosine of p · 10000^(−2k/D)."""

    inv_freq: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("inv_freq", self._frequencies(None), persistent=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        even = torch.arange(0, self.width, 2, dtype=torch.float32, device=device)
        return 1.0 / 10000.0 ** (even / self.width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FastConformerPositions":
        """Moves the frequencies without casting them to fewer bits, and keeps them in ``to_empty``."""
        before = self.inv_freq
        super()._apply(fn, recurse)
        now = self.inv_freq
        kind = before.dtype, before.device
        if now.is_meta or (now.dtype, now.device) != kind or not torch.equal(now, before):
            wide = torch.promote_types(now.dtype, torch.float32)
            self.inv_freq = self._frequencies(now.device).to(wide)
        return self

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, cached_frames: int = 0) -> Tensor:
        batch, frames = hidden_states.shape[0], hidden_states.shape[1] + cached_frames
        dtype, device = hidden_states.dtype, hidden_states.device
        unkept = is_traced() or is_transformed() or recording() is not None
        if unkept or not 0 < frames <= KEPT_FRAMES:
            rows = table(frames, self.inv_freq.to(device), dtype)
        else:
            kept, originals = _TABLES.get(self, (None, None))
            if (
                kept is None
                or len(kept) < 2 * frames - 1
                or (kept.dtype, kept.device) != (dtype, device)
                or originals is None
                or not originals.unchanged([self.inv_freq, kept])
            ):
                with torch.inference_mode(False):  # a table of inference mode could not be used in training
                    kept = table(frames, self.inv_freq.to(device), dtype)
                # A caller may write into the rows that it gets.
                originals = _kept.Originals([self.inv_freq, kept], compared=[self.inv_freq])
                _TABLES[self] = kept, originals
            first = len(kept) // 2 + 1 - frames
            rows = kept[first : first + 2 * frames - 1]
        return rows.expand(batch, -1, -1)
