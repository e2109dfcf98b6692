# SPDX-License-Identifier: Apache-2.0
"""The lattice of tokens and durations, scores and the gradients of its arcs: one program per sequence.

    p[t,s] = log(sum_{d>0} e^(p + y + z_d at (t-d, s)) + sum_d e^(p + x + z_d at (t-d, s-1))),  t < t_end
    score = log sum_{d>0} e^(p + y + z_d at (t_end - d, s_end))

Frames follow each other; lanes are s. A frame sums the arcs from earlier frames, cell by cell, and passes the sum on by
the arcs of duration 0, which lead from s to s + 1 within the frame: a scan. Cells, as m 2^e (see _scaled_number.py), go
through memory, because a lane reads its neighbour's cells of earlier frames. The forward stores the share that each arc
has in the cell where it leads. In the backward the mass g of a frame is the sum of w g' over the arcs that leave it,
with a scan from the right for the arcs of duration 0.

Bytes per cell with N durations: forward 4 (N + 2) + 8, with shares 8 N more, backward 4 (3 N + 2) + 4. The kernel reads
boundaries and durations on the device and moves boundaries inside the lattice; durations below 0 lead nowhere.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels import Unlaunchable
from fastasr.kernels._lattice import is_unfit, load_boundary
from fastasr.kernels._launch import launch, next_power_of_2
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

MAX_LANES = 4096
NONE = tl.constexpr(float("-inf"))


@triton.jit
def _arc(FROM, Z, at_x, at_z, keep):
    """Returns (m, e) of the arcs' probabilities."""
    a = tl.load(FROM + at_x, mask=keep, other=NONE).to(tl.float32)
    z = tl.load(Z + at_z, mask=keep, other=NONE).to(tl.float32)
    m, e = split(tl.where(keep, a + z, NONE))
    return m, e


@triton.jit(do_not_specialize=["symbols", "frames", "count"])
def forward_kernel(
    X,
    Y,
    Z,
    DURATIONS,
    BOUNDARY,
    SCORES,
    SHARES,
    CELLS_M,
    CELLS_E,
    symbols,
    frames,
    count,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, rows, columns = load_boundary(BOUNDARY, b, symbols, frames)
    s = tl.arange(0, BLOCK)  # [BLOCK], s - s_begin
    row = symbols + 1
    first = b * frames + t_begin
    X += first * symbols + s_begin
    Y += first * row + s_begin
    Z += (first * row + s_begin) * count
    CELLS_M += b * (frames + 1) * row
    CELLS_E += b * (frames + 1) * row
    if SHARES is not None:
        SHARES += b * frames * 2 * count * row
    inside, has_symbol = s <= rows, s < rows
    unfit = tl.zeros([BLOCK], tl.int32)
    score = float("-inf")
    for t in range(0, columns + 1):
        t64 = b * 0 + t
        last = t == columns
        m = tl.full([BLOCK], 1.0, tl.float32)
        e = tl.where((s == 0) & (t == 0), 0.0, tl.full([BLOCK], FLOOR, tl.float32))
        within = -1
        for i in range(0, count):
            d = tl.load(DURATIONS + i)
            within = tl.where(d == 0, i, within)
            start = t64 - d
            if t < columns:  # checks every number inside the boundary
                z = tl.load(Z + (t64 * row + s) * count + i, mask=inside, other=0.0).to(tl.float32)
                unfit |= is_unfit(z)
            if (d > 0) & (start >= 0):
                # blank: from the same s
                am, ae = _arc(Y, Z, start * row + s, (start * row + s) * count + i, inside)
                pm = tl.load(CELLS_M + start * row + s, mask=inside, other=1.0)
                pe = tl.load(CELLS_E + start * row + s, mask=inside, other=FLOOR)
                m, e = add(m, e, am * pm, ae + pe)
                # symbol: from s - 1
                before = (s > 0) & inside & (t < columns)
                at = s - 1
                am, ae = _arc(X, Z, start * symbols + at, (start * row + at) * count + i, before)
                pm = tl.load(CELLS_M + start * row + at, mask=before, other=1.0)
                pe = tl.load(CELLS_E + start * row + at, mask=before, other=FLOOR)
                m, e = add(m, e, am * pm, ae + pe)
                m, e = normalised(m, e)
        m, e = normalised(m, e)
        if t < columns:
            x = tl.load(X + t64 * symbols + s, mask=has_symbol, other=0.0).to(tl.float32)
            y = tl.load(Y + t64 * row + s, mask=inside, other=0.0).to(tl.float32)
            unfit |= is_unfit(x) | is_unfit(y)
            if within >= 0:  # along the frame
                before = (s > 0) & inside
                at = s - 1
                am, ae = _arc(X, Z, t64 * symbols + at, (t64 * row + at) * count + within, before)
                _, _, m, e = tl.associative_scan((am, ae, m, e), 0, compose)
            tl.store(CELLS_M + t64 * row + s, m, mask=inside)
            tl.store(CELLS_E + t64 * row + s, e, mask=inside)
        tl.debug_barrier()
        if SHARES is not None:
            for i in range(0, count):
                d = tl.load(DURATIONS + i)
                start = t64 - d
                if (d >= 0) & (start >= 0):
                    if d > 0:
                        am, ae = _arc(Y, Z, start * row + s, (start * row + s) * count + i, inside)
                        pm = tl.load(CELLS_M + start * row + s, mask=inside, other=1.0)
                        pe = tl.load(CELLS_E + start * row + s, mask=inside, other=FLOOR)
                        am, ae = normalised(am * pm, ae + pe)
                        to = SHARES + (start * 2 * count + i) * row + s
                        tl.store(to, ratio(am, ae, m, e), mask=inside)
                    before = (s > 0) & inside & (t < columns)
                    at = s - 1
                    am, ae = _arc(X, Z, start * symbols + at, (start * row + at) * count + i, before)
                    pm = tl.load(CELLS_M + start * row + at, mask=before, other=1.0)
                    pe = tl.load(CELLS_E + start * row + at, mask=before, other=FLOOR)
                    am, ae = normalised(am * pm, ae + pe)
                    to = SHARES + (start * 2 * count + count + i) * row + at
                    tl.store(to, ratio(am, ae, m, e), mask=before)
        if last:
            score = tl.max(tl.where(s == rows, logarithm(m, e), NONE), axis=0)
    score = tl.where((rows >= 0) & (columns >= 0), score, NONE)
    score = tl.where(tl.max(unfit, axis=0) > 0, float("nan"), score)
    tl.store(SCORES + b, score)


@triton.jit(do_not_specialize=["symbols", "frames", "count"])
def backward_kernel(
    GRAD, SCORES, SHARES, DURATIONS, BOUNDARY, DX, DY, DZ, MASS, symbols, frames, count, BLOCK: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, rows, columns = load_boundary(BOUNDARY, b, symbols, frames)
    s = tl.arange(0, BLOCK)  # [BLOCK], s - s_begin
    row = symbols + 1
    first = b * frames + t_begin
    DX += first * symbols + s_begin
    DY += first * row + s_begin
    DZ += (first * row + s_begin) * count
    MASS += b * (frames + 1) * row
    SHARES += b * frames * 2 * count * row
    score = tl.load(SCORES + b)
    grad = 1.0
    if GRAD is not None:
        grad = tl.load(GRAD + b)
    reached = (score > float("-inf")) & (score < float("inf"))
    poison = tl.where(score != score, score, 0.0)
    inside, has_symbol = s <= rows, s < rows
    tl.store(MASS + columns * row + s, tl.where(s == rows, grad, 0.0), mask=inside & (columns >= 0))
    tl.debug_barrier()
    for k in range(0, columns):
        t64 = b * 0 + columns - 1 - k
        dx = tl.zeros([BLOCK], tl.float32)
        dy = tl.zeros([BLOCK], tl.float32)
        within = -1
        for i in range(0, count):
            d = tl.load(DURATIONS + i)
            within = tl.where(d == 0, i, within)
            end = t64 + d
            leads = (d > 0) & (end <= columns)
            blank = tl.load(SHARES + (t64 * 2 * count + i) * row + s, mask=inside & leads, other=0.0)
            blank *= tl.load(MASS + end * row + s, mask=inside & leads, other=0.0)
            stays = has_symbol & leads & (end < columns)
            symbol = tl.load(SHARES + (t64 * 2 * count + count + i) * row + s, mask=stays, other=0.0)
            symbol *= tl.load(MASS + end * row + s + 1, mask=stays, other=0.0)
            blank, symbol = tl.where(reached, blank, 0.0), tl.where(reached, symbol, 0.0)  # shares may be NaN
            dx += symbol
            dy += blank
            tl.store(DZ + (t64 * row + s) * count + i, blank + symbol + poison, mask=inside & (d != 0))
        g = dx + dy
        if within >= 0:
            share = tl.load(SHARES + (t64 * 2 * count + count + within) * row + s, mask=has_symbol, other=0.0)
            share = tl.where(reached, share, 0.0)
            _, g = tl.associative_scan((share, g), 0, compose_plain, reverse=True)
            tl.store(MASS + t64 * row + s, g, mask=inside)
            tl.debug_barrier()
            stays = share * tl.load(MASS + t64 * row + s + 1, mask=has_symbol, other=0.0)
            dx += stays
            tl.store(DZ + (t64 * row + s) * count + within, stays + poison, mask=inside)
        else:
            tl.store(MASS + t64 * row + s, g, mask=inside)
        tl.store(DX + t64 * symbols + s, dx + poison, mask=has_symbol)
        tl.store(DY + t64 * row + s, dy + poison, mask=inside)
        tl.debug_barrier()


def _lanes(symbols: int) -> tuple[int, int]:
    """Returns (lanes, warps): up to four lanes to a thread; with eight the forward spills."""
    lanes = next_power_of_2(symbols + 1)
    if lanes > MAX_LANES:
        raise Unlaunchable(f"tdt_lattice: expected at most {MAX_LANES - 1} symbols, got {symbols}")
    return lanes, max(1, min(16, lanes // 128))


def tdt_lattice_forward(
    symbol_logprobs: torch.Tensor, blank_logprobs: torch.Tensor, duration_logprobs: torch.Tensor,
    durations: torch.Tensor, boundary: torch.Tensor | None, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns (scores, shares) of contiguous (B, T, S), (B, T, S+1), (B, T, S+1, N); durations are int64 (N,), boundary
    is (B, 4) int64 or None. The shares are (B, T, 2 N, S+1), without elements unless ``keep``.
    """
    y = blank_logprobs
    batch, frames, row = y.shape
    count = durations.shape[0]
    scores = torch.empty(batch, dtype=torch.float32, device=y.device)
    shares = scores.new_zeros((batch, frames, 2 * count, row) if keep else 0)
    if not batch:
        return scores, shares
    lanes, warps = _lanes(row - 1)
    m, e = (scores.new_empty(batch, frames + 1, row) for _ in range(2))
    launch(forward_kernel, (batch,),
        symbol_logprobs, y, duration_logprobs, durations, boundary, scores, shares if keep else None, m, e,
        row - 1, frames, count, BLOCK=lanes, num_warps=warps,
    )  # fmt: skip
    return scores, shares


def tdt_lattice_backward(
    grad: torch.Tensor | None, scores: torch.Tensor, shares: torch.Tensor, durations: torch.Tensor,
    boundary: torch.Tensor | None, frames: int, symbols: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns the gradients of x, y and z for ``grad`` (B,) of the scores; None stands for 1."""
    batch, count, row = scores.shape[0], durations.shape[0], symbols + 1
    dx, dy = (scores.new_zeros(batch, frames, n) for n in (symbols, row))
    dz = scores.new_zeros(batch, frames, row, count)
    if not batch:
        return dx, dy, dz
    lanes, warps = _lanes(symbols)
    launch(backward_kernel, (batch,),
        grad, scores, shares, durations, boundary, dx, dy, dz, scores.new_empty(batch, frames + 1, row),
        symbols, frames, count, BLOCK=lanes, num_warps=warps,
    )  # fmt: skip
    return dx, dy, dz
