# SPDX-License-Identifier: Apache-2.0
"""The activation of BatchNorm in training mode over rows of C channels, in two launches each way.

    m = mean of the rows that are not hidden      v = mean of (x - m)^2 of them      n = (x - m) / sqrt(v + eps)
    z = n weight + bias      y = act(z), 0 at hidden rows
    With q = grad act'(z): dweight = sum q n      dbias = sum q
    dx = weight / sqrt(v + eps) (q - (dbias + n dweight) / N), 0 at hidden rows

Bytes per element of e bytes: forward e for the statistics and 2e for y, backward 2e for the sums and 3e for dx. A
4x750x512 bf16 tensor takes 2 us forward and 4 us backward at 4.3 TB/s.

Programs of both kernels of a pass have the same part of the same channels. A part's sums are rows of a table, which
every program of the second kernel adds up in float64 and in one order, for its channels: a third launch takes longer.
Results repeat bit for bit on one kind of device, without atomics.

A program subtracts the mean of its first rows before it squares, so that nothing cancels, however large the mean is.
Parts are combined by their means and squares (Chan, Golub and LeVeque, 1979).
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import activate_with_slope
from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._hidden import visible
from fastasr.kernels._launch import as_bytes, cdiv, launch, next_power_of_2
from fastasr.kernels._layer_norm import inverse_root, load_tile
from fastasr.kernels._parts import ELEMENTS, WARPS, split_rows

CHANNELS = 32  # A tile has at most this many.
FORWARD, BACKWARD = 2, 1  # programs on a multiprocessor: those of the backward take 96 registers of a thread
PARTS = 16  # rows of the table that are added up at a time: 32 of 512 channels have about as many


@triton.jit
def _place(rows_per_part, rows, C, BLOCK_C: tl.constexpr):
    """Returns the part of this program, its first row and the one behind its last, and its channels."""
    column_tiles = tl.cdiv(C, BLOCK_C)
    part = (tl.program_id(0) // column_tiles).to(tl.int64)
    first = part * rows_per_part
    c = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    return part, first, tl.minimum(first + rows_per_part, rows), c


@triton.jit(do_not_specialize=["rows", "rows_per_part", "parts"])
def statistics_kernel(
    X, HIDDEN, TABLE, rows, rows_per_part, parts, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    # TABLE: (parts, 2, C), means and sums of squares; then (parts,), the rows that are not hidden
    part, first, end, c = _place(rows_per_part, rows, C, BLOCK_C)
    shift = tl.zeros([BLOCK_C], tl.float32)
    s1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    count = tl.full([], 0.0, tl.float32)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        seen = visible(HIDDEN, r, end)
        x = load_tile(X, r, c, C, seen[:, None] & (c < C)[None, :])  # [BLOCK_R, BLOCK_C]
        here = tl.sum(tl.where(seen, 1.0, 0.0), axis=0)
        if count == 0.0:
            shift = column_sums(x) / tl.maximum(here, 1.0)
        d = tl.where(seen[:, None], x - shift[None, :], 0.0)
        s1 += d
        s2 = tl.fma(d, d, s2)
        count += here
        first += BLOCK_R
    kind = TABLE.dtype.element_ty
    sums = column_sums(s1.to(kind))
    step = sums / tl.maximum(count, 1.0).to(kind)
    at = TABLE + part * 2 * C + c
    tl.store(at, shift.to(kind) + step, mask=c < C)
    tl.store(at + C, column_sums(s2.to(kind)) - sums * step, mask=c < C)
    if tl.program_id(0) % tl.cdiv(C, BLOCK_C) == 0:
        tl.store(TABLE + parts.to(tl.int64) * 2 * C + part, count.to(kind))


@triton.jit
def _combined(TABLE, parts, c, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the mean and the sum of squares of all rows, and their number, in float64."""
    COUNTS = TABLE + parts.to(tl.int64) * 2 * C
    counts = tl.zeros([BLOCK_P], tl.float64)
    mean = tl.zeros([BLOCK_C], tl.float64)
    squares = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P).to(tl.int64)
        count = tl.load(COUNTS + p, mask=p < parts, other=0.0).to(tl.float64)
        at = TABLE + p[:, None] * 2 * C + c[None, :]  # [BLOCK_P, BLOCK_C]
        found = tl.load(at, mask=(p < parts)[:, None] & (c < C)[None, :], other=0.0).to(tl.float64)
        mean += column_sums(found * count[:, None])
        counts += count
    number = tl.sum(counts, axis=0)
    share = 1.0 / tl.maximum(number, 1.0)
    mean *= share
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P).to(tl.int64)
        keep = (p < parts)[:, None] & (c < C)[None, :]
        count = tl.load(COUNTS + p, mask=p < parts, other=0.0).to(tl.float64)
        at = TABLE + p[:, None] * 2 * C + c[None, :]
        apart = tl.load(at, mask=keep, other=0.0).to(tl.float64) - mean[None, :]
        square = tl.load(at + C, mask=keep, other=0.0).to(tl.float64)
        squares += column_sums(square + count[:, None] * apart * apart)
    return mean, tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL), number


@triton.jit
def _normalised(x, high, low, scale, PRECISE: tl.constexpr):
    """Returns n. The mean of float32 rows is subtracted in two parts, exact to float64."""
    x = x - high[None, :]
    if PRECISE:
        x = x - low[None, :]
    return x * scale[None, :]


@triton.jit
def _parameters(WEIGHT, BIAS, c, C):
    w = tl.load(WEIGHT + c, mask=c < C, other=0.0).to(tl.float32)
    return w, tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "rows_per_part", "parts"])
def normalise_kernel(
    X, HIDDEN, WEIGHT, BIAS, TABLE, Y, MEAN, VARIANCE, RATE, STATISTICS, rows, rows_per_part, parts, C, eps, momentum,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # STATISTICS: (4, C), the mean in two parts, the scale, the share of a row
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    part, first, end, c = _place(rows_per_part, rows, C, BLOCK_C)
    mean, squares, number = _combined(TABLE, parts, c, C, BLOCK_P, BLOCK_C)
    share = tl.where(number > 0.0, 1.0 / tl.maximum(number, 1.0), 0.0)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    scale = inverse_root(squares * share, eps)
    if part == 0:
        own = c < C
        ones = tl.full([BLOCK_C], 1.0, tl.float32)
        tl.store(STATISTICS + c, high, mask=own)
        tl.store(STATISTICS + C + c, low, mask=own)
        tl.store(STATISTICS + 2 * C + c, scale, mask=own)
        tl.store(STATISTICS + 3 * C + c, ones * share.to(tl.float32), mask=own)
        tl.store(MEAN + c, high, mask=own)
        tl.store(VARIANCE + c, (squares / tl.maximum(number - 1.0, 1.0)).to(tl.float32), mask=own)
        tl.store(RATE + c, ones * tl.where(number > 0.0, momentum, 0.0), mask=own)
    w, b = _parameters(WEIGHT, BIAS, c, C)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        seen = visible(HIDDEN, r, end)
        x = load_tile(X, r, c, C, seen[:, None] & (c < C)[None, :])  # [BLOCK_R, BLOCK_C]
        z = tl.fma(_normalised(x, high, low, scale, PRECISE), w[None, :], b[None, :])
        y, _ = activate_with_slope(z, ACTIVATION, PRECISE)
        y = tl.where(seen[:, None], y, 0.0).to(Y.dtype.element_ty)
        tl.store(Y + r[:, None] * C + c[None, :], y, mask=(r < end)[:, None] & (c < C)[None, :])
        first += BLOCK_R


@triton.jit
def _loaded(STATISTICS, c, C):
    """Returns the mean in two parts and the scale."""
    own = c < C
    high = tl.load(STATISTICS + c, mask=own, other=0.0)
    low = tl.load(STATISTICS + C + c, mask=own, other=0.0)
    return high, low, tl.load(STATISTICS + 2 * C + c, mask=own, other=0.0)


@triton.jit
def _gradient(
    GRAD, X, r, c, C, seen, high, low, scale, w, b, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr
):
    """Returns q, which is 0 where not ``seen``, and n."""
    keep = seen[:, None] & (c < C)[None, :]
    n = _normalised(load_tile(X, r, c, C, keep), high, low, scale, PRECISE)
    _, slope = activate_with_slope(tl.fma(n, w[None, :], b[None, :]), ACTIVATION, PRECISE)
    return tl.where(keep, load_tile(GRAD, r, c, C, keep) * slope, 0.0), tl.where(keep, n, 0.0)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def sums_kernel(
    GRAD, X, HIDDEN, WEIGHT, BIAS, STATISTICS, TABLE, rows, rows_per_part, C,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # TABLE: (parts, 2, C), the parts of dweight and dbias
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    part, first, end, c = _place(rows_per_part, rows, C, BLOCK_C)
    high, low, scale = _loaded(STATISTICS, c, C)
    w, b = _parameters(WEIGHT, BIAS, c, C)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        seen = visible(HIDDEN, r, end)
        q, n = _gradient(GRAD, X, r, c, C, seen, high, low, scale, w, b, ACTIVATION, PRECISE)
        dweight = tl.fma(q, n, dweight)
        dbias += q
        first += BLOCK_R
    kind = TABLE.dtype.element_ty
    at = TABLE + part * 2 * C + c
    tl.store(at, column_sums(dweight.to(kind)), mask=c < C)
    tl.store(at + C, column_sums(dbias.to(kind)), mask=c < C)


@triton.jit(do_not_specialize=["rows", "rows_per_part", "parts"])
def backward_kernel(
    GRAD, X, HIDDEN, WEIGHT, BIAS, STATISTICS, TABLE, DX, DWEIGHT, DBIAS, rows, rows_per_part, parts, C,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    part, first, end, c = _place(rows_per_part, rows, C, BLOCK_C)
    weight_sum = tl.zeros([BLOCK_C], tl.float64)
    bias_sum = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        keep = (p < parts)[:, None] & (c < C)[None, :]
        at = TABLE + p[:, None] * 2 * C + c[None, :]  # [BLOCK_P, BLOCK_C]
        weight_sum += column_sums(tl.load(at, mask=keep, other=0.0).to(tl.float64))
        bias_sum += column_sums(tl.load(at + C, mask=keep, other=0.0).to(tl.float64))
    dweight, dbias = weight_sum.to(tl.float32), bias_sum.to(tl.float32)
    if part == 0:
        tl.store(DWEIGHT + c, dweight.to(DWEIGHT.dtype.element_ty), mask=c < C)
        tl.store(DBIAS + c, dbias.to(DBIAS.dtype.element_ty), mask=c < C)
    high, low, scale = _loaded(STATISTICS, c, C)
    w, b = _parameters(WEIGHT, BIAS, c, C)
    share = tl.load(STATISTICS + 3 * C + c, mask=c < C, other=0.0)
    along, common, factor = dweight * share, dbias * share, scale * w
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        seen = visible(HIDDEN, r, end)
        q, n = _gradient(GRAD, X, r, c, C, seen, high, low, scale, w, b, ACTIVATION, PRECISE)
        d = tl.fma(-n, along[None, :], q - common[None, :]) * factor[None, :]
        d = tl.where(seen[:, None], d, 0.0).to(DX.dtype.element_ty)
        tl.store(DX + r[:, None] * C + c[None, :], d, mask=(r < end)[:, None] & (c < C)[None, :])
        first += BLOCK_R


def block_channels(channels: int) -> int:
    """Returns the channels of a tile."""
    return min(CHANNELS, next_power_of_2(channels))


def _split(x: torch.Tensor, resident: int) -> tuple[int, int, int, int, dict[str, int]]:
    """Returns the rows, the rows of a part, the parts, the programs, and the tile of x (..., C)."""
    channels = x.shape[-1]
    rows, block_c = x.numel() // channels, block_channels(channels)
    column_tiles = cdiv(channels, block_c)
    block_r, rows_per_part, parts = split_rows(max(1, rows), block_c, x, column_tiles, ELEMENTS, resident)
    tile = {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": WARPS}
    return rows, rows_per_part, parts, parts * column_tiles, tile


def _table(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.new_empty(size, dtype=torch.float64 if x.dtype == torch.float32 else torch.float32)


def batch_norm_activation_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    padding_mask: torch.Tensor | None,
    eps: float,
    momentum: float,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    """Returns y in x's dtype, and in float32 mean, unbiased variance and rate (C,), and the statistics (4, C) that the
    backward reads. All tensors are contiguous, weight and bias each in its own dtype.
    """
    channels = x.shape[-1]
    # Parts of one tensor would be views, which take more calls of torch.
    sizes = channels, channels, channels, (4, channels)
    found = tuple(x.new_empty(size, dtype=torch.float32) for size in sizes)
    y = torch.empty_like(x)
    rows, rows_per_part, parts, programs, tile = _split(x, FORWARD)
    table, hidden = _table(x, parts * (2 * channels + 1)), as_bytes(padding_mask)
    split = rows, rows_per_part, parts, channels
    launch(statistics_kernel, (programs,), x, hidden, table, *split, **tile)
    launch(normalise_kernel, (programs,),
        x, hidden, weight, bias, table, y, *found, *split, eps, momentum,
        ACTIVATION=activation, BLOCK_P=PARTS, **tile,
    )  # fmt: skip
    return y, *found


def batch_norm_activation_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    padding_mask: torch.Tensor | None,
    statistics: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dweight, dbias) in the dtypes of x, weight and bias."""
    channels = x.shape[-1]
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    rows, rows_per_part, parts, programs, tile = _split(x, BACKWARD)
    table, hidden = _table(x, parts * 2 * channels), as_bytes(padding_mask)
    launch(sums_kernel, (programs,),
        grad, x, hidden, weight, bias, statistics, table, rows, rows_per_part, channels,
        ACTIVATION=activation, **tile,
    )  # fmt: skip
    launch(backward_kernel, (programs,),
        grad, x, hidden, weight, bias, statistics, table, dx, dweight, dbias, rows, rows_per_part, parts, channels,
        ACTIVATION=activation, BLOCK_P=PARTS, **tile,
    )  # fmt: skip
    return dx, dweight, dbias
