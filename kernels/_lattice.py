# SPDX-License-Identifier: Apache-2.0
"""Pieces of the lattice kernels: the boundary of a sequence, and whether its scores are errors."""

import triton
import triton.language as tl


@triton.jit
def load_boundary(BOUNDARY, b, symbols, frames):
    """Returns s_begin, t_begin and the extents; an extent below 0 means that there is no path."""
    if BOUNDARY is None:
        return 0, 0, symbols, frames
    else:  # noqa: RET505 - Triton compiles one of the branches
        s_begin = tl.minimum(tl.maximum(tl.load(BOUNDARY + 4 * b), 0), symbols).to(tl.int32)
        t_begin = tl.minimum(tl.maximum(tl.load(BOUNDARY + 4 * b + 1), 0), frames).to(tl.int32)
        s_end = tl.minimum(tl.maximum(tl.load(BOUNDARY + 4 * b + 2), 0), symbols).to(tl.int32)
        t_end = tl.minimum(tl.maximum(tl.load(BOUNDARY + 4 * b + 3), 0), frames).to(tl.int32)
        return s_begin, t_begin, s_end - s_begin, t_end - t_begin


@triton.jit
def largest(x, y):
    """Returns the larger of two, NaN where one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def unfit(worst):
    """Says whether a number of the ``largest`` of scores is NaN or infinite upwards."""
    return tl.max((worst < float("inf")).to(tl.int32) ^ 1, axis=0) > 0
