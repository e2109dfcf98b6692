# SPDX-License-Identifier: Apache-2.0
"""The elements of a contiguous tensor as one row, which programs share in blocks."""

import triton
import triton.language as tl


@triton.jit
def flat_range(groups, BLOCK: tl.constexpr):
    """Returns this program's offsets among groups of 16 elements: whole groups keep masked accesses 128
    bits wide.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < groups.to(tl.int64) * 16


@triton.jit
def flat_tail(groups, tail):
    """Returns the offsets of the last ``tail`` < 16 elements, in the last program only."""
    lanes = tl.arange(0, 16)
    return groups.to(tl.int64) * 16 + lanes, (lanes < tail) & (tl.program_id(0) == tl.num_programs(0) - 1)
