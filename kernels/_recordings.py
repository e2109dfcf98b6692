# SPDX-License-Identifier: Apache-2.0
"""Recordings that lie one after the other in a sequence: the frames between two starts are one recording."""

import triton
import triton.language as tl

RECORDINGS = tl.constexpr(32)  # starts that are read at a time
LAST = tl.constexpr(2**31 - 1)


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
