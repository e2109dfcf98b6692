# SPDX-License-Identifier: Apache-2.0
"""Recordings that lie one after the other in a sequence: the frames between two starts are one recording.

Kernels read where the recordings of frames begin and end from a table, which ``bounds`` makes in one launch: to compare
the frames of every tile with the starts would take longer than the tile.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import cdiv, launch

RECORDINGS = tl.constexpr(32)  # starts that are read at a time
LAST = tl.constexpr(2**31 - 1)
TABLE = {"BLOCK": 128, "num_warps": 4}


@triton.jit
def recordings_of(i, STARTS, count):
    """Returns [first, end) of the recordings of frames i. A frame of none has the next start, or the last one, as both:
    neither number decreases along the frames."""
    first = tl.full(i.shape, -1, tl.int32)
    end = tl.full(i.shape, LAST, tl.int32)
    for n in range(0, count, RECORDINGS):
        r = n + tl.arange(0, RECORDINGS)
        start = tl.minimum(tl.maximum(tl.load(STARTS + r, mask=r < count, other=0), 0), LAST - 1).to(tl.int32)
        start = tl.where(r < count, start, LAST)[None, :]
        begun = start <= i[:, None]  # [frames, RECORDINGS]
        first = tl.maximum(first, tl.max(tl.where(begun, start, -1), axis=1))
        end = tl.minimum(end, tl.min(tl.where(begun, LAST, start), axis=1))
    begun, ended = tl.where(first < 0, end, first), tl.where(end == LAST, first, end)
    return begun, ended


@triton.jit(do_not_specialize=["frames", "count"], do_not_specialize_on_alignment=["STARTS"])
def bounds_kernel(STARTS, OUT, frames, count, BLOCK: tl.constexpr):
    """Writes [first, end) of the recordings of a block of frames, two rows of ``frames`` numbers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, end = recordings_of(i, STARTS, count)
    tl.store(OUT + i, tl.minimum(first, frames), mask=i < frames)
    tl.store(OUT + frames + i, tl.minimum(end, frames), mask=i < frames)


def bounds(starts: torch.Tensor, frames: int) -> torch.Tensor:
    """Returns int32 (2, frames): the first frame of each frame's recording and the one behind its last, which are equal
    for a frame that belongs to none. Neither row decreases.
    """
    found = torch.empty(2, frames, dtype=torch.int32, device=starts.device)
    launch(bounds_kernel, (cdiv(frames, TABLE["BLOCK"]),), starts, found, frames, len(starts), **TABLE)
    return found
