# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and RMSNorm of rows that a program holds in registers: pieces of kernels, and the tiles of each pass."""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import generation, next_power_of_2
from fastasr.kernels._parts import ELEMENTS, WARPS, split_rows

# Rows live in registers: up to 4096 channels take at most 8 elements in each thread; wider rows spill.
MAX_CHANNELS = 65536


@triton.jit
def row_mean(values, C, PRECISE: tl.constexpr):
    """Returns row means, added in float64 when PRECISE."""
    if PRECISE:
        values = values.to(tl.float64)
    return tl.sum(values, axis=1) / C


@triton.jit
def centre(t, mean, keep, PRECISE: tl.constexpr):
    """Returns t - mean, 0 where not ``keep``. The mean of float32 rows is subtracted in two parts, exact to float64."""
    high = mean.to(tl.float32)
    t = t - high[:, None]
    if PRECISE:
        t = t - (mean - high.to(tl.float64)).to(tl.float32)[:, None]
    return tl.where(keep, t, 0.0)


@triton.jit
def inverse_root(variance, eps):
    """Returns 1 / sqrt(variance + eps)."""
    return tl.div_rn(1.0, tl.sqrt_rn((variance + eps).to(tl.float32)))


@triton.jit
def normalise(t, keep, eps, C, PRECISE: tl.constexpr):
    """Returns t - mean t, 0 where not ``keep``, and 1 / sqrt(var t + eps).

    MEGA's epsilon is 1e-12: a row of almost equal elements is normalised by the rounding errors of its elements, and a
    kernel must not add its own.
    """
    t = centre(t, row_mean(t, C, PRECISE), keep, PRECISE)
    return t, inverse_root(row_mean(t * t, C, PRECISE), eps)


@triton.jit
def normed(t, keep, eps, C, CENTRED: tl.constexpr, PRECISE: tl.constexpr):
    """Returns t - mean t, or t for RMSNorm, 0 where not ``keep``, and what it is multiplied by."""
    if CENTRED:
        return normalise(t, keep, eps, C, PRECISE)
    return t, inverse_root(row_mean(t * t, C, PRECISE), eps)


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
    return tl.load(X + r[:, None] * stride + c[None, :], mask=keep, other=0.0).to(tl.float32)


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
