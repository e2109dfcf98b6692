# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of toeplitz_attention, see toeplitz_attention.py."""

import triton
import triton.language as tl

from fastasr.kernels._activation import activate_with_slope, exp_nonpositive
from fastasr.kernels._attention_tiles import NONE, biased, dropped, load_rows, products, running, span, sums


@triton.jit(do_not_specialize=["length", "size", "count", "blocks"], do_not_specialize_on_alignment=["BIAS"])
def queries_kernel(
    QUERY, KEY, VALUE, G, BIAS, HIDDEN, DROPOUT, ALONG, DQUERY, MAXIMUM, INVERSE, REST,
    length, size, count, blocks, V, value_time, value_batch, scale,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes dS k of a block of queries and of columns, and the queries' maximum, 1 / sum and D - D0."""
    PRECISE: tl.constexpr = QUERY.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    unit, batch, first, n, block = span(tl.program_id(0), blocks, length, size, count)
    block = blocks - 1 - block
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_i = i < n
    row = batch * length + first
    QUERY += row * WIDTH
    KEY += row * WIDTH
    G += row * V
    VALUE += batch * value_batch + first * value_time
    if HIDDEN is not None:
        HIDDEN += row
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    along = tl.load(ALONG + row + i, mask=keep_i, other=0.0)
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], SUM)
    rest = tl.zeros([BLOCK_M], SUM)
    dquery = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # the keys' mean
    end = n
    if CAUSAL:
        end = tl.minimum(n, (block + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keep_j = j < n
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = products(zeros, QUERY, i, WIDTH, keep_i, KEY, j, WIDTH, keep_j, WIDTH, BLOCK_D)
        scores = biased(scores, scale, BIAS, HIDDEN, i[:, None], j[None, :], n, CAUSAL)
        if HIDDEN is not None:
            keep_j = keep_j & (tl.load(HIDDEN + j, mask=keep_j, other=1) == 0)
        slope = products(zeros, G, i, V, keep_i, VALUE, j, value_time, keep_j, V, BLOCK_V)  # dA
        slope = dropped(slope, DROPOUT, unit, i[:, None], j[None, :], n, size) - along[:, None]
        maximum, factor, e = running(maximum, scores, PRECISE)
        slope = e * slope
        total = total * factor + sums(e, 1, PRECISE)
        rest = rest * factor + sums(slope, 1, PRECISE)
        key = load_rows(KEY, j, WIDTH, c, keep_j, WIDTH)  # [BLOCK_N, BLOCK_D]
        dquery = tl.dot(slope.to(key.dtype), key, dquery * factor[:, None])
        mean = tl.dot(e.to(key.dtype), key, mean * factor[:, None])
    inverse = tl.div_rn(1.0, total.to(tl.float32))
    rest = rest.to(tl.float32) * inverse
    dquery = (dquery - rest[:, None] * mean) * inverse[:, None]
    tl.store((DQUERY + (row + i) * WIDTH)[:, None] + c[None, :], dquery, mask=keep_i[:, None])
    once = keep_i & (tl.program_id(1) == 0)
    tl.store(MAXIMUM + row + i, tl.where(maximum == NONE, 0.0, maximum), mask=once)
    tl.store(INVERSE + row + i, inverse, mask=once)
    tl.store(REST + row + i, rest, mask=once)


@triton.jit
def _weights(
    KEY, QUERY, BIAS, HIDDEN, MAXIMUM, INVERSE, i, j, n, scale,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Returns the softmax of a square tile, a row per key: [BLOCK, BLOCK]."""
    keep_i, keep_j = i < n, j < n
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
    scores = products(zeros, KEY, j, WIDTH, keep_j, QUERY, i, WIDTH, keep_i, WIDTH, BLOCK_D)
    scores = biased(scores, scale, BIAS, HIDDEN, i[None, :], j[:, None], n, CAUSAL)
    maximum = tl.load(MAXIMUM + i, mask=keep_i, other=0.0)
    inverse = tl.load(INVERSE + i, mask=keep_i, other=0.0)
    return exp_nonpositive(scores - maximum[None, :], PRECISE) * inverse[None, :]


@triton.jit(do_not_specialize=["length", "size", "count", "blocks"], do_not_specialize_on_alignment=["BIAS"])
def keys_kernel(
    QUERY, KEY, VALUE, G, BIAS, HIDDEN, DROPOUT, ALONG, MAXIMUM, INVERSE, REST, DKEY, PARTS,
    length, size, count, blocks, V, value_time, value_batch, scale,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes dS^T q of a block of keys and of columns, and the block's part of the bias's gradient.

    Row ``program`` of PARTS holds blocks + 1 times BLOCK sums: column u of block s belongs to the distance (key block +
    1 - s) BLOCK - u.
    """
    PRECISE: tl.constexpr = QUERY.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    unit, batch, first, n, block = span(program, blocks, length, size, count)
    lanes = tl.arange(0, BLOCK)
    j = block * BLOCK + lanes
    keep_j = j < n
    row = batch * length + first
    QUERY += row * WIDTH
    KEY += row * WIDTH
    G += row * V
    VALUE += batch * value_batch + first * value_time
    ALONG += row
    MAXIMUM += row
    INVERSE += row
    REST += row
    seen_j = keep_j
    if HIDDEN is not None:
        HIDDEN += row
        seen_j = keep_j & (tl.load(HIDDEN + j, mask=keep_j, other=1) == 0)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    PARTS += program.to(tl.int64) * (blocks + 1) * BLOCK
    once = (tl.program_id(1) == 0) & (lanes >= 0)
    roll = (lanes[:, None] + lanes[None, :]) % BLOCK
    before = lanes[:, None] + lanes[None, :] < BLOCK
    dkey = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    half = tl.zeros([BLOCK], PARTS.dtype.element_ty)
    begin = 0
    if CAUSAL:
        begin = block
    for number in range(begin, blocks):
        i = number * BLOCK + lanes
        keep_i = i < n
        weights = _weights(
            KEY, QUERY, BIAS, HIDDEN, MAXIMUM, INVERSE, i, j, n, scale, CAUSAL, WIDTH, BLOCK, BLOCK_D, PRECISE
        )
        zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
        slope = products(zeros, VALUE, j, value_time, seen_j, G, i, V, keep_i, V, BLOCK_V)  # dA^T
        slope = dropped(slope, DROPOUT, unit, i[None, :], j[:, None], n, size)
        slope = slope - tl.load(ALONG + i, mask=keep_i, other=0.0)[None, :]
        slope = slope - tl.load(REST + i, mask=keep_i, other=0.0)[None, :]
        slope = tl.where(keep_i[None, :], weights * slope, 0.0)  # dS^T
        query = load_rows(QUERY, i, WIDTH, c, keep_i, WIDTH)  # [BLOCK, BLOCK_D]
        dkey = tl.dot(slope.to(query.dtype), query, dkey)
        rolled = tl.gather(slope, roll, axis=1)
        done = half + sums(tl.where(before, 0.0, rolled), 0, PRECISE)
        half = sums(tl.where(before, rolled, 0.0), 0, PRECISE)
        tl.store(PARTS + number * BLOCK + lanes, done, mask=once)
    tl.store(PARTS + blocks * BLOCK + lanes, half, mask=once)
    tl.store((DKEY + (row + j) * WIDTH)[:, None] + c[None, :], dkey, mask=keep_j[:, None])


@triton.jit(do_not_specialize=["length", "size", "count", "blocks"], do_not_specialize_on_alignment=["BIAS"])
def values_kernel(
    QUERY, KEY, VALUE, G, BIAS, HIDDEN, DROPOUT, MAXIMUM, INVERSE, DVALUE,
    length, size, count, blocks, V, value_time, value_batch, out_time, scale,
    CAUSAL: tl.constexpr, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes (s M)^T g of a block of keys and of columns, times act'(value). VALUE is None where it was
    not activated.
    """
    PRECISE: tl.constexpr = QUERY.dtype.element_ty == tl.float32
    unit, batch, first, n, block = span(tl.program_id(0), blocks, length, size, count)
    lanes = tl.arange(0, BLOCK)
    j = block * BLOCK + lanes
    keep_j = j < n
    row = batch * length + first
    QUERY += row * WIDTH
    KEY += row * WIDTH
    G += row * V
    MAXIMUM += row
    INVERSE += row
    if HIDDEN is not None:
        HIDDEN += row
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    dvalue = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    begin = 0
    if CAUSAL:
        begin = block
    for number in range(begin, blocks):
        i = number * BLOCK + lanes
        weights = _weights(
            KEY, QUERY, BIAS, HIDDEN, MAXIMUM, INVERSE, i, j, n, scale, CAUSAL, WIDTH, BLOCK, BLOCK_D, PRECISE
        )
        weights = dropped(weights, DROPOUT, unit, i[None, :], j[:, None], n, size)
        weights = tl.where((i < n)[None, :], weights, 0.0)
        g = load_rows(G, i, V, c, i < n, V)  # [BLOCK, BLOCK_V]
        dvalue = tl.dot(weights.to(g.dtype), g, dvalue)
    if VALUE is not None:
        value = load_rows(VALUE + batch * value_batch + first * value_time, j, value_time, c, keep_j, V)
        _, slope = activate_with_slope(value.to(tl.float32), ACTIVATION, PRECISE)
        dvalue = dvalue * slope
    out = (DVALUE + (first + j) * out_time + batch * V)[:, None] + c[None, :]
    tl.store(out, dvalue.to(DVALUE.dtype.element_ty), mask=keep_j[:, None] & (c < V)[None, :])


@triton.jit(do_not_specialize=["rows", "length", "rows_per_part"])
def parameters_kernel(
    X, WEIGHT, DQUERY, DKEY, DX, PARTS, rows, length, rows_per_part, D, scale, x_time, x_batch, out_time,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes dx and, per program, the sums of its rows for w0, w1, b0, b1, as four tables one behind the
    other.
    """
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = c < D
    w0 = tl.load(WEIGHT + c, mask=in_row, other=0.0)
    w1 = tl.load(WEIGHT + D + c, mask=in_row, other=0.0)
    dw0 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dw1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    db0 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    db1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        batch, time = r // length, r % length
        keep = (r < end)[:, None] & in_row[None, :]
        x = tl.load(X + (time * x_time + batch * x_batch)[:, None] + c[None, :], mask=keep, other=0.0)
        z, slope = activate_with_slope(x.to(tl.float32), ACTIVATION, PRECISE)
        dq = tl.load(DQUERY + r[:, None] * WIDTH + c[None, :], mask=keep, other=0.0) * scale
        dk = tl.load(DKEY + r[:, None] * WIDTH + c[None, :], mask=keep, other=0.0) * scale
        dx = tl.fma(dk, w1[None, :], dq * w0[None, :]) * slope
        out = (time * out_time + batch * D)[:, None] + c[None, :]
        tl.store(DX + out, dx.to(DX.dtype.element_ty), mask=keep)
        dw0 = tl.fma(dq, z, dw0)
        dw1 = tl.fma(dk, z, dw1)
        db0 += dq
        # w1 and b1 move all scores of a query alike: the gradient is 0, or NaN where a weight is
        db1 += dk * 0.0
        first += BLOCK_R
    table = tl.num_programs(0).to(tl.int64) * D
    element = PARTS.dtype.element_ty
    at = PARTS + part * D + c
    tl.store(at, tl.sum(dw0.to(element), axis=0), mask=in_row)
    tl.store(at + table, tl.sum(dw1.to(element), axis=0), mask=in_row)
    tl.store(at + 2 * table, tl.sum(db0.to(element), axis=0), mask=in_row)
    tl.store(at + 3 * table, tl.sum(db1.to(element), axis=0), mask=in_row)


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(PARTS, OUT, parts, D, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds the columns of tables of ``parts`` rows; program_id(1) is the table."""
    table = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    keep = (p < parts)[:, None] & (c < D)[None, :]
    found = tl.load(PARTS + (table * parts + p)[:, None] * D + c[None, :], mask=keep, other=0.0)
    tl.store(OUT + table * D + c, tl.sum(found.to(tl.float64), axis=0).to(tl.float32), mask=c < D)


@triton.jit(do_not_specialize=["units", "blocks", "reach", "least"])
def add_diagonals_kernel(
    PARTS,
    DBIAS,
    units,
    blocks,
    reach,
    least,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Writes the bias's gradient at the distances t BLOCK - u for u < BLOCK, where t is the program."""
    t = tl.program_id(0) + least
    u = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    programs = units * blocks
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        block = p % blocks
        number = block + 1 - t
        begin = block if CAUSAL else 0
        keep = (p < programs) & (number >= begin) & (number <= blocks)
        offsets = (p.to(tl.int64) * (blocks + 1) + number) * BLOCK
        found = tl.load(PARTS + offsets[:, None] + u[None, :], mask=keep[:, None], other=0.0)
        total += tl.sum(found.to(tl.float64), axis=0)
    at = reach + t * BLOCK - u
    tl.store(DBIAS + at, total.to(tl.float32), mask=(at >= 0) & (at <= 2 * reach))
