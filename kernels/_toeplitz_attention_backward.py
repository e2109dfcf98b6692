# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of toeplitz_attention, see toeplitz_attention.py."""

import triton
import triton.language as tl

from fastasr.kernels._activation import activate_with_slope, exp_nonpositive
from fastasr.kernels._attention_tiles import NONE, running, span, sums
from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._special import LOG2_E, exp2
from fastasr.kernels._vectors import load

# Zeros before and behind the table of the bias: tiles reach at most that far beyond its ends.
MARGIN = tl.constexpr(256)


@triton.jit
def biases(TABLE, i, j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns bias[j - i] of ROWS queries from i on and COLUMNS keys from j on."""
    rows = ROWS - 1 - tl.arange(0, ROWS)  # offsets behind one pointer, none of which is negative
    return tl.load(TABLE + (j - i - (ROWS - 1)) + (rows[:, None] + tl.arange(0, COLUMNS)[None, :]))


@triton.jit
def sees(i, j, keep_j, n, HIDES: tl.constexpr, CAUSAL: tl.constexpr):
    """Says which queries see which keys, those behind the last query as many as this one; ``keep_j`` matters if it
    HIDES keys before the last one.
    """
    last = i * 0 + (n - 1)
    if CAUSAL:
        last = tl.minimum(i, n - 1)
    seen = j[None, :] <= last[:, None]
    if HIDES:
        seen = seen & keep_j[None, :]
    return seen


@triton.jit(
    do_not_specialize=["length", "size", "count", "unit", "first", "rows", "blocks", "keys"],
    do_not_specialize_on_alignment=["TABLE"],
)
def slopes_kernel(
    WEIGHTS, SLOPES, TABLE, HIDDEN, DROPOUT, length, size, count, unit, first, rows, blocks, keys, stride,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turns q k / sqrt(d) into s M and g v^T into dS, in place, for a block of queries. Both tensors hold ``rows``
    queries of a unit from ``first`` on, and begin with ``unit``.
    """
    PRECISE: tl.constexpr = WEIGHTS.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    program = tl.program_id(0)
    block = program % blocks * BLOCK_M
    r = block + tl.arange(0, BLOCK_M)
    at = ((program // blocks).to(tl.int64) * rows + block) * stride
    lanes = (tl.arange(0, BLOCK_M) * stride)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    unit, _batch, _first, n, _block = span(unit + program // blocks, 1, length, size, count)
    if HIDDEN is not None:
        HIDDEN += unit * size
    i = first + r
    keep_i = (r < rows) & (i < n)
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros(
        [BLOCK_M] if PRECISE else [BLOCK_M, BLOCK_N], SUM
    )  # in 16 bits of each thread's own keys
    along = tl.zeros(total.shape, SUM)
    end = n
    if CAUSAL:
        end = tl.minimum(n, first + block + BLOCK_M)
    for start in range(0, end, BLOCK_N):
        scores, slope, _ = _pairs(
            WEIGHTS + (at + start) + lanes, SLOPES + (at + start) + lanes, TABLE, HIDDEN, DROPOUT, unit, first + block,
            start, i, keep_i, n, size, stride, CAUSAL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        maximum, factor, e = running(maximum, scores, PRECISE)
        if PRECISE:
            total = total * factor + sums(e, 1, True)
            along = along * factor + sums(e * slope, 1, True)
        else:
            total = tl.fma(total, factor[:, None], e)
            along = tl.fma(along, factor[:, None], e * slope)
    if not PRECISE:
        total, along = tl.sum(total, axis=1), tl.sum(along, axis=1)
    inverse = tl.where(keep_i, tl.div_rn(1.0, total.to(tl.float32)), 0.0)
    along = along.to(tl.float32) * inverse
    maximum = tl.where(maximum == NONE, 0.0, maximum)
    lse = maximum * LOG2_E + tl.log2(total.to(tl.float32))
    lse = tl.where(keep_i, lse, float("inf"))
    for start in range(0, keys, BLOCK_N):
        weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        ds = weights
        if start < end:
            scores, slope, factors = _pairs(
                WEIGHTS + (at + start) + lanes, SLOPES + (at + start) + lanes, TABLE, HIDDEN, DROPOUT, unit,
                first + block, start, i, keep_i, n, size, stride, CAUSAL, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if PRECISE:
                weights = exp_nonpositive(scores - maximum[:, None], True) * inverse[:, None]
            else:
                weights = exp2(tl.fma(scores, LOG2_E, -lse[:, None]))
            ds = weights * (slope - along[:, None])
            weights = weights * factors
        keep = (r < rows)[:, None] & (start + tl.arange(0, BLOCK_N) < stride)[None, :]
        tl.store(WEIGHTS + (at + start) + lanes, weights.to(WEIGHTS.dtype.element_ty), mask=keep)
        tl.store(SLOPES + (at + start) + lanes, ds.to(SLOPES.dtype.element_ty), mask=keep)


@triton.jit
def _pairs(
    scores, slopes, TABLE, HIDDEN, DROPOUT, unit, first, start, i, keep_i, n, size, stride,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns (scores with their bias, -inf for hidden keys; dA, 0 there; M) of a tile at pointers."""
    j = start + tl.arange(0, BLOCK_N)
    keep_j = j < n
    if HIDDEN is not None:
        keep_j = keep_j & (tl.load(HIDDEN + j, mask=keep_j, other=1) == 0)
    seen = sees(i, j, keep_j, n, HIDDEN is not None, CAUSAL) & keep_i[:, None]
    whole = keep_i[:, None] & (j < stride)[None, :]  # for vectors, also of hidden keys
    scores = load(scores, whole)
    slope = tl.where(seen, load(slopes, whole), 0.0)
    scores = tl.where(seen, scores + biases(TABLE, first, start, BLOCK_M, BLOCK_N), NONE)
    factors = 1.0
    if DROPOUT is not None:
        factors = tl.load(DROPOUT + ((unit * size + i) * size)[:, None] + j[None, :], mask=seen, other=0.0)
    return scores, slope * factors, factors


@triton.jit(do_not_specialize=["units", "first", "rows", "keys", "reach", "fresh"])
def diagonals_kernel(
    SLOPES, PARTS, units, first, rows, keys, reach, fresh, stride, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Writes a part of the sums of dS over the diagonals j - i = t - reach, for a block of t, and adds it to that in
    PARTS unless ``fresh``.
    """
    SUM: tl.constexpr = PARTS.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lanes = tl.arange(0, BLOCK_R)
    offsets = (lanes * (stride + 1))[:, None] + t[None, :]
    part, parts = tl.program_id(1), tl.num_programs(1)
    lowest = first + tl.program_id(0) * BLOCK_T - reach  # column of row 0 on the first of the diagonals
    begin = tl.maximum(1 - BLOCK_T - lowest, 0) // BLOCK_R
    met = tl.maximum(tl.cdiv(tl.minimum(rows, keys - lowest), BLOCK_R) - begin, 0)
    total = tl.zeros([BLOCK_R, BLOCK_T], SUM)
    # block and unit step together: divisions in the loop would take as long as a quarter of a tile
    whole = tl.maximum(met, 1)
    block, unit = part % whole, part // whole
    for _ in range(part, units * met, parts):
        r = (begin + block) * BLOCK_R
        j = (first + r - reach) + (lanes[:, None] + t[None, :])
        at = (unit.to(tl.int64) * rows + r) * stride + (first + r - reach)
        keep = (r + lanes < rows)[:, None] & (j.to(tl.uint32) < keys.to(tl.uint32))  # none below 0
        total += tl.load(SLOPES + at + offsets, mask=keep, other=0.0).to(SUM)
        block += parts % whole
        unit += parts // whole + (block >= whole).to(tl.int32)
        block = tl.where(block >= whole, block - whole, block)
    entries = 2 * reach + 1
    out = PARTS + part.to(tl.int64) * entries + t
    before = tl.load(out, mask=(t < entries) & (fresh == 0), other=0.0)
    tl.store(out, before + tl.sum(total, axis=0), mask=t < entries)


@triton.jit
def _places(r, length):
    """Returns (sequence, frame) of numbers r of frames; 64 bits would be divided in a hundred instructions."""
    batch = (r.to(tl.uint32) // length.to(tl.uint32)).to(tl.int32)
    return batch.to(tl.int64), (r - batch * length).to(tl.int64)


@triton.jit(do_not_specialize=["length", "padded"])
def values_kernel(
    DV, VALUE, DVALUE, length, padded, V, value_time, value_batch, out_time,
    ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a frame's values, times act'(value) unless VALUE is None."""
    PRECISE: tl.constexpr = DVALUE.dtype.element_ty == tl.float32
    batch, time = _places(tl.program_id(0), length)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dvalue = load(DV + (batch * padded + time) * V + c, c < V)
    if VALUE is not None:
        value = load(VALUE + time * value_time + batch * value_batch + c, c < V)
        _, slope = activate_with_slope(value, ACTIVATION, PRECISE)
        dvalue *= slope
    tl.store(DVALUE + time * out_time + batch * V + c, dvalue.to(DVALUE.dtype.element_ty), mask=c < V)


@triton.jit(do_not_specialize=["rows", "length", "padded", "rows_per_part"])
def parameters_kernel(
    X, WEIGHT, DQUERY, DKEY, DX, PARTS, rows, length, padded, rows_per_part, D, scale, x_time, x_batch, out_time,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes dx and, per program, the sums of its rows for w0, w1, b0, b1, as four tables one behind the
    other.
    """
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = c < D
    w0 = tl.load(WEIGHT + c, mask=in_row, other=0.0).to(tl.float32)
    w1 = tl.load(WEIGHT + D + c, mask=in_row, other=0.0).to(tl.float32)
    dw0 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dw1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    db0 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    db1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    begin = tl.program_id(0) * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    for first in range(begin, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        batch, time = _places(r, length)
        keep = (r < end)[:, None] & in_row[None, :]
        x = load(X + (time * x_time + batch * x_batch)[:, None] + c[None, :], keep)
        z, slope = activate_with_slope(x, ACTIVATION, PRECISE)
        at = ((batch * padded + time) * WIDTH)[:, None] + c[None, :]
        dq, dk = load(DQUERY + at, keep), load(DKEY + at, keep)  # without the scale
        dx = tl.fma(dk, (w1 * scale)[None, :], dq * (w0 * scale)[None, :]) * slope
        out = (time * out_time + batch * D)[:, None] + c[None, :]
        tl.store(DX + out, dx.to(DX.dtype.element_ty), mask=keep)
        dw0 = tl.fma(dq, z, dw0)
        dw1 = tl.fma(dk, z, dw1)
        db0 += dq
        # w1 and b1 move all scores of a query alike: the gradient is 0, or NaN where a weight is
        db1 += dk * 0.0
    table = tl.num_programs(0).to(tl.int64) * D
    element = PARTS.dtype.element_ty
    at = PARTS + part * D + c
    tl.store(at, column_sums((dw0 * scale).to(element)), mask=in_row)
    tl.store(at + table, column_sums((dw1 * scale).to(element)), mask=in_row)
    tl.store(at + 2 * table, column_sums((db0 * scale).to(element)), mask=in_row)
    tl.store(at + 3 * table, column_sums((db1 * scale).to(element)), mask=in_row)
