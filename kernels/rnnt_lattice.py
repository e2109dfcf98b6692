# SPDX-License-Identifier: Apache-2.0
"""The lattice of a transducer, scores and the gradients of its arcs: one program per sequence.

    p[s,t] = log(e^(p[s-1,t'] + x[s-1,t']) + e^(p[s,t-1] + y[s,t-1])),  t' = t (regular) or t - 1 (modified)

A row of cells is a linear recurrence along t, p[t] = p[t-1] y[t-1] + c[t] with c from the row before: a scan. Lanes are
t, or u = t - s in a modified lattice: there too a symbol stays in its lane, so rows stay in registers, only the scan
exchanges data, and x, y and the shares are read along rows. A lattice longer than a block of lanes is cut into blocks
of columns, whose last column the next block reads. In the forward, numbers are m 2^e, see _scaled_number.py.

The forward stores each cell's share w of the symbol arc. In the backward the mass g of a row is a scan from the right,
g[t] = d[t] + (1 - w[t+1]) g[t+1], where symbols carry d down from the row after: only products and sums. Both load the
numbers of a row a row ahead.

Bytes per cell: forward 8, with shares 12, backward 12 (and 8 for the zeros outside the boundaries). Steps of a program:
S + 1 scans for every 1024 frames. The kernel reads boundaries on the device and moves them inside the lattice.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._lattice import largest, load_boundary, unfit
from fastasr.kernels._launch import cdiv, launch, next_power_of_2
from fastasr.kernels._scaled_number import add, compose, compose_plain, logarithm, normalised, ratio, split

MAX_LANES = 1024


@triton.jit
def _arcs(
    x_first, y_first, width, frames, u, s, rows, columns, x_end, MODIFIED: tl.constexpr
):  # fmt: skip
    """Returns the scores of the symbols and blanks that lead to row s > 0, or to none if it is past the last."""
    from_x = u + s - 1 if MODIFIED else u
    from_y = u + s - 1 if MODIFIED else u - 1
    x = tl.load(x_first + (s - 1) * width + from_x, mask=(s <= rows) & (from_x < x_end), other=float("-inf"))
    reads = (s <= rows) & (u > 0) & (from_y < columns)
    return x, tl.load(y_first + s * frames + from_y, mask=reads, other=float("-inf"))


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
    worst = tl.full([BLOCK], float("-inf"), tl.float32)
    score = float("-inf")
    end = columns - rows if MODIFIED else columns  # the lane of the end
    for first in range(0, columns + 1, BLOCK):
        u = first + lane  # [BLOCK]
        # A symbol of probability 1 leads to the very first cell, from a row of ones.
        pm = tl.full([BLOCK], 1.0, tl.float32)
        pe = tl.zeros([BLOCK], tl.float32)
        next_x = tl.where(u == 0, 0.0, float("-inf"))
        next_y = tl.load(y_first + (u - 1), mask=(u > 0) & (u <= columns) & (rows >= 0), other=float("-inf"))
        for s in range(0, rows + 1):
            x, y = next_x, next_y
            next_x, next_y = _arcs(x_first, y_first, x_row, y_row, u, s + 1, rows, columns, x_end, MODIFIED)
            worst = largest(largest(x, y), worst)
            if MODIFIED:  # no path can take these arcs: they are read only because they may make a result NaN
                early = (u < s) & (u < columns)
                y_early = tl.load(y_first + s * y_row + u, mask=early, other=0.0)
                x_early = tl.load(x_first + s * x_row + u, mask=early & (s < rows), other=0.0)
            xm, xe = split(x)
            ym, ye = split(y)
            cm, ce = xm * pm, xe + pe
            if first > 0:  # the last column of the previous block
                before_m, before_e = tl.load(column_m + s), tl.load(column_e + s)
                in_m, in_e = add(before_m * ym, before_e + ye, cm, ce)
                bm = tl.where(lane == 0, in_m, cm)
                be = tl.where(lane == 0, in_e, ce)
            else:
                bm, be = cm, ce
            _, _, pm, pe = tl.associative_scan((ym, ye, bm, be), 0, compose)
            pm, pe = normalised(pm, pe)
            if SHARES is not None:
                to = SHARES + (b * (symbols + 1) + s) * share_row + u
                tl.store(to, ratio(cm, ce, pm, pe), mask=u < share_row)
            if MODIFIED:
                worst = largest(largest(x_early, y_early), worst)
            if first + BLOCK <= columns:
                tl.store(column_m + s + 0 * lane, pm, mask=lane == BLOCK - 1)
                tl.store(column_e + s + 0 * lane, pe, mask=lane == BLOCK - 1)
        here = tl.max(tl.where(u == end, logarithm(pm, pe), float("-inf")), axis=0)
        score = tl.where(rows >= 0, tl.maximum(score, here), score)
        tl.debug_barrier()  # the column is read by other threads
    score = tl.where(unfit(worst), float("nan"), score)
    tl.store(SCORES + b, score)


@triton.jit
def _shares(row, u, there, share_row):
    """Returns the shares of the cells u of a row and of the cells after them."""
    w = tl.load(row + u, mask=there & (u < share_row), other=0.0)
    return w, tl.load(row + u + 1, mask=there & (u + 1 < share_row), other=0.0)


@triton.jit(do_not_specialize=["symbols", "frames", "width"])
def backward_kernel(
    GRAD, SCORES, SHARES, BOUNDARY, DX, DY, COLUMN, symbols, frames, width, share_row,
    MODIFIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, rows, columns = load_boundary(BOUNDARY, b, symbols, frames)
    # Lanes go from right to left, as a scan from the right takes four times as many shuffles.
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
    reached = (score > float("-inf")) & (score < float("inf"))  # otherwise shares may be NaN
    grad = tl.where(reached, grad, 0.0)
    poison = tl.where(poisoned, score, 0.0)
    end = columns - rows if MODIFIED else columns
    blocks = tl.cdiv(columns + 1, BLOCK)
    for k in range(0, blocks):
        first = (blocks - 1 - k) * BLOCK
        u = first + (BLOCK - 1 - lane)  # [BLOCK]
        # Mass that symbols carry to this row. NaN reaches all cells.
        down = tl.where(u == end, grad, 0.0) + poison
        shares = SHARES + (b * (symbols + 1) + rows) * share_row
        next_w, next_after = _shares(shares, u, reached & (rows >= 0), share_row)
        for i in range(0, rows + 1):
            s = rows - i
            w, after = next_w, next_after
            shares -= share_row
            next_w, next_after = _shares(shares, u, reached & (s > 0), share_row)
            d = down
            if k > 0:
                d += tl.where(lane == 0, tl.load(column + s), 0.0)
            # What passes a block's end is in d; right of ``columns`` there is no mass.
            _, g = tl.associative_scan((1.0 - after, d), 0, compose_plain)
            down = w * g
            blank = g - down
            to_x = u + s - 1 if MODIFIED else u
            row_x = x_first + (s - 1) * x_row
            to_y = u + s - 1 if MODIFIED else u - 1
            row_y = y_first + s * y_row
            tl.store(row_x + to_x, down, mask=(s > 0) & (to_x < x_end))
            tl.store(row_y + to_y, blank, mask=(u > 0) & (to_y < columns))
            if MODIFIED:  # no path can take these arcs
                early = (u < s) & (u < tl.where(poisoned, columns, 0))
                tl.store(row_y + u, tl.zeros([BLOCK], tl.float32) + poison, mask=early)
                early &= u < s - 1
                tl.store(row_x + u, tl.zeros([BLOCK], tl.float32) + poison, mask=early & (s > 0))
            if first > 0:
                tl.store(column + s + 0 * lane, blank, mask=lane == BLOCK - 1)
        tl.debug_barrier()


def tile(frames: int) -> dict[str, int]:
    """Returns the lanes and the warps: four lanes to a thread. A program may have all registers."""
    lanes = min(MAX_LANES, next_power_of_2(frames + 1))
    warps = max(1, lanes // 128)
    return {"BLOCK": lanes, "num_warps": warps, "maxnreg": min(255, 2048 // warps)}


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
    lanes = tile(frames)
    column = x.new_empty((batch, 2, symbols + 1) if frames + 1 > lanes["BLOCK"] else 0)
    launch(forward_kernel, (batch,),
        x, y, boundary, scores, shares if keep else None, column, symbols, frames, width, row,
        MODIFIED=width == frames, **lanes,
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
    lanes = tile(frames)
    column = scores.new_empty((batch, symbols + 1) if frames + 1 > lanes["BLOCK"] else 0)
    launch(backward_kernel, (batch,),
        grad, scores, shares, boundary, dx, dy, column, symbols, frames, width, share_row(frames),
        MODIFIED=width == frames, **lanes,
    )  # fmt: skip
    return dx, dy
