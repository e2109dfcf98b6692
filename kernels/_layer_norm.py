# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and RMSNorm of rows that a program holds in registers: pieces of kernels, and the tiles of each pass."""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import generation, next_power_of_2
from fastasr.kernels._parts import ELEMENTS, WARPS, split_rows
from fastasr.kernels._vectors import load

# Rows live in registers: up to 4096 channels take at most 8 elements in each thread; wider rows spill.
MAX_CHANNELS = 65536


FEW = tl.constexpr(4)  # neighbours, which lie in one thread


@triton.jit
def _share(C, PRECISE: tl.constexpr):
    """Returns 1 / C, in float64 within 2^-44 when PRECISE: a division of float64 calls some fifty instructions."""
    share = 1.0 / tl.cast(C, tl.float32)
    if PRECISE:
        wide = share.to(tl.float64)
        share = wide * tl.fma(-wide, tl.cast(C, tl.float64), 2.0)
    return share


@triton.jit
def _addends(values, EXACT: tl.constexpr, PRECISE: tl.constexpr):
    """Returns what sums of rows add up: when PRECISE, sums of a few neighbours in float64, which EXACT adds in it."""
    if PRECISE:
        rows: tl.constexpr = values.shape[0]
        columns: tl.constexpr = values.shape[1]
        few = tl.reshape(values, [rows, columns // FEW, FEW])
        if EXACT:
            few = few.to(tl.float64)
        values = tl.sum(few, axis=2).to(tl.float64)
    return values


@triton.jit
def row_mean(values, C, PRECISE: tl.constexpr, EXACT: tl.constexpr = True):
    """Returns row means, added in float64 when PRECISE. Unless EXACT, a few neighbours are added in float32 before: the
    products that are added are rounded as much, and a conversion takes as long as eight sums.
    """
    return tl.sum(_addends(values, EXACT, PRECISE), axis=1) * _share(C, PRECISE)


@triton.jit
def row_means(a, b, C, PRECISE: tl.constexpr, EXACT: tl.constexpr = False):
    """Returns the row means of a and b, which cross the threads of a row together; EXACT is that of a."""
    pairs = tl.join(_addends(a, EXACT, PRECISE), _addends(b, False, PRECISE))
    return tl.split(tl.sum(pairs, axis=1) * _share(C, PRECISE))


@triton.jit
def centre(t, mean, keep, PRECISE: tl.constexpr):
    """Returns t - mean, 0 where not ``keep``. The mean of float32 rows is subtracted in two parts, exact to float64."""
    high = mean.to(tl.float32)
    t = t - high[:, None]
    if PRECISE:
        t = t - (mean - high.to(tl.float64)).to(tl.float32)[:, None]
    return tl.where(keep, t, 0.0)


@triton.jit
def inverse_root(variance, eps, PRECISE: tl.constexpr = True):
    """Returns 1 / sqrt(variance + eps) within 2 ulp. PRECISE: a Newton step, unless that is 0 or infinite, takes it to
    under 1 ulp.
    """
    square = (variance + eps).to(tl.float32)
    y = tl.rsqrt(square)
    if PRECISE:
        error = tl.fma(-square * y, y, 1.0)
        y = tl.where(error == error, tl.fma(0.5 * y, error, y), y)
    return y


@triton.jit
def normalise(t, keep, eps, C, PRECISE: tl.constexpr):
    """Returns t - mean t, 0 where not ``keep``, and 1 / sqrt(var t + eps).

    MEGA's epsilon is 1e-12: a row of almost equal elements is normalised by the rounding errors of its elements, and a
    kernel must not add its own.
    """
    t = centre(t, row_mean(t, C, PRECISE), keep, PRECISE)
    return t, inverse_root(row_mean(t * t, C, PRECISE, False), eps, PRECISE)


@triton.jit
def normed(t, keep, eps, C, CENTRED: tl.constexpr, PRECISE: tl.constexpr):
    """Returns t - mean t, or t for RMSNorm, 0 where not ``keep``, and what it is multiplied by."""
    if CENTRED:
        return normalise(t, keep, eps, C, PRECISE)
    return t, inverse_root(row_mean(t * t, C, PRECISE, False), eps, PRECISE)


@triton.jit
def norm(t, there, keep, eps, C, CENTRED: tl.constexpr, PRECISE: tl.constexpr):
    """Returns the normalised rows, 0 where not ``there``, and what they were multiplied by, [BLOCK_R, 1]."""
    t, inverse = normed(t, keep, eps, C, CENTRED, PRECISE)
    # With eps = 0 it would be infinite in rows past the end.
    inverse = tl.where(there, inverse, 0.0)[:, None]
    return t * inverse, inverse


@triton.jit
def normed_with(t, d, there, keep, eps, C, CENTRED: tl.constexpr, PRECISE: tl.constexpr):
    """Returns what ``norm`` does, for rows n, then mean d and mean d n, for the gradient d of n, which is 0 where not
    ``keep``. Programs wait twice for the sums of rows: mean d n is that of d (t - mean t), times the factor of n.
    """
    mean = tl.zeros([t.shape[0]], tl.float32)
    if CENTRED:
        of_t, of_d = row_means(t, d, C, PRECISE, True)
        t, mean = centre(t, of_t, keep, PRECISE), of_d.to(tl.float32)
    square, along = row_means(t * t, t * d, C, PRECISE)
    inverse = tl.where(there, inverse_root(square, eps, PRECISE), 0.0)  # as in ``norm``
    along = along.to(tl.float32) * inverse
    return t * inverse[:, None], inverse[:, None], mean[:, None], along[:, None]


@triton.jit
def through(d, n, inverse, mean, along):
    """Returns the gradient of a norm's input, for d that of its normalised rows n, mean d and mean d n."""
    return tl.fma(-n, along, d - mean) * inverse


@triton.jit
def means_with(d, n, C, CENTRED: tl.constexpr, PRECISE: tl.constexpr):
    """Returns mean d, or 0 for RMSNorm, and mean d n."""
    if CENTRED:
        mean, along = row_means(d, d * n, C, PRECISE)
        return mean.to(tl.float32)[:, None], along.to(tl.float32)[:, None]
    along = row_mean(d * n, C, PRECISE, False).to(tl.float32)
    return tl.zeros_like(along)[:, None], along[:, None]


@triton.jit
def limited(t, limit, LIMITED: tl.constexpr):
    """Returns t between -limit and limit; keeps a NaN."""
    if LIMITED:
        t = tl.where(t < -limit, -limit, tl.where(t > limit, limit, t))
    return t


@triton.jit
def within(d, t, limit, LIMITED: tl.constexpr):
    """Returns the gradient d, 0 where t is outside the limit or a NaN, as in torch.clamp; an infinite limit is
    none."""
    if LIMITED:
        d = tl.where((tl.abs(t) <= limit) | (limit == float("inf")), d, 0.0)
    return d


@triton.jit
def load_tile(X, r, c, stride, keep):
    return load(X + r[:, None] * stride + c[None, :], keep)


def row_width(channels: int) -> int:
    """Returns the channels of a tile."""
    if channels > MAX_CHANNELS:
        raise ValueError(
            f"LayerNorm: expected at most {MAX_CHANNELS} channels in the Triton kernels, got {channels}"
        )
    return max(32, next_power_of_2(channels))


def _tile(elements: int, channels: int, warps: int) -> dict[str, int]:
    block_c = row_width(channels)
    return {"BLOCK_R": max(1, elements // block_c), "BLOCK_C": block_c, "num_warps": warps}


def row_tile(channels: int, elements: int, least: int = 1) -> dict[str, int]:
    """Returns a tile of whole rows with its warps, ``least`` to 16, which have so many ``elements`` each."""
    warps = max(least, min(16, row_width(channels) // elements))
    return _tile(elements * warps, channels, warps)


def forward_tile(channels: int, generation: int, norms: int = 1) -> dict[str, int]:
    """Returns the tile of the forward; with more elements in a warp, a second norm of the row would spill."""
    return row_tile(channels, 256 if generation >= 90 or norms > 1 else 512)


def backward_tile(
    channels: int, dtype: torch.dtype, gated: bool, masked: bool, generation: int
) -> tuple[dict[str, int], int]:
    """Returns the tile of the backward, and the programs on a multiprocessor. Where 16 warps would
    spill, programs have eight at most, whose threads may have twice the registers.

    On 9.0, in 16 bits, many programs of one row or few hide the barriers of a row's sums: in a trial on an H200 they
    took less time than one tile for each multiprocessor, at 800 to 30,000 rows of 512 channels. Elsewhere this is not
    measured.
    """
    spills = gated and (dtype == torch.float32 or masked or generation >= 100)
    most = WARPS // 2 if spills else WARPS
    if dtype == torch.float32 or generation != 90:
        return _tile(ELEMENTS * most // WARPS, channels, most), WARPS // most
    share = 256 if gated else 128  # elements of a warp
    warps = max(512 // share, min(most, row_width(channels) // share))
    return _tile(512, channels, warps), ELEMENTS // share // warps


def backward_parts(
    x: torch.Tensor, dtype: torch.dtype, gated: bool = False, masked: bool = False, sums: int = 2
) -> tuple[torch.Tensor, int, dict[str, int]]:
    """Returns what a backward over the rows of x takes whose numbers have this dtype: an empty table (sums, parts, C)
    of the parameters' gradients, the rows of a part, and the tile.
    """
    channels = x.shape[-1]
    tile, resident = backward_tile(channels, dtype, gated, masked, generation(x))
    block_r, block_c = tile["BLOCK_R"], tile["BLOCK_C"]
    _, rows_per_part, parts = split_rows(
        x.numel() // channels, block_c, x, elements=block_r * block_c, resident=resident
    )
    shares = torch.float64 if dtype == torch.float32 else torch.float32
    table = torch.empty((sums, parts, channels), dtype=shares, device=x.device)
    return table, rows_per_part, tile


def row_stride(t: torch.Tensor | None) -> int:
    """Returns elements from one row to the next; rows are dense and evenly spaced
    (``fastasr.ops._layout.rows``).
    """
    if t is None:
        return 0
    if t.is_contiguous():  # most are, and a generator takes a microsecond
        return t.shape[-1]
    return next((t.stride(d) for d in range(t.dim() - 2, -1, -1) if t.shape[d] > 1), t.shape[-1])
