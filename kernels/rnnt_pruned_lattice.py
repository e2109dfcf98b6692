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

from fastasr.kernels._lattice import largest, unfit
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
def _from(cell, start, BLOCK: tl.constexpr):
    """Returns the place of a cell in a window, in 32 bits: no lane has those beyond BLOCK."""
    return tl.minimum(tl.maximum(cell - start, -BLOCK), BLOCK).to(tl.int32)


@triton.jit
def _arcs(r, t, begin, t_begin, end, t_end, R, MODIFIED: tl.constexpr):
    """Says to which cells r symbols of frame t lead inside the boundary, and which cells blanks leave. The boundary has
    the places ``begin`` and ``end`` in the window.
    """
    begun = (t >= t_begin) & (r >= 0)
    if MODIFIED:
        symbols = begun & (t < t_end) & (r > 0) & (r > begin) & (r <= end) & (r <= R)
    else:
        symbols = begun & (t <= t_end) & (r > 0) & (r > begin) & (r <= end) & (r < R)
    return symbols, begun & (t < t_end) & (r >= begin) & (r <= end) & (r < R)


@triton.jit
def _chosen(values, at, there, none):
    """Returns the values of the lanes ``at``, and ``none`` where not ``there``."""
    return tl.where(there, tl.gather(values, tl.where(there, at, 0), 0), none)


@triton.jit(do_not_specialize=["frames", "R"])
def forward_kernel(
    X, Y, STARTS, BOUNDARY, SCORES, SHARES, frames, R, MODIFIED: tl.constexpr, BLOCK: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, s_end, t_end = _boundary(BOUNDARY, STARTS, b, frames, R)
    lane = tl.arange(0, BLOCK)
    x_next, y_next, starts = X + b * frames * R, Y + b * frames * R, STARTS + b * frames
    cm = tl.full([BLOCK], 1.0, tl.float32)
    ce = tl.full([BLOCK], FLOOR, tl.float32)
    worst = tl.full([BLOCK], float("-inf"), tl.float32)
    score_m, score_e = cm, ce  # of the lane that the end has
    start = tl.load(starts, mask=frames > 0, other=0)
    entering, leaving = (lane > 0) & (lane <= R), lane < R
    next_x = tl.load(x_next + (lane - 1), mask=entering & (frames > 0), other=0.0)  # by the cell it leads to
    next_y = tl.load(y_next + lane, mask=leaving & (frames > 0), other=0.0)
    for t in range(0, frames):
        x, y = next_x, next_y
        x_next += R
        y_next += R
        ahead = t + 1 < frames
        next_x = tl.load(x_next + (lane - 1), mask=entering & ahead, other=0.0)
        next_y = tl.load(y_next + lane, mask=leaving & ahead, other=0.0)
        next_start = tl.load(starts + t + 1, mask=ahead, other=0)
        begin, end = _from(s_begin, start, BLOCK), _from(s_end, start, BLOCK)
        symbols, blanks = _arcs(lane, t, begin, t_begin, end, t_end, R, MODIFIED)
        x = tl.where(symbols, x, float("-inf"))
        y = tl.where(blanks, y, float("-inf"))
        worst = largest(largest(x, y), worst)
        xm, xe = split(x)
        ym, ye = split(y)
        begins = (lane == begin) & (t == t_begin) & (lane < R)
        pm = tl.where(begins, 1.0, cm)
        pe = tl.where(begins, 0.0, ce)
        ended = (lane == end) & (t == t_end) & (lane < R)
        if MODIFIED:
            score_m, score_e = tl.where(ended, pm, score_m), tl.where(ended, pe, score_e)
            up_m = _chosen(pm, lane - 1, lane > 0, 1.0) * xm
            up_e = _chosen(pe, lane - 1, lane > 0, FLOOR) + xe
            am, ae = add(up_m, up_e, pm * ym, pe + ye)
            am, ae = normalised(am, ae)
            w = ratio(up_m, up_e, am, ae)
        else:
            _, _, qm, qe = tl.associative_scan((xm, xe, pm, pe), 0, compose)
            am, ae = normalised(qm * ym, qe + ye)
            qm, qe = normalised(qm, qe)
            up_m = _chosen(qm, lane - 1, lane > 0, 1.0) * xm
            up_e = _chosen(qe, lane - 1, lane > 0, FLOOR) + xe
            w = ratio(up_m, up_e, qm, qe)
            score_m, score_e = tl.where(ended, qm, score_m), tl.where(ended, qe, score_e)
        if SHARES is not None:
            tl.store(SHARES + (b * frames + t) * (R + 1) + lane, w, mask=lane <= R)
        # Frame t_end adds symbols to what leads to the end, if there is one.
        leaves = (lane == end) & (t + 1 == t_end) & (lane <= R)
        score_m, score_e = tl.where(leaves, am, score_m), tl.where(leaves, ae, score_e)
        at = lane + _from(next_start, start, BLOCK)
        there = (at >= 0) & (at <= R) & (lane < R)
        cm, ce = _chosen(am, at, there, 1.0), _chosen(ae, at, there, FLOOR)
        start = next_start
    score = tl.max(logarithm(score_m, score_e), axis=0)
    score = tl.where((s_begin == s_end) & (t_begin == t_end), 0.0, score)
    score = tl.where(unfit(worst), float("nan"), score)
    tl.store(SCORES + b, score)


@triton.jit
def _shares(row, r, R, there):
    """Returns the shares of cells r of a frame and of the cells after them."""
    w = tl.load(row + r, mask=there & (r >= 0), other=0.0)
    return w, tl.load(row + r + 1, mask=there & (r >= 0) & (r < R), other=0.0)


@triton.jit(do_not_specialize=["frames", "R"])
def backward_kernel(
    GRAD, SCORES, SHARES, STARTS, BOUNDARY, DX, DY, frames, R, MODIFIED: tl.constexpr, BLOCK: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, s_end, t_end = _boundary(BOUNDARY, STARTS, b, frames, R)
    # Lanes go from the top down, as a scan from there takes four times as many shuffles.
    lane = tl.arange(0, BLOCK)
    r = R - lane
    score = tl.load(SCORES + b)
    grad = 1.0
    if GRAD is not None:
        grad = tl.load(GRAD + b)
    reached = (score > float("-inf")) & (score < float("inf"))  # otherwise shares may be NaN
    grad = tl.where(reached, grad, 0.0)
    poison = tl.where(score != score, score, 0.0)
    starts = STARTS + b * frames
    shares = SHARES + (b * frames + frames - 1) * (R + 1)
    dx, dy = DX + (b * frames + frames - 1) * R, DY + (b * frames + frames - 1) * R
    g = tl.zeros([BLOCK], tl.float32)  # mass of the cells of frame t + 1
    after = b * 0  # starts[t + 1]
    last = frames - 1
    next_w, next_above = _shares(shares, r, R, reached & (frames > 0))
    next_start = tl.load(starts + last, mask=frames > 0, other=0)
    for i in range(0, frames):
        t = last - i
        w, above, start = next_w, next_above, next_start
        shares -= R + 1
        next_w, next_above = _shares(shares, r, R, reached & (t > 0))
        next_start = tl.load(starts + t - 1, mask=t > 0, other=0)
        begin, end = _from(s_begin, start, BLOCK), _from(s_end, start, BLOCK)
        symbols, blanks = _arcs(r, t, begin, t_begin, end, t_end, R, MODIFIED)
        # the cells that frame t leads to have the mass of the next frame's window, or of the end
        at = lane + _from(after, start, BLOCK)
        there = (at > 0) & (at <= R) & (r >= 0) & (i > 0)
        into = _chosen(g, at, there, 0.0)
        inside_next = (i > 0) & (s_end >= after) & (s_end < after + R)
        leaves = (r == end) & (t + 1 == t_end) & (r >= 0)
        into += tl.where(leaves & (inside_next == 0), grad, 0.0)
        ended = tl.where((r == end) & (t == t_end) & (r >= 0) & (r < R), grad, 0.0)
        if MODIFIED:
            symbol = into * w  # by the cell it enters
            blank = into - symbol
            g = _chosen(symbol, lane - 1, lane > 0, 0.0) + tl.where(r < R, blank, 0.0) + ended
        else:
            blank = into
            # a scan from the top: a cell's mass is its own plus what the symbol of the next cell brings
            own = tl.where(r < R, into, 0.0) + ended
            _, all_of_it = tl.associative_scan((above, own), 0, compose_plain)
            symbol = all_of_it * w  # by the cell it enters
            g = all_of_it - symbol
        tl.store(dx + (r - 1), tl.where(symbols, symbol + poison, 0.0), mask=r > 0)
        tl.store(dy + r, tl.where(blanks, blank + poison, 0.0), mask=(r >= 0) & (r < R))
        dx -= R
        dy -= R
        after = start


def tile(window: int) -> dict[str, int]:
    """Returns the lanes and the warps."""
    lanes = next_power_of_2(window + 1)
    return {"BLOCK": lanes, "num_warps": max(1, min(8, lanes // 128))}


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
        launch(forward_kernel, (batch,),
            x, blank_logprobs, starts, boundary, scores, shares if keep else None, frames, window,
            MODIFIED=modified, **tile(window),
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
        launch(backward_kernel, (batch,),
            grad, scores, shares, starts, boundary, dx, dy, frames, window,
            MODIFIED=modified, **tile(window),
        )  # fmt: skip
    return dx, dy
