# SPDX-License-Identifier: Apache-2.0
"""The lattice of tokens and durations, scores and the gradients of its arcs: one program per sequence.

    p[t,s] = log(sum_{d>0} e^(p + y + z_d at (t-d, s)) + sum_d e^(p + x + z_d at (t-d, s-1))),  t < t_end
    score = log sum_{d>0} e^(p + y + z_d at (t_end - d, s_end))

Frames follow each other; lanes are s. A frame sums what left earlier frames, cell by cell and each with the score of
its duration; the sum of the symbols moves up by a lane. The arcs of duration 0, which lead from s to s + 1 within the
frame, are a scan. Cells are m 2^e (see _scaled_number.py); a cell keeps p times blank and p times symbol, four numbers.
What a frame takes from memory is loaded a frame ahead: what left the last frame is in registers.

The share that each arc has in the cell where it leads needs no order, and is a launch of its own over all frames. In
the backward the mass g of a frame is the sum of w g' over the arcs that leave it, with a scan from the right for the
arcs of duration 0.

Bytes per cell with N durations: forward 4 (N + 2) + 16, with shares 8 N + 32 more, backward 4 (3 N + 2) + 4. The kernel
reads boundaries and durations on the device and moves boundaries inside the lattice; durations below 0 lead nowhere.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels import Unlaunchable
from fastasr.kernels._lattice import largest, load_boundary, unfit
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

MAX_LANES = 2048
SHARES = {"BLOCK": 128, "num_warps": 4}
NONE = tl.constexpr(float("-inf"))


@triton.jit
def _all_durations(DURATIONS, COUNT: tl.constexpr):
    """Returns the durations, and the place of 0 among them or -1."""
    durations = ()
    within = -1
    for i in tl.static_range(COUNT):
        d = tl.load(DURATIONS + i)
        durations += (d,)
        within = tl.where(d == 0, i, within)
    return durations, within


@triton.jit
def _next(values, at, there, none):
    """Returns the values of lanes ``at``, and ``none`` where not ``there``."""
    return tl.where(there, tl.gather(values, tl.where(there, at, 0), 0), none)


@triton.jit
def _next_scaled(m, e, at, there):
    """Does the same for m 2^e, which cross the threads as one number."""
    high = m.to(tl.int32, bitcast=True).to(tl.int64) << 32
    low = e.to(tl.uint32, bitcast=True).to(tl.int64)
    both = tl.gather(high | low, tl.where(there, at, 0), 0)
    m = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    e = both.to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(there, m, 1.0), tl.where(there, e, FLOOR)


@triton.jit
def _four(at):
    """Returns pointers to four neighbours each."""
    return at[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _quarters(x):
    """Returns the columns of a tile of four."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))  # [BLOCK, 2] each
    a, c = tl.split(first)
    b, d = tl.split(second)
    return a, b, c, d


@triton.jit
def _arrivals(Z, CELLS, t, s, row, inside, durations, COUNT: tl.constexpr):
    """Returns what a sum over the arcs to frame t takes: scores of the durations, and what left the earlier frames but
    the last one.
    """
    zs, cells = (), ()
    for i in tl.static_range(COUNT):
        d = durations[i]
        start = t - d
        there = inside & (d > 0) & (start >= 0)
        zs += (tl.load(Z + start * row * COUNT + (s * COUNT + i), mask=there, other=NONE).to(tl.float32),)
        there = tl.broadcast_to((there & (d > 1))[:, None], [s.shape[0], 4])
        cells += (tl.load(_four(CELLS + start * row * 4 + s * 4), mask=there, other=0.0),)
    return zs, cells


@triton.jit
def _sums(zs, cells, own_ym, own_ye, own_xm, own_xe, durations, COUNT: tl.constexpr):
    """Returns the sums over the arcs to a frame, of blanks and of symbols, by the cells that they leave."""
    bm, be, cm, ce = 1.0, FLOOR, 1.0, FLOOR
    for i in tl.static_range(COUNT):
        zm, ze = split(zs[i])
        ym, ye, xm, xe = _quarters(cells[i])
        near = durations[i] == 1  # from the last frame
        fm, fe = zm * tl.where(near, own_ym, ym), ze + tl.where(near, own_ye, ye)
        gm, ge = zm * tl.where(near, own_xm, xm), ze + tl.where(near, own_xe, xe)
        if i == 0:
            bm, be, cm, ce = fm, fe, gm, ge
        else:
            bm, be = add(bm, be, fm, fe)
            cm, ce = add(cm, ce, gm, ge)
    return bm, be, cm, ce


@triton.jit(do_not_specialize=["symbols", "frames"])
def forward_kernel(
    X, Y, Z, DURATIONS, BOUNDARY, SCORES, CELLS, SUMS, symbols, frames,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    # CELLS: (m, e) of what leaves a cell by a blank, then by a symbol. SUMS: (m, e) of the cell, or None.
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, rows, columns = load_boundary(BOUNDARY, b, symbols, frames)
    s = tl.arange(0, BLOCK)  # [BLOCK], s - s_begin
    row = symbols + 1
    first = b * frames + t_begin
    X += first * symbols + s_begin
    Y += first * row + s_begin
    Z += (first * row + s_begin) * COUNT
    CELLS += b * frames * row * 4
    if SUMS is not None:
        SUMS += b * (frames + 1) * row * 2
    inside = s <= rows
    durations, within = _all_durations(DURATIONS, COUNT)
    worst = tl.full([BLOCK], NONE, tl.float32)
    own_ym = tl.full([BLOCK], 1.0, tl.float32)
    own_ye = tl.full([BLOCK], FLOOR, tl.float32)
    own_xm, own_xe = own_ym, own_ye
    begin = tl.where(s == 0, 0.0, own_ye)  # e of the very first cell
    # Loaded a frame ahead, what needs no result of the last frame. Where threads have few registers, less is.
    zs, cells = _arrivals(Z, CELLS, b * 0, s, row, inside, durations, COUNT)
    x, y, fx, fz = _scores(X, Y, Z, inside & (columns > 0), rows, s, within, COUNT)
    for t in range(0, columns):
        t64 = b * 0 + t
        if not AHEAD:
            zs, cells = _arrivals(Z, CELLS, t64, s, row, inside, durations, COUNT)
        bm, be, cm, ce = _sums(zs, cells, own_ym, own_ye, own_xm, own_xe, durations, COUNT)
        if AHEAD:
            zs, cells = _arrivals(Z, CELLS, t64 + 1, s, row, inside, durations, COUNT)
        own_x, own_y, along = x, y, fx + fz
        here = Z + t64 * row * COUNT
        ahead = inside & (t + 1 < columns)
        X += symbols
        Y += row
        x, y, fx, fz = _scores(X, Y, here + row * COUNT, ahead, rows, s, within, COUNT)
        cm, ce = _next_scaled(cm, ce, s - 1, s > 0)
        m, e = add(bm, be, cm, ce)
        e = tl.where(t > 0, e, begin)
        m = tl.where(t > 0, m, 1.0)
        if within >= 0:  # along the frame
            am, ae = split(along)
            _, _, m, e = tl.associative_scan((am, ae, m, e), 0, compose)
        m, e = normalised(m, e)
        am, ae = split(own_y)
        own_ym, own_ye = am * m, ae + e
        am, ae = split(own_x)
        own_xm, own_xe = am * m, ae + e
        left = tl.join(tl.join(own_ym, own_xm), tl.join(own_ye, own_xe))  # as _quarters takes them
        there = tl.broadcast_to(inside[:, None], [BLOCK, 4])
        tl.store(_four(CELLS + t64 * row * 4 + s * 4), tl.reshape(left, [BLOCK, 4]), mask=there)
        if SUMS is not None:
            _store_sums(SUMS + t64 * row * 2, s, m, e, inside)
        worst = largest(largest(own_x, own_y), worst)
        for i in tl.static_range(COUNT):  # every number inside the boundary
            z = tl.load(here + s * COUNT + i, mask=inside, other=0.0).to(tl.float32)
            worst = largest(z, worst)
        tl.debug_barrier()
    # the end, where blanks lead
    if not AHEAD:
        zs, cells = _arrivals(Z, CELLS, b * 0 + columns, s, row, inside, durations, COUNT)
    m, e, _, _ = _sums(zs, cells, own_ym, own_ye, own_xm, own_xe, durations, COUNT)
    e = tl.where(columns > 0, e, begin)
    m = tl.where(columns > 0, m, 1.0)
    m, e = normalised(m, e)
    if SUMS is not None:
        _store_sums(SUMS + columns.to(tl.int64) * row * 2, s, m, e, inside & (columns >= 0))
    score = tl.max(tl.where(s == rows, logarithm(m, e), NONE), axis=0)
    score = tl.where((rows >= 0) & (columns >= 0), score, NONE)
    score = tl.where(unfit(worst), float("nan"), score)
    tl.store(SCORES + b, score)


@triton.jit
def _store_sums(SUMS, s, m, e, inside):
    at = SUMS + s[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(at, tl.join(m, e), mask=tl.broadcast_to(inside[:, None], at.shape))


@triton.jit
def _scores(X, Y, Z, there, rows, s, within, COUNT: tl.constexpr):
    """Returns the scores of symbols and blanks that leave cells of a frame, and the two parts of the scores of arcs
    along the frame, by the cells where these lead.
    """
    x = tl.load(X + s, mask=there & (s < rows), other=NONE).to(tl.float32)
    y = tl.load(Y + s, mask=there, other=NONE).to(tl.float32)
    before = there & (s > 0) & (within >= 0)
    fx = tl.load(X + (s - 1), mask=before, other=NONE).to(tl.float32)
    return x, y, fx, tl.load(Z + ((s - 1) * COUNT + within), mask=before, other=NONE).to(tl.float32)


@triton.jit(do_not_specialize=["symbols", "frames"])
def shares_kernel(
    X, Z, DURATIONS, BOUNDARY, CELLS, SUMS, SHARES, symbols, frames, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes the shares of the arcs that leave a frame, rounded as the sums are: a lone arc has exactly 1."""
    b = tl.program_id(1).to(tl.int64)
    t = b * 0 + tl.program_id(0)
    s_begin, t_begin, rows, columns = load_boundary(BOUNDARY, b, symbols, frames)
    row = symbols + 1
    SHARES += (b * frames + t) * 2 * COUNT * row
    X += (b * frames + t_begin + t) * symbols + s_begin
    Z += ((b * frames + t_begin + t) * row + s_begin) * COUNT
    CELLS += (b * frames + t) * row * 4
    SUMS += (b * (frames + 1) + t) * row * 2
    for first in range(0, row, BLOCK):
        s = first + tl.arange(0, BLOCK)  # [BLOCK], s - s_begin
        inside = (s <= rows) & (t < columns)
        there = tl.broadcast_to(inside[:, None], [BLOCK, 4])
        ym, ye, xm, xe = _quarters(tl.load(_four(CELLS + s * 4), mask=there, other=0.0))
        for i in tl.static_range(COUNT):
            d = tl.load(DURATIONS + i)
            z = tl.load(Z + (s * COUNT + i), mask=inside, other=NONE).to(tl.float32)
            zm, ze = split(z)
            to = SUMS + d * row * 2
            blank = inside & (d > 0) & (t + d <= columns)
            m, e = _load_sums(to, s, blank)
            w = tl.where(blank, ratio(ym * zm, ye + ze, m, e), 0.0)
            tl.store(SHARES + (i * row + s), w, mask=s < row)
            symbol = (s < rows) & (d >= 0) & (t + d < columns)
            m, e = _load_sums(to + 2, s, symbol)
            am, ae = xm * zm, xe + ze
            if d == 0:
                x = tl.load(X + s, mask=symbol, other=NONE).to(tl.float32)
                am, ae = split(x + z)
                fm, fe = _load_sums(SUMS, s, symbol)
                am, ae = am * fm, ae + fe
            w = tl.where(symbol, ratio(am, ae, m, e), 0.0)
            tl.store(SHARES + ((COUNT + i) * row + s), w, mask=s < row)


@triton.jit
def _load_sums(SUMS, s, there):
    at = SUMS + s[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(at, mask=tl.broadcast_to(there[:, None], at.shape), other=1.0))


@triton.jit
def _departure(SHARES, MASS, t, at, row, inside, above, columns, d, i, COUNT: tl.constexpr):
    """Returns the shares of the arcs of a duration that leave frame t, of blanks and of symbols, and the mass where
    they lead, unless that is the next frame.
    """
    share = SHARES + (t * 2 * COUNT + i) * row + at
    leads = inside & (d > 1) & (t + d <= columns)
    mass = MASS + (t + d) * row + at
    return (
        tl.load(share, mask=inside, other=0.0),
        tl.load(share + COUNT * row, mask=inside, other=0.0),
        tl.load(mass, mask=leads, other=0.0),
        tl.load(mass + 1, mask=leads & above, other=0.0),
    )


@triton.jit
def _departures(SHARES, MASS, t, at, row, inside, above, columns, durations, COUNT: tl.constexpr):
    """Returns what ``_departure`` does, of all durations."""
    all_of_it = ()
    for i in tl.static_range(COUNT):
        all_of_it += (_departure(SHARES, MASS, t, at, row, inside, above, columns, durations[i], i, COUNT),)
    return all_of_it


@triton.jit(do_not_specialize=["symbols", "frames"])
def backward_kernel(
    GRAD, SCORES, SHARES, DURATIONS, BOUNDARY, DX, DY, DZ, MASS, symbols, frames,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    s_begin, t_begin, rows, columns = load_boundary(BOUNDARY, b, symbols, frames)
    # Lanes go from the last symbol to the first, as a scan from there takes four times as many shuffles.
    lane = tl.arange(0, BLOCK)
    at = (BLOCK - 1) - lane  # behind scalar pointers
    low = symbols - (BLOCK - 1)
    s = low + at  # [BLOCK], s - s_begin
    row = symbols + 1
    first = b * frames + t_begin
    DX += first * symbols + s_begin + low
    DY += first * row + s_begin + low
    DZ += (first * row + s_begin + low) * COUNT
    MASS += b * (frames + 1) * row + low
    SHARES += b * frames * 2 * COUNT * row + low
    score = tl.load(SCORES + b)
    grad = 1.0
    if GRAD is not None:
        grad = tl.load(GRAD + b)
    reached = (score > float("-inf")) & (score < float("inf"))  # otherwise shares may be NaN
    poison = tl.where(score != score, score, 0.0)
    inside, has_symbol = (s >= 0) & (s <= rows), (s >= 0) & (s < rows)
    durations, within = _all_durations(DURATIONS, COUNT)
    g = tl.where((s == rows) & reached, grad, 0.0)
    h = tl.zeros([BLOCK], tl.float32)  # No symbol leads to the end.
    tl.store(MASS + columns * row + at, g, mask=inside & (columns >= 0))
    t64 = b * 0 + columns - 1
    counted = inside & reached
    tl.debug_barrier()
    if AHEAD:
        more = counted & (columns > 0)
        left = _departures(SHARES, MASS, t64, at, row, more, has_symbol, columns, durations, COUNT)
    for k in range(0, columns):
        t64 = b * 0 + columns - 1 - k
        dx = tl.zeros([BLOCK], tl.float32)
        dy = tl.zeros([BLOCK], tl.float32)
        along = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(COUNT):
            d = durations[i]
            if AHEAD:
                w, v, mass, mass_above = left[i]
            else:
                w, v, mass, mass_above = _departure(
                    SHARES, MASS, t64, at, row, counted, has_symbol, columns, d, i, COUNT
                )
            blank = w * tl.where(d == 1, g, mass)
            symbol = v * tl.where(d == 1, h, mass_above)
            along = tl.where(d == 0, v, along)
            dx += symbol
            dy += blank
            tl.store(
                DZ + t64 * row * COUNT + (at * COUNT + i), blank + symbol + poison, mask=inside & (d != 0)
            )
        if AHEAD:
            more = counted & (k + 1 < columns)
            left = _departures(SHARES, MASS, t64 - 1, at, row, more, has_symbol, columns, durations, COUNT)
        g = dx + dy
        if within >= 0:
            _, g = tl.associative_scan((along, g), 0, compose_plain)
        tl.store(MASS + t64 * row + at, g, mask=inside)
        h = _next(g, lane - 1, lane > 0, 0.0)
        if within >= 0:
            stays = along * h
            dx += stays
            tl.store(DZ + t64 * row * COUNT + within + at * COUNT, stays + poison, mask=inside)
        tl.store(DX + t64 * symbols + at, dx + poison, mask=has_symbol)
        tl.store(DY + t64 * row + at, dy + poison, mask=inside)
        tl.debug_barrier()


def tile(symbols: int) -> dict[str, int | bool]:
    """Returns the lanes and the warps: a lane to a thread, so that all units of a multiprocessor work."""
    lanes = next_power_of_2(symbols + 1)
    if lanes > MAX_LANES:
        raise Unlaunchable(f"tdt_lattice: expected at most {MAX_LANES - 1} symbols, got {symbols}")
    warps = max(1, min(16, lanes // 32)) if lanes <= 512 else lanes // 128
    return {"BLOCK": lanes, "AHEAD": lanes <= 256, "num_warps": warps, "maxnreg": min(255, 2048 // warps)}


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
    shares = scores.new_empty((batch, frames, 2 * count, row) if keep else 0)
    if not batch:
        return scores, shares
    cells = scores.new_empty(batch, frames, row, 4)
    sums = scores.new_empty(batch, frames + 1, row, 2) if keep else None
    logprobs = symbol_logprobs, y, duration_logprobs
    launch(forward_kernel, (batch,),
        *logprobs, durations, boundary, scores, cells, sums, row - 1, frames, COUNT=count, **tile(row - 1),
    )  # fmt: skip
    if shares.numel():
        launch(shares_kernel, (frames, batch),
            symbol_logprobs, duration_logprobs, durations, boundary, cells, sums, shares, row - 1, frames,
            COUNT=count, **SHARES,
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
    launch(backward_kernel, (batch,),
        grad, scores, shares, durations, boundary, dx, dy, dz, scores.new_empty(batch, frames + 1, row),
        symbols, frames, COUNT=count, **tile(symbols),
    )  # fmt: skip
    return dx, dy, dz
