# SPDX-License-Identifier: Apache-2.0
"""The lattice of a transducer in a band of R cells per frame, scores and the gradients of its arcs: one program per
sequence, one step per frame.

    regular   p[r] = c[r] + p[r-1] x[r-1]   a[j] = p[j] y[j]                      c[r] of the next frame = a[r + d],
    modified  p[r] = c[r]                   a[j] = p[j-1] x[j-1] + p[j] y[j]      d = starts[t+1] - starts[t]

in probabilities, which are m 2^e, see _scaled_number.py. Lanes are the R + 1 cells a frame leads to. A frame is a scan;
a move of the window picks one lane out of all. The next frame's numbers are loaded a step ahead.

The forward stores each cell's share w of the symbol arc; the backward takes products and sums of shares. Bytes per
cell: forward 8, with shares 12, backward 12. The kernel reads boundaries and starts on the device and does not validate
them, but reads nothing outside the tensors.
"""

import torch
import triton
import triton.language as tl

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


@triton.jit
def _boundary(BOUNDARY, STARTS, b, frames, R):
    """Returns s_begin, t_begin, s_end, t_end; without a boundary, they reach to the top of the last
    window.
    """
    if BOUNDARY is None:
        zero = b * 0
        last = tl.load(STARTS + b * frames + frames - 1, mask=frames > 0, other=1 - R)
        return zero, zero, last + R - 1, zero + frames
    else:  # noqa: RET505 - Triton compiles one of the branches
        at = BOUNDARY + 4 * b
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _arcs(s, lane, t, s_begin, t_begin, s_end, t_end, R, MODIFIED: tl.constexpr):
    """Says which symbols and blanks of frame t lie inside the boundary; lane is a cell, s its symbols."""
    begun = (s >= s_begin) & (t >= t_begin)
    if MODIFIED:
        symbols = begun & (s < s_end) & (t < t_end) & (lane < R)
    else:
        symbols = begun & (s < s_end) & (t <= t_end) & (lane < R - 1)
    return symbols, begun & (s <= s_end) & (t < t_end) & (lane < R)


@triton.jit
def _chosen(values, take, none):
    """Returns values[j] for the j that row r of ``take`` [r, j] holds, and ``none`` where it holds none."""
    chosen = tl.sum(tl.where(take, values[None, :], 0.0), axis=1)
    return tl.where(tl.sum(take.to(tl.int32), axis=1) > 0, chosen, none)


@triton.jit(do_not_specialize=["frames", "R"])
def forward_kernel(
    X, Y, STARTS, BOUNDARY, SCORES, SHARES, frames, R, MODIFIED: tl.constexpr, BLOCK: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, s_end, t_end = _boundary(BOUNDARY, STARTS, b, frames, R)
    lane = tl.arange(0, BLOCK)
    other = tl.arange(0, BLOCK)
    x_first, y_first, starts = X + b * frames * R, Y + b * frames * R, STARTS + b * frames
    cm = tl.full([BLOCK], 1.0, tl.float32)
    ce = tl.full([BLOCK], FLOOR, tl.float32)
    unfit = tl.zeros([BLOCK], tl.int32)
    score = float("-inf")
    start = tl.load(starts, mask=frames > 0, other=0)
    next_x = tl.load(x_first + lane, mask=(lane < R) & (frames > 0), other=0.0)
    next_y = tl.load(y_first + lane, mask=(lane < R) & (frames > 0), other=0.0)
    for t in range(0, frames):
        x, y = next_x, next_y
        ahead = (lane < R) & (t + 1 < frames)
        next_x = tl.load(x_first + (t + 1) * R + lane, mask=ahead, other=0.0)
        next_y = tl.load(y_first + (t + 1) * R + lane, mask=ahead, other=0.0)
        next_start = tl.load(starts + t + 1, mask=t + 1 < frames, other=0)
        s = start + lane
        symbols, blanks = _arcs(s, lane, t, s_begin, t_begin, s_end, t_end, R, MODIFIED)
        x = tl.where(symbols, x, float("-inf"))
        y = tl.where(blanks, y, float("-inf"))
        unfit |= ((x != x) | (x == float("inf")) | (y != y) | (y == float("inf"))).to(tl.int32)
        xm, xe = split(x)
        ym, ye = split(y)
        begin = (s == s_begin) & (t == t_begin) & (lane < R)
        pm = tl.where(begin, 1.0, cm)
        pe = tl.where(begin, 0.0, ce)
        below = other[None, :] + 1 == lane[:, None]  # [r, j]: j is the cell before r
        ended = (s == s_end) & (t == t_end) & (lane < R)
        if MODIFIED:
            score = tl.maximum(score, tl.max(tl.where(ended, logarithm(pm, pe), float("-inf")), axis=0))
            up_m, up_e = normalised(pm * xm, pe + xe)
            up_m, up_e = _chosen(up_m, below, 1.0), _chosen(up_e, below, FLOOR)
            am, ae = add(up_m, up_e, pm * ym, pe + ye)
            am, ae = normalised(am, ae)
            w = ratio(up_m, up_e, am, ae)
        else:
            # factors of the entering symbols, by the cell they lead to
            fm, fe = _chosen(xm, below, 1.0), _chosen(xe, below, FLOOR)
            pm, pe = normalised(pm, pe)
            _, _, qm, qe = tl.associative_scan((fm, fe, pm, pe), 0, compose)
            before_m, before_e = _chosen(qm, below, 1.0), _chosen(qe, below, FLOOR)
            up_m, up_e = normalised(before_m * fm, before_e + fe)
            w = ratio(up_m, up_e, qm, qe)
            score = tl.maximum(score, tl.max(tl.where(ended, logarithm(qm, qe), float("-inf")), axis=0))
            am, ae = normalised(qm * ym, qe + ye)
        if SHARES is not None:
            tl.store(SHARES + (b * frames + t) * (R + 1) + lane, w, mask=lane <= R)
        leaves = (s == s_end) & (t + 1 == t_end) & (lane <= R)
        score = tl.maximum(score, tl.max(tl.where(leaves, logarithm(am, ae), float("-inf")), axis=0))
        move = next_start - start
        take = (other[None, :] == lane[:, None] + move) & (other[None, :] <= R)  # [r, j]: j moves to r
        cm, ce = _chosen(am, take, 1.0), _chosen(ae, take, FLOOR)
        ce = tl.where(lane < R, ce, FLOOR)
        start = next_start
    score = tl.where((s_begin == s_end) & (t_begin == t_end), 0.0, score)
    score = tl.where(tl.max(unfit, axis=0) > 0, float("nan"), score)
    tl.store(SCORES + b, score)


@triton.jit(do_not_specialize=["frames", "R"])
def backward_kernel(
    GRAD, SCORES, SHARES, STARTS, BOUNDARY, DX, DY, frames, R, MODIFIED: tl.constexpr, BLOCK: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, s_end, t_end = _boundary(BOUNDARY, STARTS, b, frames, R)
    lane = tl.arange(0, BLOCK)
    other = tl.arange(0, BLOCK)
    score = tl.load(SCORES + b)
    grad = 1.0
    if GRAD is not None:
        grad = tl.load(GRAD + b)
    reached = (score > float("-inf")) & (score < float("inf"))
    grad = tl.where(reached, grad, 0.0)
    poison = tl.where(score != score, score, 0.0)
    starts, shares = STARTS + b * frames, SHARES + b * frames * (R + 1)
    dx, dy = DX + b * frames * R, DY + b * frames * R
    g = tl.zeros([BLOCK], tl.float32)  # mass of the cells of frame t + 1
    after = b * 0  # starts[t + 1]
    last = frames - 1
    next_w = tl.load(shares + last * (R + 1) + lane, mask=(lane <= R) & (frames > 0), other=0.0)
    next_start = tl.load(starts + last, mask=frames > 0, other=0)
    for i in range(0, frames):
        t = last - i
        w, start = tl.where(reached, next_w, 0.0), next_start
        next_w = tl.load(shares + (t - 1) * (R + 1) + lane, mask=(lane <= R) & (t > 0), other=0.0)
        next_start = tl.load(starts + t - 1, mask=t > 0, other=0)
        s = start + lane
        symbols, blanks = _arcs(s, lane, t, s_begin, t_begin, s_end, t_end, R, MODIFIED)
        # the cells that frame t leads to have the mass of the next frame's window, or of the end
        move = after - start
        take = (other[None, :] + move == lane[:, None]) & (other[None, :] < R)
        into = tl.where(lane <= R, _chosen(g, take, 0.0), 0.0)
        into = tl.where(i > 0, into, 0.0)
        inside_next = (i > 0) & (s_end >= after) & (s_end < after + R)
        leaves = (s == s_end) & (t + 1 == t_end) & (lane <= R)
        into += tl.where(leaves, tl.where(inside_next, 0.0, grad), 0.0)
        ended = tl.where((s == s_end) & (t == t_end) & (lane < R), grad, 0.0)
        above = other[None, :] == lane[:, None] + 1  # [r, j]: j is the cell after r
        if MODIFIED:
            symbol = into * w
            blank = into - symbol
            symbol = _chosen(symbol, above, 0.0)  # by the cell it leaves
            g = symbol + tl.where(lane < R, blank, 0.0) + ended
        else:
            blank = into
            # a scan from the top: a cell's mass is its own plus what the symbol of the next cell brings
            own = tl.where(lane < R, into, 0.0) + ended
            from_above = _chosen(w, above, 0.0)
            _, all_of_it = tl.associative_scan((from_above, own), 0, compose_plain, reverse=True)
            symbol = all_of_it * w  # by the cell it enters
            g = all_of_it - symbol
            symbol = _chosen(symbol, above, 0.0)
        g = tl.where(reached, g, 0.0)
        row = t * R + lane
        tl.store(dx + row, tl.where(symbols, tl.where(reached, symbol, 0.0) + poison, 0.0), mask=lane < R)
        tl.store(dy + row, tl.where(blanks, tl.where(reached, blank, 0.0) + poison, 0.0), mask=lane < R)
        after = start


def _lanes(window: int) -> tuple[int, int]:
    """Returns (lanes, warps)."""
    lanes = next_power_of_2(window + 1)
    return lanes, max(1, min(8, lanes * lanes // 1024))


def rnnt_pruned_lattice_forward(
    symbol_logprobs: torch.Tensor,
    blank_logprobs: torch.Tensor,
    starts: torch.Tensor,
    boundary: torch.Tensor | None,
    modified: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (scores, shares) of contiguous float32 (B, T, R); starts (B, T) and boundary (B, 4) or None are int64.
    The shares are (B, T, R + 1), without elements unless ``keep``.
    """
    x = symbol_logprobs
    batch, frames, window = x.shape
    scores = x.new_empty(batch)
    shares = x.new_empty((batch, frames, window + 1) if keep else 0)
    if batch:
        lanes, warps = _lanes(window)
        launch(forward_kernel, (batch,),
            x, blank_logprobs, starts, boundary, scores, shares if keep else None, frames, window,
            MODIFIED=modified, BLOCK=lanes, num_warps=warps,
        )  # fmt: skip
    return scores, shares


def rnnt_pruned_lattice_backward(
    grad: torch.Tensor | None,
    scores: torch.Tensor,
    shares: torch.Tensor,
    starts: torch.Tensor,
    boundary: torch.Tensor | None,
    window: int,
    modified: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of x and y for ``grad`` (B,) of the scores; None stands for 1."""
    batch, frames = starts.shape
    dx, dy = (scores.new_empty(batch, frames, window) for _ in "xy")
    if batch and frames:
        lanes, warps = _lanes(window)
        launch(backward_kernel, (batch,),
            grad, scores, shares, starts, boundary, dx, dy, frames, window,
            MODIFIED=modified, BLOCK=lanes, num_warps=warps,
        )  # fmt: skip
    return dx, dy
