# SPDX-License-Identifier: Apache-2.0
"""The gradient of a whitening (fastasr/ops/whitening_gradient.py) in four launches. A recorded pass makes the first two
for many calls at once.

x has N rows, those that are not hidden, and G groups of c channels. Shifted rows f = x - shift have the column means m,
and

    products   f^T f and sums of columns, by parts of the rows
    covariance S = f^T f - N m m^T of each group, and sums for the metric w and the mean d of the diagonals
    norms      A = S / d - w I    |v|^2 = d sum of A (S / d) A over the diagonal    b = m A    |grad|^2
    change     y = grad + scale (f A - b)

So v = (f - m) A is neither stored nor computed twice: its norm follows from matrices of c x c. Where w is below the
limit, the last two kernels return at once, the last one after a copy if y is not grad.

The shift is the mean of a few rows in float32, so that nothing cancels, and 0 for 16-bit x, whose products are exact.
16-bit x has A rounded to its type, which is small beside the rounding of y; |v|^2 takes two bfloat16 numbers for each
element of S.

Bytes per element of e bytes: e for the products, 4e for the norm and the change. A 1500x20x192 bf16 tensor takes
3 + 11 us at 4.3 TB/s; the tiles of the products read x three times, most of them from the second cache, and so does
the change. Sums over parts are added up in float64 in one order: results repeat bit for bit, without atomics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastasr.kernels import _jobs
from fastasr.kernels._hidden import samples, visible
from fastasr.kernels._jobs import multiple, number, pointer
from fastasr.kernels._launch import as_bytes, cdiv, launch, next_power_of_2, processors

SUM_COLUMNS = 64  # columns of a program that adds them up
PART_ROWS = 256  # A part has at least this many rows.
RESIDENT = 2  # programs of the products, and of |grad|^2, on a multiprocessor
GRAD_TILE = {"GRAD_R": 32, "GRAD_C": 64}
SCRATCH = 128 << 20  # bytes of products of the jobs of a launch, if it has more than one

LEAST = tl.constexpr(1.0e-6)  # |v|^2 relative to its value for A = w I
EPS = tl.constexpr(1.0e-20)  # as in fastasr/ops/whitening_gradient.py


@triton.jit
def _shift(X, HIDDEN, c, in_x, rows, x_row):
    """Returns the mean of a few rows, from all over x, of columns of float32; 0 of others."""
    if X.dtype.element_ty == tl.float32:
        r, seen, share = samples(HIDDEN, rows)
        x = tl.load(X + r[:, None] * x_row + c[None, :], mask=seen[:, None] & in_x[None, :], other=0.0)
        return tl.sum(x, axis=0) * share
    return tl.zeros(c.shape, tl.float32)


@triton.jit
def _shifted(x, shift, keep):
    """Returns x - shift in the dtype of x, and 0 outside of x."""
    if x.dtype == tl.float32:
        return tl.where(keep, x - shift[None, :], 0.0)
    return x


@triton.jit
def _corner(tile):
    """Returns (i, j), i <= j, of a tile of the upper triangle, which are numbered by columns."""
    j = ((tl.sqrt_rn((8 * tile + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    return tile - j * (j + 1) // 2, j


@triton.jit
def _total(TABLE, count, BLOCK: tl.constexpr):
    """Adds up a vector in float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(TABLE + i, mask=i < count, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _products(
    X, HIDDEN, PRODUCTS, SUMS, COUNTS, SHIFT, rows, rows_per_part, groups, width, tiles, x_row,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    channels = groups * width
    units = groups * tiles + tl.cdiv(channels, BLOCK_S)
    part = tl.program_id(0) // units
    unit = tl.program_id(0) - part * units
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    k = tl.arange(0, BLOCK_K)
    if unit < groups * tiles:
        group = unit // tiles
        i, j = _corner(unit - group * tiles)
        i = i * BLOCK + tl.arange(0, BLOCK)
        j = j * BLOCK + tl.arange(0, BLOCK)
        ci, cj = group * width + i, group * width + j
        shift_i = _shift(X, HIDDEN, ci, i < width, rows, x_row)
        shift_j = _shift(X, HIDDEN, cj, j < width, rows, x_row)
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(first, end, BLOCK_K):
            r = (start + k).to(tl.int64)
            seen = visible(HIDDEN, r, end)[:, None]
            keep_i, keep_j = seen & (i < width)[None, :], seen & (j < width)[None, :]
            a = tl.load(X + r[:, None] * x_row + ci[None, :], mask=keep_i, other=0.0)  # [BLOCK_K, BLOCK]
            b = tl.load(X + r[:, None] * x_row + cj[None, :], mask=keep_j, other=0.0)
            a, b = _shifted(a, shift_i, keep_i), _shifted(b, shift_j, keep_j)
            if (
                X.dtype.element_ty == tl.float32
            ):  # one chain of additions through a part would round more than eager's
                total = tl.fma(tl.dot(tl.trans(a), b), 1.0, total)
            else:
                total = tl.dot(tl.trans(a), b, total)
        at = (part.to(tl.int64) * groups * tiles + unit) * BLOCK * BLOCK
        inside = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(PRODUCTS + at + inside, total)
    else:
        c = (unit - groups * tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
        in_x = c < channels
        shift = _shift(X, HIDDEN, c, in_x, rows, x_row)
        sums = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)
        count = tl.zeros([BLOCK_K], tl.int32)
        for start in range(first, end, BLOCK_K):
            r = (start + k).to(tl.int64)
            seen = visible(HIDDEN, r, end)
            keep = seen[:, None] & in_x[None, :]
            x = tl.load(X + r[:, None] * x_row + c[None, :], mask=keep, other=0.0)  # [BLOCK_K, BLOCK_S]
            sums += _shifted(x, shift, keep).to(tl.float32)
            count += seen.to(tl.int32)
        tl.store(SUMS + part.to(tl.int64) * channels + c, tl.sum(sums, axis=0), mask=in_x)
        if part == 0:
            tl.store(SHIFT + c, shift, mask=in_x)
        if HIDDEN is not None:  # noqa: SIM102, likewise
            if unit == groups * tiles:
                tl.store(COUNTS + part, tl.sum(count, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "rows_per_part", "groups", "tiles"])
def products_kernel(
    X, HIDDEN, ACT, PRODUCTS, SUMS, COUNTS, SHIFT, rows, rows_per_part, groups, width, tiles, x_row,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # PRODUCTS: (parts, groups * tiles, BLOCK, BLOCK), SUMS: (parts, channels), COUNTS: (parts), SHIFT: (channels)
    if ACT is not None:  # noqa: SIM102, the inner condition is known on the device alone
        if tl.load(ACT).to(tl.float32) == 0.0:
            return
    _products(X, HIDDEN, PRODUCTS, SUMS, COUNTS, SHIFT, rows, rows_per_part, groups, width, tiles, x_row,
        BLOCK, BLOCK_K, BLOCK_S,
    )  # fmt: skip


# The fields of a job:
#  0 X, 1 ACT, 2 PRODUCTS, 3 SUMS, 4 SHIFT, 5 COVARIANCE, 6 MEAN, 7 STATISTICS, 8 COUNTS, 9 HIDDEN
# 10 rows, 11 rows_per_part, 12 parts, 13 groups, 14 width, 15 tiles, 16 x_row, 17 products' programs, 18 statistics


@triton.jit
def products_of_jobs_kernel(
    JOBS, FIELDS: tl.constexpr, DTYPE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Does what ``products_kernel`` does for each job."""
    job = JOBS + tl.program_id(1) * FIELDS
    if (tl.program_id(0) >= number(job, 17)) | (tl.load(pointer(job, 1, tl.float32)) == 0.0):
        return
    HIDDEN = None
    COUNTS = None
    if PADDED:
        HIDDEN = tl.load(job + 9).to(tl.pointer_type(tl.uint8))
        COUNTS = pointer(job, 8, tl.float32)
    X, PRODUCTS = pointer(job, 0, DTYPE), pointer(job, 2, tl.float32)
    SUMS, SHIFT = pointer(job, 3, tl.float32), pointer(job, 4, tl.float32)
    width, x_row = multiple(job, 14), multiple(job, 16)
    _products(X, HIDDEN, PRODUCTS, SUMS, COUNTS, SHIFT,
        number(job, 10), number(job, 11), number(job, 13), width, number(job, 15), x_row, BLOCK, BLOCK_K, BLOCK_S,
    )  # fmt: skip


@triton.jit
def _mean(SUMS, c, in_x, parts, count, channels, BLOCK_P: tl.constexpr):
    """Returns the means of columns in float64 from the sums of the parts."""
    total = tl.zeros(c.shape, tl.float64)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P).to(tl.int64)
        keep = (p < parts)[:, None] & in_x[None, :]
        table = tl.load(SUMS + p[:, None] * channels + c[None, :], mask=keep, other=0.0)  # [BLOCK_P, columns]
        total += tl.sum(table.to(tl.float64), axis=0)
    return total * (1.0 / count)


@triton.jit
def _covariance(
    PRODUCTS, SUMS, COUNTS, COVARIANCE, MEAN, STATISTICS, statistics, parts, rows, groups, width, tiles,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = BLOCK // CHUNK
    unit = tl.program_id(0) // chunks
    chunk = tl.program_id(0) - unit * chunks
    group = unit // tiles
    tile_i, tile_j = _corner(unit - group * tiles)
    inside = chunk * CHUNK + tl.arange(0, CHUNK)
    i, j = tile_i * BLOCK + inside, tile_j * BLOCK + tl.arange(0, BLOCK)
    channels = groups * width
    count = rows.to(tl.float64)
    if COUNTS is not None:
        count = tl.maximum(_total(COUNTS, parts, BLOCK_P), 1.0)
    mean_i = _mean(SUMS, group * width + i, i < width, parts, count, channels, BLOCK_P)
    mean_j = _mean(SUMS, group * width + j, j < width, parts, count, channels, BLOCK_P)
    total = tl.zeros([CHUNK, BLOCK], tl.float64)
    at = inside[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [CHUNK, BLOCK]
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        table = (
            PRODUCTS
            + (p.to(tl.int64) * groups * tiles + unit)[:, None, None] * BLOCK * BLOCK
            + at[None, :, :]
        )
        product = tl.load(table, mask=(p < parts)[:, None, None], other=0.0)  # [BLOCK_P, CHUNK, BLOCK]
        total += tl.sum(product.to(tl.float64), axis=0)
    total -= mean_i[:, None] * mean_j[None, :] * count
    s = total.to(tl.float32)
    keep = (i < width)[:, None] & (j < width)[None, :]
    out = COVARIANCE + group.to(tl.int64) * width * width
    tl.store(out + i[:, None] * width + j[None, :], s, mask=keep)
    diagonal = i[:, None] == j[None, :]
    total = tl.where(keep, total, 0.0)
    twice = 1.0
    if tile_i != tile_j:
        twice = 2.0
        tl.store(out + j[None, :] * width + i[:, None], s, mask=keep)
    else:
        tl.store(MEAN + group * width + i, mean_i.to(tl.float32), mask=i < width)
    tl.store(STATISTICS + tl.program_id(0), tl.sum(tl.where(diagonal, total, 0.0)))
    squares = tl.sum(total * total) * twice
    tl.store(STATISTICS + statistics + tl.program_id(0), squares)


@triton.jit(do_not_specialize=["parts", "rows", "groups", "tiles"])
def covariance_kernel(
    PRODUCTS, SUMS, COUNTS, ACT, COVARIANCE, MEAN, STATISTICS, parts, rows, groups, width, tiles,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # COVARIANCE: (groups, width, width), MEAN: (channels), STATISTICS: (2, programs), sums of diagonals and of squares
    if ACT is not None:  # noqa: SIM102, the inner condition is known on the device alone
        if tl.load(ACT).to(tl.float32) == 0.0:
            return
    _covariance(PRODUCTS, SUMS, COUNTS, COVARIANCE, MEAN, STATISTICS,
        tl.num_programs(0), parts, rows, groups, width, tiles, BLOCK, CHUNK, BLOCK_P,
    )  # fmt: skip


@triton.jit
def covariance_of_jobs_kernel(
    JOBS, FIELDS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Does what ``covariance_kernel`` does for each job."""
    job = JOBS + tl.program_id(1) * FIELDS
    statistics = number(job, 18)
    if (tl.program_id(0) >= statistics) | (tl.load(pointer(job, 1, tl.float32)) == 0.0):
        return
    COUNTS = None
    if PADDED:
        COUNTS = pointer(job, 8, tl.float32)
    PRODUCTS, SUMS = pointer(job, 2, tl.float32), pointer(job, 3, tl.float32)
    COVARIANCE, MEAN = pointer(job, 5, tl.float32), pointer(job, 6, tl.float32)
    width = multiple(job, 14)
    _covariance(PRODUCTS, SUMS, COUNTS, COVARIANCE, MEAN, pointer(job, 7, tl.float64),
        statistics, number(job, 12), number(job, 10), number(job, 13), width, number(job, 15), BLOCK, CHUNK, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _metric(STATISTICS, count, channels, BLOCK: tl.constexpr):
    """Returns w and d."""
    share = 1.0 / channels.to(tl.float64)
    d = tl.maximum(_total(STATISTICS, count, BLOCK) * share, 0.0, propagate_nan=tl.PropagateNan.ALL)
    w = _total(STATISTICS + count, count, BLOCK) * share / (d * d + EPS)
    w = tl.minimum(w.to(tl.float32), channels.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    return w, d.to(tl.float32)


@triton.jit
def _relative(S, offsets, keep, d, channels):
    """Returns S / d. No element exceeds the number of channels, unless S and d are 0 but for rounding."""
    inverse = tl.where(d > 1e-30, tl.div_rn(1.0, d), 0.0)
    most = channels.to(tl.float32)
    s = tl.load(S + offsets, mask=keep, other=0.0) * inverse
    s = tl.minimum(s, most, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(s, -most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _split(x):
    """Returns the two bfloat16 numbers whose sum is x."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit(
    do_not_specialize=["limit", "statistics", "rows", "groups", "tiles", "grad_tiles", "grad_tiles_per_part"]
)
def norms_kernel(
    GRAD, HIDDEN, COVARIANCE, MEAN, STATISTICS, LIMITS, ACT, WHITE, CHANGE, BIAS, NORMS, limit,
    statistics, rows, groups, width, tiles, grad_tiles, grad_tiles_per_part, grad_row,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, GRAD_R: tl.constexpr, GRAD_C: tl.constexpr,
):  # fmt: skip
    # CHANGE: (groups, width, width), BIAS: (blocks, channels), NORMS: (groups * tiles + parts of grad)
    unit = tl.program_id(0)
    if ACT is not None:  # noqa: SIM102, the inner condition is known on the device alone
        if tl.load(ACT).to(tl.float32) == 0.0:
            if unit == 0:
                tl.store(WHITE, 0)
            return
    channels = groups * width
    w, d = _metric(STATISTICS, statistics, groups * width, BLOCK_T)
    if LIMITS is not None:
        limit = tl.load(LIMITS).to(tl.float32)
    white = w < limit
    if unit == 0:
        tl.store(WHITE, white.to(tl.int8))
    if white:
        return
    if unit < groups * tiles:
        PRECISE: tl.constexpr = CHANGE.dtype.element_ty == tl.float32
        group = unit // tiles
        tile_i, tile_j = _corner(unit - group * tiles)
        i, j = tile_i * BLOCK + tl.arange(0, BLOCK), tile_j * BLOCK + tl.arange(0, BLOCK)
        s = COVARIANCE + group.to(tl.int64) * width * width
        product = tl.zeros([BLOCK, BLOCK], tl.float32)
        for first in range(0, width, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            keep_a, keep_b = (
                (i < width)[:, None] & (k < width)[None, :],
                (k < width)[:, None] & (j < width)[None, :],
            )
            a = _relative(s, i[:, None] * width + k[None, :], keep_a, d, channels)
            b = _relative(s, k[:, None] * width + j[None, :], keep_b, d, channels)
            if PRECISE:  # one chain of additions would round more than eager's
                product = tl.fma(tl.dot(a, b), 1.0, product)
            else:
                a, a_rest = _split(a)
                b, b_rest = _split(b)
                product = tl.dot(a, b_rest, product)
                product = tl.dot(a_rest, b, product)
                product = tl.dot(a, b, product)
        keep = (i < width)[:, None] & (j < width)[None, :]
        at = i[:, None] * width + j[None, :]  # [BLOCK, BLOCK]
        relative = _relative(s, at, keep, d, channels)
        change = relative - tl.where((i[:, None] == j[None, :]) & keep, w, 0.0)
        square = tl.sum((product - w * relative) * change)
        narrow = change.to(CHANGE.dtype.element_ty)
        out = CHANGE + group.to(tl.int64) * width * width
        tl.store(out + at, narrow, mask=keep)
        change = narrow.to(tl.float32)
        ci, cj = group * width + i, group * width + j
        mean = tl.load(MEAN + ci, mask=i < width, other=0.0)
        tl.store(BIAS + tile_i * channels + cj, tl.sum(change * mean[:, None], axis=0), mask=j < width)
        if tile_i != tile_j:
            square *= 2.0
            tl.store(out + j[None, :] * width + i[:, None], narrow, mask=keep)
            mean = tl.load(MEAN + cj, mask=j < width, other=0.0)
            tl.store(BIAS + tile_j * channels + ci, tl.sum(change * mean[None, :], axis=1), mask=i < width)
        tl.store(NORMS + unit, square)
    else:
        first = (unit - groups * tiles) * grad_tiles_per_part
        end = tl.minimum(first + grad_tiles_per_part, grad_tiles)
        columns = tl.cdiv(channels, GRAD_C)
        squares = tl.zeros([GRAD_R, GRAD_C], tl.float32)
        for tile in range(first, end):
            r = (tile // columns).to(tl.int64) * GRAD_R + tl.arange(0, GRAD_R)
            c = tile % columns * GRAD_C + tl.arange(0, GRAD_C)
            keep = visible(HIDDEN, r, rows)[:, None] & (c < channels)[None, :]
            grad = tl.load(GRAD + r[:, None] * grad_row + c[None, :], mask=keep, other=0.0).to(tl.float32)
            squares = tl.fma(grad, grad, squares)  # [GRAD_R, GRAD_C]
        tl.store(NORMS + unit, tl.sum(squares))


@triton.jit(
    do_not_specialize=["grad_scale", "statistics", "rows", "groups", "products", "grad_parts", "biases"]
)
def change_kernel(
    GRAD, X, HIDDEN, SHIFT, STATISTICS, WHITE, LIMITS, ACT, CHANGE, BIAS, NORMS, Y, grad_scale,
    statistics, rows, groups, width, products, grad_parts, biases, grad_row, x_row, y_row,
    IN_PLACE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    channels = groups * width
    blocks = tl.cdiv(width, BLOCK)
    columns = groups * blocks
    unit = tl.program_id(0) % columns
    group = unit // blocks
    r = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = (unit - group * blocks) * BLOCK + tl.arange(0, BLOCK)
    cj = group * width + j
    keep = (r < rows)[:, None] & (j < width)[None, :]
    same = tl.load(WHITE).to(tl.int32)
    if ACT is not None:
        same = tl.where(tl.load(ACT).to(tl.float32) == 0.0, 1, same)
    if same != 0:
        if not IN_PLACE:  # y is not grad
            grad = tl.load(GRAD + r[:, None] * grad_row + cj[None, :], mask=keep, other=0.0)
            tl.store(Y + r[:, None] * y_row + cj[None, :], grad, mask=keep)
        return
    if LIMITS is not None:
        grad_scale = tl.load(LIMITS + 1).to(tl.float32)
    w, d = _metric(STATISTICS, statistics, channels, BLOCK_T)
    # The products take S / d. A smaller |v| is rounding: its direction means nothing.
    square = tl.maximum(
        _total(NORMS, products, BLOCK_T).to(tl.float32),
        channels.to(tl.float32) * w * w * LEAST,
        propagate_nan=tl.PropagateNan.ALL,
    )
    size = tl.sqrt_rn(square * d)
    grad_size = tl.sqrt_rn(_total(NORMS + products, grad_parts, BLOCK_T).to(tl.float32))
    # v = factor (f A - b)
    factor = tl.div_rn(4.0 * d, channels.to(tl.float32) * tl.fma(d, d, EPS))
    scale = grad_scale * tl.div_rn(grad_size * factor, tl.fma(factor, size, EPS))
    seen = visible(HIDDEN, r, rows)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK], tl.float32)
    a = CHANGE + group.to(tl.int64) * width * width
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        ck = group * width + k
        keep_x = seen & (k < width)[None, :]
        x = tl.load(X + r[:, None] * x_row + ck[None, :], mask=keep_x, other=0.0)  # [BLOCK_R, BLOCK_K]
        keep_a = (k < width)[:, None] & (j < width)[None, :]
        change = tl.load(a + k[:, None] * width + j[None, :], mask=keep_a, other=0.0)  # [BLOCK_K, BLOCK]
        if X.dtype.element_ty == tl.float32:
            shift = tl.load(SHIFT + ck, mask=k < width, other=0.0)
            total = tl.fma(tl.dot(_shifted(x, shift, keep_x), change), 1.0, total)
        else:
            total = tl.dot(x, change, total)
    p = tl.arange(0, BLOCK_B)
    keep_b = (p < biases)[:, None] & (j < width)[None, :]
    bias = tl.sum(tl.load(BIAS + p[:, None] * channels + cj[None, :], mask=keep_b, other=0.0), axis=0)
    grad = tl.load(GRAD + r[:, None] * grad_row + cj[None, :], mask=keep, other=0.0).to(tl.float32)
    y = tl.fma(total - bias[None, :], scale, grad)
    if HIDDEN is not None:
        y = tl.where(seen, y, grad)
    tl.store(Y + r[:, None] * y_row + cj[None, :], y.to(Y.dtype.element_ty), mask=keep)


def tiles(width: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Returns the tiles and warps of the four kernels by name, for groups of ``width`` channels."""
    block = max(16, min(64, next_power_of_2(width)))
    short = dtype != torch.float32
    wide = 128 if short and width > 192 else block
    warps = 8 if wide == 128 else 4
    return {
        "products": {
            "BLOCK": wide,
            "BLOCK_K": 64 if short and wide < 128 else 32,
            "BLOCK_S": SUM_COLUMNS,
            "num_warps": warps,
        },
        "covariance": {
            "BLOCK": wide,
            "CHUNK": 4 if wide == 128 else 2,
            "BLOCK_P": 8 if wide == 128 else 32,
            "num_warps": 4,
        },
        "norms": {
            "BLOCK": block,
            "BLOCK_K": min(32, block),
            **GRAD_TILE,
            "BLOCK_T": 256,
            "num_warps": 4 if block == 64 else 2,
        },
        "change": {
            "BLOCK_R": 128 if short else 64,
            "BLOCK": block,
            "BLOCK_K": min(32, block) if short or width <= 64 else 16,
            "BLOCK_B": next_power_of_2(cdiv(width, block)),
            "BLOCK_T": 256,
            "num_warps": 8 if width > 64 else 4,
        },
    }


class Moments(NamedTuple):
    """What the first two kernels find: shift and mean (channels,), covariance (groups, width, width), and sums for the
    metric (2, programs)."""

    shift: torch.Tensor
    covariance: torch.Tensor
    mean: torch.Tensor
    statistics: torch.Tensor


def _triangle(width: int, block: int) -> int:
    """Returns the tiles of a block's size in the upper triangle of a matrix."""
    blocks = cdiv(width, block)
    return blocks * (blocks + 1) // 2


class _First:
    """The first two kernels' work on x (rows, channels): its sizes, and its tensors, which it allocates."""

    def __init__(self, x: torch.Tensor, groups: int, hidden: torch.Tensor | None) -> None:
        self.x, self.hidden, self.groups = x, as_bytes(hidden), groups
        self.rows, channels = x.shape
        self.width = channels // groups
        self.kinds = tiles(self.width, x.dtype)
        block = self.kinds["products"]["BLOCK"]
        self.tiles = _triangle(self.width, block)
        units = groups * self.tiles + cdiv(channels, self.kinds["products"]["BLOCK_S"])
        self.per_part = max(PART_ROWS, cdiv(self.rows, max(1, RESIDENT * processors(x) // units)))
        self.parts = cdiv(self.rows, self.per_part)
        self.programs = self.parts * units
        self.statistics = groups * self.tiles * (block // self.kinds["covariance"]["CHUNK"])

        def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return x.new_empty(shape, dtype=dtype)

        self.products = made(self.parts, groups * self.tiles, block, block)
        self.sums = made(self.parts, channels)
        self.counts = None if hidden is None else made(self.parts)
        self.moments = Moments(
            made(channels),
            made(groups, self.width, self.width),
            made(channels),
            made(2, self.statistics, dtype=torch.float64),
        )

    def launch(self, act: torch.Tensor | None) -> Moments:
        found, sizes = self.moments, (self.groups, self.width, self.tiles)
        launch(products_kernel, (self.programs,),
            self.x, self.hidden, act, self.products, self.sums, self.counts, found.shift, self.rows, self.per_part,
            *sizes, self.x.stride(0), **self.kinds["products"],
        )  # fmt: skip
        launch(covariance_kernel, (self.statistics,),
            self.products, self.sums, self.counts, act, found.covariance, found.mean, found.statistics, self.parts,
            self.rows, *sizes, **self.kinds["covariance"],
        )  # fmt: skip
        return found

    def job(self, act: torch.Tensor) -> tuple[torch.Tensor | int | None, ...]:
        return (
            self.x, act, self.products, self.sums, *self.moments, self.counts, self.hidden, self.rows, self.per_part,
            self.parts, self.groups, self.width, self.tiles, self.x.stride(0), self.programs, self.statistics,
        )  # fmt: skip


def moments_of_jobs(
    jobs: Sequence[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor | None]], table: _jobs.Table
) -> list[Moments | None]:
    """Returns the moments of each (x, groups, act, hidden), None for those that are to find them by themselves: two
    launches for all that have the same dtype and tiles, as long as their products fit into SCRATCH.
    """
    found: list[Moments | None] = [None] * len(jobs)
    kinds: dict[tuple, list[int]] = {}
    for i, (x, groups, _, hidden) in enumerate(jobs):
        width = x.shape[1] // groups
        if _jobs.fits(x) and width % 16 == 0:
            key = x.dtype, hidden is None, *((k, *v.items()) for k, v in tiles(width, x.dtype).items())
            kinds.setdefault(key, []).append(i)
    for members in kinds.values():
        waiting = list(members)
        while waiting:
            batch: list[tuple[_First, torch.Tensor]] = []
            scratch = 0
            while waiting and (scratch < SCRATCH or not batch):
                x, groups, act, hidden = jobs[waiting[0]]
                first = _First(x, groups, hidden)
                found[waiting.pop(0)] = first.moments
                batch.append((first, act))
                scratch += first.products.nbytes
            _launch_jobs(batch, table)
    return found


def _launch_jobs(batch: Sequence[tuple[_First, torch.Tensor]], table: _jobs.Table) -> None:
    some = batch[0][0]
    rows = table([_jobs.row(first.job(act)) for first, act in batch])
    padded = {"PADDED": some.hidden is not None}
    programs = max(first.programs for first, _ in batch)
    statistics = max(first.statistics for first, _ in batch)
    _jobs.run(products_of_jobs_kernel, rows, programs,
        DTYPE=_jobs.TYPES[some.x.dtype], **padded, **some.kinds["products"],
    )  # fmt: skip
    _jobs.run(covariance_of_jobs_kernel, rows, statistics, **padded, **some.kinds["covariance"])


def whitening_gradient_forward(
    grad: torch.Tensor,
    x: torch.Tensor,
    groups: int,
    limit: float | None,
    grad_scale: float | None,
    limits: torch.Tensor | None = None,
    act: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    white: torch.Tensor | None = None,
    moments: Moments | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the changed gradient and whether w is below the limit: written over ``grad`` and to ``white``, if given.

    grad, x: (rows, channels), whose rows may lie apart. limits: (limit, grad_scale), in place of the numbers. act: one
    number; if it is 0, the results are grad and False. hidden: (rows,), bool. moments: what ``moments_of_jobs`` found
    for x, groups, act and hidden.
    """
    (rows, channels), width, in_place = x.shape, x.shape[1] // groups, white is not None
    shift, covariance, mean, table = _First(x, groups, hidden).launch(act) if moments is None else moments
    statistics, hidden = table.shape[1], as_bytes(hidden)
    grad_row, kinds = grad.stride(0), tiles(width, x.dtype)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return x.new_empty(shape, dtype=dtype)

    block = kinds["norms"]["BLOCK"]
    upper, blocks = _triangle(width, block), cdiv(width, block)
    grad_tiles = cdiv(rows, GRAD_TILE["GRAD_R"]) * cdiv(channels, GRAD_TILE["GRAD_C"])
    tiles_per_part = cdiv(grad_tiles, RESIDENT * processors(x))
    grad_parts = cdiv(grad_tiles, tiles_per_part)
    white = made(dtype=torch.bool) if white is None else white
    change = made(groups, width, width, dtype=x.dtype)
    bias, norms = made(blocks, channels), made(groups * upper + grad_parts)
    launch(norms_kernel, (groups * upper + grad_parts,),
        grad, hidden, covariance, mean, table, limits, act, white, change, bias, norms, 0.0 if limit is None else limit,
        statistics, rows, groups, width, upper, grad_tiles, tiles_per_part, grad_row, **kinds["norms"],
    )  # fmt: skip

    y = grad if in_place else made(rows, channels, dtype=grad.dtype)
    kind = kinds["change"]
    launch(change_kernel, (cdiv(rows, kind["BLOCK_R"]) * groups * cdiv(width, kind["BLOCK"]),),
        grad, x, hidden, shift, table, white, limits, act, change, bias, norms, y,
        0.0 if grad_scale is None else grad_scale,
        statistics, rows, groups, width, groups * upper, grad_parts, blocks, grad_row, x.stride(0), y.stride(0),
        IN_PLACE=in_place, **kind,
    )  # fmt: skip
    return y, white
