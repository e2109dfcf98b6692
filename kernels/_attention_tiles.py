# SPDX-License-Identifier: Apache-2.0
"""Pieces of the attention kernels: spans of chunks, tiles of products and of scores, the running softmax.

PRECISE, which float32 tensors use, adds sums in float64 and computes exponentials within a unit in the last place.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import exp_difference, exp_nonpositive
from fastasr.kernels._special import exp2

NONE = tl.constexpr(float("-inf"))
OF_INFINITE = tl.constexpr(2.0**-10)  # the share of a y that overflowed float16 which is kept in its place
PIECE_BYTES = 128 << 20  # At most this many bytes of scores' gradients exist at once.


@triton.jit
def span(program, blocks, length, size, count):
    """Returns (unit, its sequence, first frame and number of frames, block) of a program."""
    unit = program // blocks
    first = unit % count * size
    frames = tl.minimum(size, length - first)
    return unit.to(tl.int64), (unit // count).to(tl.int64), first.to(tl.int64), frames, program % blocks


@triton.jit
def load_rows(X, r, stride, c, keep, width, BIAS=None):
    """Loads [rows, columns] of X, with zeros outside, and adds BIAS, a number per column."""
    return _loaded((X + r.to(tl.int64) * stride)[:, None] + c[None, :], c, keep, width, BIAS)


@triton.jit
def load_rows_from(X, first, stride, c, keep, width, BIAS=None):
    """Does the same for consecutive rows from ``first`` on, of fewer than 2^24 elements each: in a loop over tiles,
    only one pointer for all moves in 64 bits."""
    rows = tl.arange(0, keep.shape[0]) * stride
    return _loaded(X + tl.cast(first, tl.int64) * stride + (rows[:, None] + c[None, :]), c, keep, width, BIAS)


@triton.jit
def _loaded(pointers, c, keep, width, BIAS):
    rows = tl.load(pointers, mask=keep[:, None] & (c < width)[None, :], other=0.0)
    if BIAS is not None:
        bias = tl.load(BIAS + c, mask=c < width, other=0.0).to(tl.float32)
        rows = (rows.to(tl.float32) + bias[None, :]).to(rows.dtype)
    return rows


@triton.jit
def products(total, A, a, a_stride, keep_a, B, b, b_stride, keep_b, width, BLOCK: tl.constexpr, BIAS=None):
    """Returns total + (A[a] + BIAS) B[b]^T over ``width`` columns."""
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        left = load_rows(A, a, a_stride, c, keep_a, width, BIAS)  # [a, BLOCK]
        right = load_rows(B, b, b_stride, c, keep_b, width)  # [b, BLOCK]
        total = tl.dot(left, tl.trans(right), total)
    return total


@triton.jit
def dropped(values, DROPOUT, unit, i, j, n, size):
    """Returns values M."""
    if DROPOUT is not None:
        row = DROPOUT + (unit * size + i) * size
        values = values * tl.load(row + j, mask=(i < n) & (j < n), other=0.0)
    return values


@triton.jit
def sums(values, axis: tl.constexpr, PRECISE: tl.constexpr):
    """Returns sums along an axis, added in float64 when PRECISE."""
    if PRECISE:
        values = values.to(tl.float64)
    return tl.sum(values, axis=axis)


@triton.jit
def running(maximum, scores, PRECISE: tl.constexpr, ONE: tl.constexpr = False):
    """Returns (new maximum of rows, factor of the earlier sums, exponentials); rows without a key so far
    are 0. ONE: the exponential of the maximum is exactly 1, for a sum whose logarithm is a result.
    """
    new = tl.maximum(maximum, tl.max(scores, axis=1))
    shift = tl.where(new == NONE, 0.0, new)
    if ONE:
        factor, e = (
            exp_nonpositive(maximum - shift, PRECISE),
            exp_nonpositive(scores - shift[:, None], PRECISE),
        )
    else:
        factor, e = exp_difference(maximum, shift, PRECISE), exp_difference(scores, shift[:, None], PRECISE)
    return new, factor, e


@triton.jit
def running_in_bits(maximum, scores, factor):
    """Does the same for 16-bit tensors, with powers of 2 of ``factor`` times the scores, whose maximum it returns. With
    a factor of log2(e) they are exponentials; an argument is one multiplication and addition.
    """
    new = tl.maximum(maximum, tl.max(scores, axis=1) * factor)
    shift = tl.where(new == NONE, 0.0, new)
    return new, exp2(maximum - shift), exp2(tl.fma(scores, factor, -shift[:, None]))


@triton.jit
def slopes_of(
    g, G, V, i, j, keep_i, keep_j, v_time,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns dW of queries i and keys j; ``g`` holds the rows of G if they fit a block."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if VALUE_DIM <= BLOCK_V:
        value = load_rows(V, j, v_time, tl.arange(0, BLOCK_V), keep_j, VALUE_DIM)  # [BLOCK_N, BLOCK_V]
        total = tl.dot(g, tl.trans(value), total)
    else:
        total = products(total, G, i, v_time, keep_i, V, j, v_time, keep_j, VALUE_DIM, BLOCK_V)
    return total


@triton.jit
def store_with_remainder(Y, REMAINDER, at, y, keep):
    """Stores y, and where REMAINDER is not None what rounding takes from it: where y overflows float16, a share of y in
    its place."""
    narrow = y.to(Y.dtype.element_ty)
    tl.store(Y + at, narrow, mask=keep)
    if REMAINDER is not None:
        wide = narrow.to(tl.float32)
        rest = y - wide
        if narrow.dtype == tl.float16:
            rest = tl.where(tl.abs(wide) == float("inf"), y * OF_INFINITE, rest)
        tl.store(REMAINDER + at, rest.to(narrow.dtype), mask=keep)


@triton.jit
def delta_of_values(
    G, Y, REMAINDER, i, stride, keep, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Returns delta of rows i of 16 bits from y and what rounding took from it. G y alone would move whole rows of dS:
    where keys and values have a mean, dq would be several times less exact than eager's. Where y overflowed, eager has
    a finite delta, which does not depend on y, and so has this."""
    delta = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, VALUE_DIM, BLOCK_V):
        c = first + tl.arange(0, BLOCK_V)
        y = load_rows(Y, i, stride, c, keep, VALUE_DIM).to(tl.float32)  # [BLOCK_M, BLOCK_V]
        rest = load_rows(REMAINDER, i, stride, c, keep, VALUE_DIM).to(tl.float32)
        if Y.dtype.element_ty == tl.float16:
            y = tl.where(tl.abs(y) == float("inf"), rest * (1 / OF_INFINITE), y + rest)
        else:
            y += rest
        delta += tl.sum(y * load_rows(G, i, stride, c, keep, VALUE_DIM).to(tl.float32), axis=1)
    return delta


def mask_stride(attn_mask: torch.Tensor | None) -> int:
    """Returns the elements from one sequence to the next of a mask of pairs: 0 where all sequences share it."""
    return attn_mask.stride(0) if attn_mask is not None and attn_mask.dim() == 3 else 0
