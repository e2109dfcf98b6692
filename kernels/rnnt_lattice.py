# SPDX-License-Identifier: Apache-2.0
"""The lattice of a transducer, scores and the gradients of its arcs: one program per sequence.

    p[s,t] = log(e^(p[s-1,t'] + x[s-1,t']) + e^(p[s,t-1] + y[s,t-1])),  t' = t (regular) or t - 1 (modified)

A row of cells is a linear recurrence along t, p[t] = p[t-1] y[t-1] + c[t] with c from the row before: a scan. Lanes are
t, or u = t - s in a modified lattice: there too a symbol stays in its lane, so rows stay in registers, only the scan
exchanges data, and x, y and the shares are read along rows. A lattice longer than a block of lanes is cut into blocks
of columns, whose last column the next block reads. In the forward, numbers are m 2^e, see _scaled_number.py.

The forward stores each cell's share w of the symbol arc. In the backward the mass g of a row is a scan from the right,
g[t] = d[t] + (1 - w[t+1]) g[t+1], where symbols carry d down from the row after: only products and sums.

Bytes per cell: forward 8, with shares 12, backward 12 (and 8 for the zeros outside the boundaries). Steps of a program:
S + 1 scans for every 1024 frames. The kernel reads boundaries on the device and moves them inside the lattice.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._lattice import is_unfit, load_boundary
from fastasr.kernels._launch import cdiv, launch, next_power_of_2
from fastasr.kernels._scaled_number import (
    FLOOR,
    add,
    compose,
    compose_plain,
    logarithm,
    normalised,
    ratio,
    split,
)

MAX_LANES = 1024


@triton.jit(do_not_specialize=["symbols", "frames", "width"])
def forward_kernel(
    X, Y, BOUNDARY, SCORES, SHARES, COLUMN, symbols, frames, width, share_row,
    MODIFIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, rows, columns = load_boundary(BOUNDARY, b, symbols, frames)
    lane = tl.arange(0, BLOCK)
    x_first = X + (b * symbols + s_begin) * width + t_begin
    y_first = Y + (b * (symbols + 1) + s_begin) * frames + t_begin
    column_m = COLUMN + b * 2 * (symbols + 1)
    column_e = column_m + symbols + 1
    x_end = columns if MODIFIED else columns + 1
    x_row, y_row = b * 0 + width, b * 0 + frames  # 64 bits
    unfit = tl.zeros([BLOCK], tl.int32)
    score = float("-inf")
    end = columns - rows if MODIFIED else columns  # the lane of the end
    for first in range(0, columns + 1, BLOCK):
        u = first + lane  # [BLOCK]
        pm = tl.full([BLOCK], 1.0, tl.float32)
        pe = tl.full([BLOCK], FLOOR, tl.float32)
        for s in range(0, rows + 1):
            # symbols bring mass from the row before; the very first cell gets it from nowhere
            from_x = u + s - 1 if MODIFIED else u
            x = tl.load(
                x_first + (s - 1) * x_row + from_x, mask=(s > 0) & (from_x < x_end), other=float("-inf")
            )
            from_y = u + s - 1 if MODIFIED else u - 1
            y = tl.load(y_first + s * y_row + from_y, mask=(u > 0) & (from_y < columns), other=float("-inf"))
            unfit |= is_unfit(x) | is_unfit(y)
            if MODIFIED:  # no path can take these arcs: they are read only because they may make a result NaN
                early = u < s
                unfit |= is_unfit(tl.load(y_first + s * y_row + u, mask=early & (u < columns), other=0.0))
                early &= (u < columns) & (s < rows)
                unfit |= is_unfit(tl.load(x_first + s * x_row + u, mask=early, other=0.0))
            xm, xe = split(x)
            ym, ye = split(y)
            begin = (u == 0) & (s == 0)
            cm = tl.where(begin, 1.0, xm * pm)
            ce = tl.where(begin, 0.0, xe + pe)
            cm, ce = normalised(cm, ce)
            if first > 0:  # the last column of the previous block
                before_m, before_e = tl.load(column_m + s), tl.load(column_e + s)
                in_m, in_e = add(before_m * ym, before_e + ye, cm, ce)
                bm = tl.where(lane == 0, in_m, cm)
                be = tl.where(lane == 0, in_e, ce)
            else:
                bm, be = cm, ce
            bm, be = normalised(bm, be)
            _, _, pm, pe = tl.associative_scan((ym, ye, bm, be), 0, compose)
            if SHARES is not None:
                to = SHARES + (b * (symbols + 1) + s) * share_row + u
                tl.store(to, ratio(cm, ce, pm, pe), mask=u < share_row)
            if first + BLOCK <= columns:
                tl.store(column_m + s + 0 * lane, pm, mask=lane == BLOCK - 1)
                tl.store(column_e + s + 0 * lane, pe, mask=lane == BLOCK - 1)
        here = tl.max(tl.where(u == end, logarithm(pm, pe), float("-inf")), axis=0)
        score = tl.where(rows >= 0, tl.maximum(score, here), score)
        tl.debug_barrier()  # the column is read by other threads
    score = tl.where(tl.max(unfit, axis=0) > 0, float("nan"), score)
    tl.store(SCORES + b, score)


@triton.jit(do_not_specialize=["symbols", "frames", "width"])
def backward_kernel(
    GRAD, SCORES, SHARES, BOUNDARY, DX, DY, COLUMN, symbols, frames, width, share_row,
    MODIFIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, rows, columns = load_boundary(BOUNDARY, b, symbols, frames)
    lane = tl.arange(0, BLOCK)
    x_first = DX + (b * symbols + s_begin) * width + t_begin
    y_first = DY + (b * (symbols + 1) + s_begin) * frames + t_begin
    column = COLUMN + b * (symbols + 1)
    x_end = columns if MODIFIED else columns + 1
    x_row, y_row = b * 0 + width, b * 0 + frames  # 64 bits
    score = tl.load(SCORES + b)
    grad = 1.0
    if GRAD is not None:
        grad = tl.load(GRAD + b)
    poisoned = score != score
    reached = (score > float("-inf")) & (score < float("inf"))
    grad = tl.where(reached, grad, 0.0)
    poison = tl.where(poisoned, score, 0.0)
    end = columns - rows if MODIFIED else columns
    blocks = tl.cdiv(columns + 1, BLOCK)
    for k in range(0, blocks):
        first = (blocks - 1 - k) * BLOCK
        u = first + lane  # [BLOCK]
        down = tl.zeros([BLOCK], tl.float32)  # mass that symbols carry to this row
        for i in range(0, rows + 1):
            s = rows - i
            shares = SHARES + (b * (symbols + 1) + s) * share_row
            w = tl.load(shares + u, mask=u < share_row, other=0.0)
            next_w = tl.load(shares + u + 1, mask=u + 1 < share_row, other=0.0)
            d = tl.where((u == end) & (i == 0), grad, down)
            if k > 0:
                d += tl.where(lane == BLOCK - 1, tl.load(column + s), 0.0)
            # a scan from the right; what passes a block's end is in d
            pass_on = tl.where((lane == BLOCK - 1) | (u >= columns), 0.0, 1.0 - next_w)
            _, g = tl.associative_scan((pass_on, d), 0, compose_plain, reverse=True)
            g = tl.where(reached, g, 0.0)  # shares may be NaN
            down = tl.where(reached, w * g, 0.0)
            blank = g - down
            to_x = u + s - 1 if MODIFIED else u
            row_x = x_first + (s - 1) * x_row
            tl.store(row_x + to_x, down + poison, mask=(s > 0) & (to_x < x_end))
            to_y = u + s - 1 if MODIFIED else u - 1
            row_y = y_first + s * y_row
            tl.store(row_y + to_y, blank + poison, mask=(u > 0) & (to_y < columns))
            if MODIFIED:  # no path can take these arcs
                early = (u < s) & (u < tl.where(poisoned, columns, 0))
                tl.store(row_y + u, tl.zeros([BLOCK], tl.float32) + poison, mask=early)
                early &= u < s - 1
                tl.store(row_x + u, tl.zeros([BLOCK], tl.float32) + poison, mask=early & (s > 0))
            if first > 0:
                tl.store(column + s + 0 * lane, blank, mask=lane == 0)
        tl.debug_barrier()


def _lanes(frames: int) -> tuple[int, int]:
    """Returns (lanes, warps): up to eight lanes to a thread; with four the forward spills."""
    lanes = min(MAX_LANES, next_power_of_2(frames + 1))
    return lanes, max(1, lanes // 256)


def share_row(frames: int) -> int:
    """Returns the elements from one row of shares to the next: rows are aligned."""
    return cdiv(frames + 1, 16) * 16


def rnnt_lattice_forward(
    symbol_logprobs: torch.Tensor, blank_logprobs: torch.Tensor, boundary: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (scores, shares) of contiguous float32 (B, S, T+1) or (B, S, T) and (B, S+1, T); boundary is (B, 4) int64
    or None. The shares are (B, S+1, T+1 rounded up to 16), without elements unless ``keep``.
    """
    x, y = symbol_logprobs, blank_logprobs
    batch, symbols, width = x.shape
    frames = y.shape[2]
    row = share_row(frames)
    scores = x.new_empty(batch)
    shares = x.new_empty((batch, symbols + 1, row) if keep else 0)
    if not batch:
        return scores, shares
    lanes, warps = _lanes(frames)
    column = x.new_empty((batch, 2, symbols + 1) if frames + 1 > lanes else 0)
    launch(forward_kernel, (batch,),
        x, y, boundary, scores, shares if keep else None, column, symbols, frames, width, row,
        MODIFIED=width == frames, BLOCK=lanes, num_warps=warps,
    )  # fmt: skip
    return scores, shares


def rnnt_lattice_backward(
    grad: torch.Tensor | None, scores: torch.Tensor, shares: torch.Tensor, boundary: torch.Tensor | None,
    symbols: int, width: int, frames: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns the gradients of x and y for ``grad`` (B,) of the scores; None stands for 1."""
    batch = scores.shape[0]
    dx = scores.new_zeros(batch, symbols, width)
    dy = scores.new_zeros(batch, symbols + 1, frames)
    if not batch:
        return dx, dy
    lanes, warps = _lanes(frames)
    column = scores.new_empty((batch, symbols + 1) if frames + 1 > lanes else 0)
    launch(backward_kernel, (batch,),
        grad, scores, shares, boundary, dx, dy, column, symbols, frames, width, share_row(frames),
        MODIFIED=width == frames, BLOCK=lanes, num_warps=warps,
    )  # fmt: skip
    return dx, dy
