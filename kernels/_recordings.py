# SPDX-License-Identifier: Apache-2.0
"""Recordings that lie one after the other in a sequence: the frames between two starts are one recording.

``recordings_of`` compares frames with the starts where a kernel needs them once. Kernels that need them for every tile
read them from a table, which ``bounds`` makes in one launch. ``apart`` makes one for kernels that keep recordings apart
by rows of zeros.
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
    """Returns [first, end) of the recordings of frames i, [i, i) for a frame that belongs to none."""
    first = tl.full(i.shape, -1, tl.int32)
    end = tl.full(i.shape, LAST, tl.int32)
    for n in range(0, count, RECORDINGS):
        r = n + tl.arange(0, RECORDINGS)
        start = tl.minimum(tl.maximum(tl.load(STARTS + r, mask=r < count, other=0), 0), LAST - 1).to(tl.int32)
        start = tl.where(r < count, start, LAST)[None, :]
        begun = start <= i[:, None]  # [frames, RECORDINGS]
        first = tl.maximum(first, tl.max(tl.where(begun, start, -1), axis=1))
        end = tl.minimum(end, tl.min(tl.where(begun, LAST, start), axis=1))
    none = (first < 0) | (end == LAST)
    return tl.where(none, i, first), tl.where(none, i, end)


@triton.jit(do_not_specialize=["frames", "count"], do_not_specialize_on_alignment=["STARTS"])
def bounds_kernel(STARTS, OUT, frames, count, BLOCK: tl.constexpr):
    """Writes [first, end) of the recordings of a block of frames, two rows of ``frames`` numbers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, end = recordings_of(i, STARTS, count)
    tl.store(OUT + i, first, mask=i < frames)
    tl.store(OUT + frames + i, tl.minimum(end, frames), mask=i < frames)


def bounds(starts: torch.Tensor, frames: int) -> torch.Tensor:
    """Returns int32 (2, frames): the first frame of each frame's recording and the one behind its last; twice the same
    for a frame that belongs to none.
    """
    found = torch.empty(2, frames, dtype=torch.int32, device=starts.device)
    launch(bounds_kernel, (cdiv(frames, TABLE["BLOCK"]),), starts, found, frames, len(starts), **TABLE)
    return found


@triton.jit(do_not_specialize=["frames", "count", "gap"], do_not_specialize_on_alignment=["STARTS", "OUT"])
def apart_kernel(STARTS, OUT, frames, count, gap, BLOCK: tl.constexpr):
    """Writes the numbers of a block of frames to their rows: ``gap`` rows more for every start up to the frame."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begun = tl.zeros([BLOCK], tl.int32)
    for n in range(0, count, RECORDINGS):
        r = n + tl.arange(0, RECORDINGS)
        start = tl.load(STARTS + r, mask=r < count, other=0)
        before = (start[None, :] <= i[:, None]) & (r < count)[None, :]  # [BLOCK, RECORDINGS]
        begun += tl.sum(before.to(tl.int32), axis=1)
    tl.store(OUT + i + begun * gap, i, mask=i < frames)


def apart(starts: torch.Tensor, frames: int, gap: int) -> torch.Tensor:
    """Returns the frames of rows, int32 (frames + gap len(starts)), with at least ``gap`` rows of no frame, -1, between
    two recordings.
    """
    rows = frames + gap * len(starts)
    found = torch.full((rows,), -1, dtype=torch.int32, device=starts.device)
    launch(apart_kernel, (cdiv(frames, TABLE["BLOCK"]),), starts, found, frames, len(starts), gap, **TABLE)
    return found
