# SPDX-License-Identifier: Apache-2.0
"""Rows that kernels leave out. HIDDEN has a byte for each row, which is not 0 where nothing may read the row, or it is
None.
"""

import triton
import triton.language as tl

SAMPLES = tl.constexpr(32)  # rows that stand for all where some are hidden; else 8 do
SCANNED = tl.constexpr(1024)  # bytes of HIDDEN that are read at a time where all samples are hidden


@triton.jit
def visible(HIDDEN, r, end):
    """Returns which rows there are and are not hidden."""
    keep = r < end
    if HIDDEN is not None:
        keep = keep & (tl.load(HIDDEN + r, mask=keep, other=1) == 0)
    return keep


@triton.jit
def samples(HIDDEN, rows):
    """Returns a few rows from all over, which of them are not hidden, and 1 / the number of these. One at least is not
    hidden, if there is any."""
    COUNT: tl.constexpr = 8 if HIDDEN is None else SAMPLES
    r = (rows.to(tl.int64) * tl.arange(0, COUNT)) // COUNT
    keep, share = tl.full([COUNT], True, tl.int1), 1.0 / COUNT
    if HIDDEN is not None:
        keep = visible(HIDDEN, r, rows)
        number = tl.sum(keep.to(tl.int32), axis=0)
        first = tl.zeros([], tl.int64)
        while (number == 0) & (first < rows):
            others = first + tl.arange(0, SCANNED)
            other = tl.min(tl.where(visible(HIDDEN, others, rows), others, rows), axis=0)
            r = tl.where(other < rows, other, r)
            keep = keep | (other < rows)
            number = tl.where(other < rows, COUNT, number)
            first += SCANNED
        share = 1.0 / tl.maximum(number, 1).to(tl.float32)
    return r, keep, share
