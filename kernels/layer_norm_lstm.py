# SPDX-License-Identifier: Apache-2.0
"""LSTM with LayerNorm on the gates and on the cell, after the input's product; each pass is one launch over the
sequence.

    i, f, v, o = the quarters of LN(p_t + h W^T)      c = LN(sigmoid(f) c + sigmoid(i) tanh(v))
    h = sigmoid(o) tanh(c)      LN(z) = n weight + bias, n = (z - mean z) s, s = 1 / sqrt(var z + eps)
    Backward through LN: (d weight - mean(d weight) - n mean(d weight n)) s      dh before = dgates W

A step is two phases. In the products' phase a program owns 16 of the 4H rows of W (backward: 16 columns of one of its
quarters) and reads them in every step: 16 KB in bf16, 32 KB in float32 at H = 512, at most 0.3 us by a multiprocessor's
64 bytes per clock. In the rows' phase it owns sequences and has whole rows of gates and cell in registers, so that both
norms need no exchange. Between phases all programs wait for each other. The launch is cooperative, with at most one
program per multiprocessor, so that all of them run; they exchange data through the second-level cache. A single step is
launched phase by phase, and so is every step in the interpreter, which runs one program at a time.

Streaming W through one program per block of sequences would need no waiting, but 2 MB (bf16) to 4 MB through one
multiprocessor take 20 to 40 us per step. Here a step is two waits and two short phases, about 5 us by count of
latencies.

The forward keeps n of gates and cell, (T, B, 5H), and the two s, (T, B, 2), in float32 for the backward. The gradients
before the norms' weights are written beside dgates, and sums over steps and sequences follow in parts that depend on
the shape alone, added in float64: results repeat bit for bit; the only atomic is the counter of arrivals.
Launches: forward 1 (2 for one step), and a copy of the state, in 16 bits two; backward 1 and 4 for the norms.
"""

import logging
import os
import re
from functools import reduce

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import TANH, activate_with_slope, sigmoid_pair
from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._launch import cdiv, dot_options, launch, next_power_of_2, processors
from fastasr.kernels._layer_norm import centre, inverse_root, means_with, row_mean, row_means, through
from fastasr.kernels._parts import add_pair

_log = logging.getLogger("fastasr")

MAX_UNITS = 8192
BLOCK_B, BLOCK_N, NUM_WARPS = 16, 16, 4  # a tile of the products
MAX_K, MAX_K_PRECISE = 128, 32  # float32 operands of a product lie in registers: more would spill
MAX_ROWS, ROW_TILE = 4, 512  # sequences of a tile of rows, and numbers of each of its quarters
BLOCK_P, PART_ROWS, MAX_PARTS = 64, 16, 64  # columns and rows of a tile of the norms' sums
NORM_SUMS = {"BLOCK_P": 128, "BLOCK_C": 16, "num_warps": 4}


@triton.jit
def _wait(ARRIVED, count):
    """Waits until all threads of the program, and if ARRIVED counts programs ``count`` of them, have come here; all
    that they stored before is then visible.
    """
    tl.debug_barrier()
    if ARRIVED is not None:
        tl.atomic_add(ARRIVED, 1, sem="release")
        while tl.atomic_add(ARRIVED, 0, sem="acquire") < count:
            pass
        tl.debug_barrier()


@triton.jit
def _fresh(POINTER, at, keep):
    """Loads what another program may have written in this launch, bypassing the first-level cache."""
    return tl.load(POINTER + at, mask=keep, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def _load(POINTER, at, keep):
    return tl.load(POINTER + at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _product(
    X, x_row, W, w_row, w_column, OUT, out_row, n, columns, units, batch,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes OUT[b, n] = sum over k < units of X[b, k] W[n, k] for all sequences and those of n that are below
    ``columns``.
    """
    for first in range(0, batch, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        total = tl.zeros([BLOCK_B, n.shape[0]], tl.float32)
        for start in range(0, units, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            keep = (b < batch)[:, None] & (k < units)[None, :]
            x = X + (b[:, None] * x_row + k[None, :])  # [BLOCK_B, BLOCK_K]
            x = tl.load(x, mask=keep, other=0.0, cache_modifier=".cg").to(W.dtype.element_ty)
            at = k[:, None] * w_column + n[None, :] * w_row
            keep = (k < units)[:, None] & (n < columns)[None, :]
            w = tl.load(W + at, mask=keep, other=0.0)  # [BLOCK_K, BLOCK_N]
            if x.dtype == tl.float32:
                # Each product is separate: one chain of additions through all of k would round more than torch does.
                # A plain addition would be folded into the product.
                total = tl.fma(tl.dot(x, w), 1.0, total)
            else:
                total = tl.dot(x, w, total)
        keep = (b < batch)[:, None] & (n < columns)[None, :]
        tl.store(OUT + b[:, None] * out_row + n[None, :], total, mask=keep)


@triton.jit
def _affine(WEIGHT, BIAS, q, u, units):
    """Returns the weight and bias of a quarter of the gates, or of the cell."""
    w = _load(WEIGHT, q * units + u, u < units)
    return w[None, :], _load(BIAS, q * units + u, u < units)[None, :]


@triton.jit
def _total(a, b, c, d, PRECISE: tl.constexpr):
    """Returns a + b + c + d, in float64 if PRECISE."""
    if PRECISE:
        a, b, c, d = a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)
    return (a + b) + (c + d)


@triton.jit
def _step(
    PRODUCT, RECURRENT, GATE_WEIGHT, GATE_BIAS, CELL_WEIGHT, CELL_BIAS, HIDDEN, FED, CELL, Y, NORMED, SCALES,
    step, b, u, batch, units, has_product, has_cell, eps, PRECISE: tl.constexpr,
):  # fmt: skip
    """Writes gates, cell and hidden state of sequences b at a step, from the recurrent product and the
    previous cell.
    """
    keep = (b < batch)[:, None] & (u < units)[None, :]
    row = step * batch.to(tl.int64) + b
    at = (row * (4 * units))[:, None] + u[None, :]
    near = (b * (4 * units))[:, None] + u[None, :]
    own = (b * units)[:, None] + u[None, :]
    again = keep & (has_product != 0)
    # All loads precede the first sum of a row: behind its barriers each would take its time anew.
    i = _load(PRODUCT, at, keep) + _fresh(RECURRENT, near, again)
    f = _load(PRODUCT, at + units, keep) + _fresh(RECURRENT, near + units, again)
    v = _load(PRODUCT, at + 2 * units, keep) + _fresh(RECURRENT, near + 2 * units, again)
    o = _load(PRODUCT, at + 3 * units, keep) + _fresh(RECURRENT, near + 3 * units, again)
    c = _load(CELL, own, keep & (has_cell != 0))
    wi, bi = _affine(GATE_WEIGHT, GATE_BIAS, 0, u, units)
    wf, bf = _affine(GATE_WEIGHT, GATE_BIAS, 1, u, units)
    wv, bv = _affine(GATE_WEIGHT, GATE_BIAS, 2, u, units)
    wo, bo = _affine(GATE_WEIGHT, GATE_BIAS, 3, u, units)
    wc, bc = _affine(CELL_WEIGHT, CELL_BIAS, 0, u, units)
    mean = row_mean(_total(i, f, v, o, PRECISE), units, PRECISE) * 0.25
    i = centre(i, mean, keep, PRECISE)
    f = centre(f, mean, keep, PRECISE)
    v = centre(v, mean, keep, PRECISE)
    o = centre(o, mean, keep, PRECISE)
    square = row_mean(_total(i * i, f * f, v * v, o * o, PRECISE), units, PRECISE) * 0.25
    gate_scale = inverse_root(square, eps, PRECISE)
    i *= gate_scale[:, None]
    f *= gate_scale[:, None]
    v *= gate_scale[:, None]
    o *= gate_scale[:, None]
    if NORMED is not None:
        kept = (row * (5 * units))[:, None] + u[None, :]
        tl.store(NORMED + kept, i, mask=keep)
        tl.store(NORMED + kept + units, f, mask=keep)
        tl.store(NORMED + kept + 2 * units, v, mask=keep)
        tl.store(NORMED + kept + 3 * units, o, mask=keep)
    i, _ = sigmoid_pair(tl.fma(i, wi, bi), PRECISE)
    f, _ = sigmoid_pair(tl.fma(f, wf, bf), PRECISE)
    v, _ = activate_with_slope(tl.fma(v, wv, bv), TANH, PRECISE)
    o, _ = sigmoid_pair(tl.fma(o, wo, bo), PRECISE)
    c = tl.where(keep, tl.fma(f, c, i * v), 0.0)
    c = centre(c, row_mean(c, units, PRECISE), keep, PRECISE)
    cell_scale = inverse_root(row_mean(c * c, units, PRECISE), eps, PRECISE)
    c *= cell_scale[:, None]
    if NORMED is not None:
        tl.store(NORMED + kept + 4 * units, c, mask=keep)
        tl.store(SCALES + 2 * row, gate_scale, mask=b < batch)
        tl.store(SCALES + 2 * row + 1, cell_scale, mask=b < batch)
    c = tl.fma(c, wc, bc)
    act, _ = activate_with_slope(c, TANH, PRECISE)
    h = o * act
    tl.store(CELL + own, c, mask=keep)
    tl.store(HIDDEN + own, h, mask=keep)
    if FED.dtype.element_ty != tl.float32:
        tl.store(FED + own, h.to(FED.dtype.element_ty), mask=keep)
    tl.store(Y + (row * units)[:, None] + u[None, :], h.to(Y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["batch", "has_hidden", "has_cell", "first", "last"])
def forward_kernel(
    PRODUCT, WEIGHT, GATE_WEIGHT, GATE_BIAS, CELL_WEIGHT, CELL_BIAS, RECURRENT, HIDDEN, FED, CELL, Y, NORMED, SCALES,
    ARRIVED, batch, units, has_hidden, has_cell, first, last, eps,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    # Phases first to last - 1: of step t the product is 2 t, the rows are 2 t + 1. HIDDEN and CELL: the state.
    # FED: what products read, HIDDEN itself or a copy in WEIGHT's dtype, so that not each program rounds it.
    PRECISE: tl.constexpr = PRODUCT.dtype.element_ty == tl.float32
    pid, programs = tl.program_id(0), tl.num_programs(0)
    u = tl.arange(0, BLOCK_U)
    for phase in range(first, last):
        if phase % 2 == 0:
            for start in range(pid * BLOCK_N, 4 * units, programs * BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                _product(
                    FED,
                    units,
                    WEIGHT,
                    units,
                    1,
                    RECURRENT,
                    4 * units,
                    n,
                    4 * units,
                    units,
                    batch,
                    BLOCK_B,
                    BLOCK_K,
                )
        else:
            step = phase // 2
            for start in range(pid * BLOCK_R, batch, programs * BLOCK_R):
                _step(
                    PRODUCT, RECURRENT, GATE_WEIGHT, GATE_BIAS, CELL_WEIGHT, CELL_BIAS, HIDDEN, FED, CELL, Y,
                    NORMED, SCALES, step, start + tl.arange(0, BLOCK_R), u, batch, units, has_hidden + step,
                    has_cell + step, eps, PRECISE,
                )  # fmt: skip
        _wait(ARRIVED, (phase + 1 - first) * programs)


@triton.jit
def _step_back(
    GRAD, NORMED, SCALES, GATE_WEIGHT, GATE_BIAS, CELL_WEIGHT, CELL_BIAS, CELL, DHIDDEN, DCELL, BEFORE, DGATES,
    step, b, u, batch, units, PRECISE: tl.constexpr,
):  # fmt: skip
    """Writes dgates of sequences b at a step and d(cell) of the previous step; BEFORE receives the gradients before the
    norms' weights.
    """
    keep = (b < batch)[:, None] & (u < units)[None, :]
    row = step * batch.to(tl.int64) + b
    own = (b * units)[:, None] + u[None, :]
    dh = _fresh(DHIDDEN, own, keep)
    for q in tl.static_range(1, 4):
        dh += _fresh(DHIDDEN + q * batch.to(tl.int64) * units, own, keep)
    if GRAD is not None:
        dh += _load(GRAD, (row * units)[:, None] + u[None, :], keep)
    kept = (row * (5 * units))[:, None] + u[None, :]
    ni = _load(NORMED, kept, keep)
    nf = _load(NORMED, kept + units, keep)
    nv = _load(NORMED, kept + 2 * units, keep)
    no = _load(NORMED, kept + 3 * units, keep)
    nc = _load(NORMED, kept + 4 * units, keep)
    gate_scale = tl.load(SCALES + 2 * row, mask=b < batch, other=0.0)
    cell_scale = tl.load(SCALES + 2 * row + 1, mask=b < batch, other=0.0)
    # As in ``_step``, loads precede the sums of rows.
    wi, bi = _affine(GATE_WEIGHT, GATE_BIAS, 0, u, units)
    wf, bf = _affine(GATE_WEIGHT, GATE_BIAS, 1, u, units)
    wv, bv = _affine(GATE_WEIGHT, GATE_BIAS, 2, u, units)
    wo, bo = _affine(GATE_WEIGHT, GATE_BIAS, 3, u, units)
    wc, bc = _affine(CELL_WEIGHT, CELL_BIAS, 0, u, units)
    if step > 0:
        c = tl.fma(_load(NORMED + (4 - 5 * batch.to(tl.int64)) * units, kept, keep), wc, bc)
    else:
        c = tl.zeros_like(nc)
        if CELL is not None:
            c = _load(CELL, own, keep)
    i, i_rest = sigmoid_pair(tl.fma(ni, wi, bi), PRECISE)
    f, f_rest = sigmoid_pair(tl.fma(nf, wf, bf), PRECISE)
    v, v_slope = activate_with_slope(tl.fma(nv, wv, bv), TANH, PRECISE)
    o, o_rest = sigmoid_pair(tl.fma(no, wo, bo), PRECISE)
    act, slope = activate_with_slope(tl.fma(nc, wc, bc), TANH, PRECISE)
    # the cell's norm
    do = dh * act * (o * o_rest)
    dc = tl.fma(dh, o * slope, _load(DCELL, own, keep))
    tl.store(BEFORE + kept + 4 * units, dc, mask=keep)
    dc *= wc
    mean, along = means_with(dc, nc, units, True, PRECISE)
    dc = through(dc, nc, cell_scale[:, None], mean, along)
    # the gates
    tl.store(DCELL + own, dc * f, mask=keep)
    di = dc * v * (i * i_rest)
    df = dc * c * (f * f_rest)
    dv = dc * i * v_slope
    tl.store(BEFORE + kept, di, mask=keep)
    tl.store(BEFORE + kept + units, df, mask=keep)
    tl.store(BEFORE + kept + 2 * units, dv, mask=keep)
    tl.store(BEFORE + kept + 3 * units, do, mask=keep)
    # the gates' norm
    di *= wi
    df *= wf
    dv *= wv
    do *= wo
    total = _total(di, df, dv, do, False)
    mean, along = row_means(total, _total(di * ni, df * nf, dv * nv, do * no, False), units, PRECISE)
    mean, along = mean.to(tl.float32)[:, None] * 0.25, along.to(tl.float32)[:, None] * 0.25
    at = (row * (4 * units))[:, None] + u[None, :]
    out = DGATES.dtype.element_ty
    s = gate_scale[:, None]
    tl.store(DGATES + at, through(di, ni, s, mean, along).to(out), mask=keep)
    tl.store(DGATES + at + units, through(df, nf, s, mean, along).to(out), mask=keep)
    tl.store(DGATES + at + 2 * units, through(dv, nv, s, mean, along).to(out), mask=keep)
    tl.store(DGATES + at + 3 * units, through(do, no, s, mean, along).to(out), mask=keep)


@triton.jit(do_not_specialize=["batch", "steps", "first", "last"])
def backward_kernel(
    GRAD, WEIGHT, GATE_WEIGHT, GATE_BIAS, CELL_WEIGHT, CELL_BIAS, CELL, NORMED, SCALES,
    DHIDDEN, DCELL, BEFORE, DGATES, ARRIVED, batch, units, steps, first, last,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    # Phases first to last - 1, the last step's first: rows, then product. DHIDDEN (4, B, H): shares of the quarters.
    PRECISE: tl.constexpr = WEIGHT.dtype.element_ty == tl.float32
    pid, programs = tl.program_id(0), tl.num_programs(0)
    u = tl.arange(0, BLOCK_U)
    tiles = tl.cdiv(units, BLOCK_N)
    for phase in range(first, last):
        step = steps - 1 - phase // 2
        if phase % 2 == 0:
            for start in range(pid * BLOCK_R, batch, programs * BLOCK_R):
                _step_back(
                    GRAD, NORMED, SCALES, GATE_WEIGHT, GATE_BIAS, CELL_WEIGHT, CELL_BIAS, CELL, DHIDDEN, DCELL,
                    BEFORE, DGATES, step, start + tl.arange(0, BLOCK_R), u, batch, units, PRECISE,
                )  # fmt: skip
        else:
            for tile in range(pid, 4 * tiles, programs):
                q = (tile // tiles).to(tl.int64)
                n = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
                d = DGATES + (step.to(tl.int64) * batch * 4 + q) * units
                _product(
                    d, 4 * units, WEIGHT + q * units * units, 1, units,
                    DHIDDEN + q * batch * units, units, n, units, units, batch, BLOCK_B, BLOCK_K,
                )  # fmt: skip
        _wait(ARRIVED, (phase + 1 - first) * programs)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def norm_gradient_kernel(
    NORMED, BEFORE, PARTS, rows, rows_per_part, row, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    # Sums of d n and of d over a part's rows, as rows of two tables, for ``columns`` of each row of ``row`` numbers.
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        keep = (r < end)[:, None] & (c < columns)[None, :]
        at = r[:, None].to(tl.int64) * row + c[None, :]
        d = _load(BEFORE, at, keep)  # [BLOCK_R, BLOCK_C]
        dweight = tl.fma(d, _load(NORMED, at, keep), dweight)
        dbias += d
        first += BLOCK_R
    at = part.to(tl.int64) * columns + c
    tl.store(PARTS + at, column_sums(dweight.to(PARTS.dtype.element_ty)), mask=c < columns)
    at += tl.num_programs(1).to(tl.int64) * columns
    tl.store(PARTS + at, column_sums(dbias.to(PARTS.dtype.element_ty)), mask=c < columns)


# --------------------------------------------------------------------------- launches
_apart: set[torch.device] = set()  # devices whose driver has refused a cooperative launch


def _together(device: torch.device) -> bool:
    """Says whether programs run at the same time, so that they can wait for each other."""
    return os.environ.get("TRITON_INTERPRET") != "1" and device not in _apart


def _launched_together(kernel, programs: int, device: torch.device, *arguments, **shape) -> bool:
    """Launches programs that wait for each other. Returns False, and remembers it, if the driver refuses because it
    cannot run all of them at the same time: under MPS or in a green context it may have fewer multiprocessors than the
    device.
    """
    try:
        launch(kernel, (programs,), *arguments, **shape, launch_cooperative_grid=True)
    except RuntimeError as error:
        if not re.search("cooperative launch|not supported", str(error)):
            raise
        _apart.add(device)
        _log.warning("layer_norm_lstm on %s launches each phase of a step: %s", device, error)
        return False
    return True


def shapes(units: int, batch: int, programs: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the tiles of ``programs`` programs."""
    block_u = max(32, next_power_of_2(units))
    rows = min(MAX_ROWS, next_power_of_2(cdiv(batch, programs)))
    most = MAX_K_PRECISE if dtype == torch.float32 else MAX_K
    warps = max(NUM_WARPS, min(16, block_u // 128))
    return {
        "BLOCK_B": BLOCK_B,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": min(most, max(16, next_power_of_2(units))),
        "BLOCK_R": max(1, min(rows, ROW_TILE // block_u)),
        "BLOCK_U": block_u,
        "num_warps": warps,
        "num_stages": 4 if most == MAX_K else 5,
        "maxnreg": min(
            255, 2048 // warps
        ),  # without this limit the assembler spills to let more programs run at once
        **dot_options(dtype),
    }


def _launch(kernel, arguments, first: int, last: int, tail, weight, batch: int, arrived=None) -> None:
    """Runs phases first to last - 1 in one launch, or in one launch each where programs cannot wait or there is but one
    step. ``arrived`` (1,) is a zero of int32, or None.
    """
    units, device = weight.shape[1], weight.device
    programs = min(processors(weight), cdiv(4 * units, BLOCK_N))
    shape = shapes(units, batch, programs, weight.dtype)
    if programs == 1:  # no other program to wait for
        launch(kernel, (1,), *arguments, None, *tail(first, last), **shape)
        return
    if last - first > 2 and _together(device):
        if arrived is None:
            arrived = torch.zeros(1, dtype=torch.int32, device=device)
        arguments_of_all = *arguments, arrived, *tail(first, last)
        if _launched_together(kernel, programs, device, *arguments_of_all, **shape):
            return
    for phase in range(first, last):
        launch(kernel, (programs,), *arguments, None, *tail(phase, phase + 1), **shape)


def _check(steps: int, batch: int, units: int) -> None:
    if units > MAX_UNITS or 4 * batch * units >= 2**31 or 2 * steps * 1024 >= 2**31:
        raise ValueError(
            f"fastasr.layer_norm_lstm: x: expected at most {MAX_UNITS} units, fewer than 2**29 numbers of state "
            f"and 2**20 steps on CUDA, got {units} units, {batch} sequences and {steps} steps"
        )


def layer_norm_lstm_forward(
    product,
    input_weight,
    weight,
    gate_weight,
    gate_bias,
    cell_weight,
    cell_bias,
    hidden,
    cell,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    """Returns (y (T, B, H), hidden, cell, kept) from x W_x^T (T, B, 4H) and ``weight`` (4H, H) of one dtype. The norms'
    parameters and the state have dtypes of their own; y has that of the product and the norms together, the others are
    float32. All tensors are contiguous. ``input_weight`` is None.
    """
    steps, batch, units = product.shape[0], product.shape[1], weight.shape[1]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=product.device)

    norms = gate_weight, gate_bias, cell_weight, cell_bias
    dtype = reduce(torch.promote_types, (t.dtype for t in norms), product.dtype)
    y, rows = new(steps, batch, units, dtype=dtype), steps * batch
    kept = new(rows * (5 * units + 2) if keep else 0)
    nothing = torch.zeros if not steps else torch.empty
    after = [
        nothing(batch, units, dtype=torch.float32, device=product.device)
        if t is None
        else t.to(torch.float32, copy=True)
        for t in (hidden, cell)
    ]
    if rows:
        _check(steps, batch, units)
        normed, scales = (kept, kept[rows * 5 * units :]) if keep else (None, None)
        fed = after[0]
        if steps > 1 and weight.dtype != torch.float32:
            fed = new(batch, units, dtype=weight.dtype) if hidden is None else fed.to(weight.dtype)
        arguments = product, weight, *norms, new(batch, 4 * units), after[0], fed, after[1], y
        _launch(
            forward_kernel,
            (*arguments, normed, scales),
            int(hidden is None),
            2 * steps,
            lambda first, last: (
                batch,
                units,
                int(hidden is not None),
                int(cell is not None),
                first,
                last,
                eps,
            ),
            weight,
            batch,
        )
    return y, *after, kept


def layer_norm_lstm_backward(
    grad_y, grad_hidden, grad_cell, weight, gate_weight, gate_bias, cell_weight, cell_bias, cell, kept,
    steps: int, batch: int, eps: float, need_state: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Returns (dgates (T, B, 4H) in weight's dtype, dgate_weight, dgate_bias, dcell_weight, dcell_bias, dhidden,
    dcell). Gradients given are of any dtype or None, those of the norms have the dtypes of the parameters, and those of
    the state are float32; dhidden has no elements unless ``need_state``.
    """
    units, device = weight.shape[1], weight.device

    def new(make, *shape: int, dtype=torch.float32) -> torch.Tensor:
        return make(shape, dtype=dtype, device=device)

    dgates, rows = new(torch.empty, steps, batch, 4 * units, dtype=weight.dtype), steps * batch
    zeros, dcell = new(torch.zeros, 4 * batch * units + 1), new(torch.zeros, batch, units)
    dhidden, arrived = zeros[:-1].view(4, batch, units), zeros[-1:].view(torch.int32)
    for gradient, given in ((dhidden[0], grad_hidden), (dcell, grad_cell)):
        if given is not None:
            gradient.copy_(given)
    make = torch.empty_like if rows else torch.zeros_like
    norms = [make(t) for t in (gate_weight, gate_bias, cell_weight, cell_bias)]
    if rows:
        _check(steps, batch, units)
        before, scales = new(torch.empty, rows * 5 * units), kept[rows * 5 * units :]
        arguments = (grad_y, weight, gate_weight, gate_bias, cell_weight, cell_bias, cell, kept, scales)
        _launch(
            backward_kernel,
            (*arguments, dhidden, dcell, before, dgates),
            0,
            2 * steps - (not need_state),
            lambda first, last: (batch, units, steps, first, last),
            weight,
            batch,
            arrived,
        )
        _norm_gradients(kept, before, rows, 5 * units, 0, norms[:2])
        _norm_gradients(kept, before, rows, 5 * units, 4 * units, norms[2:])
    return dgates, *norms, dhidden.sum(0) if need_state else new(torch.empty, 0), dcell


def _norm_gradients(normed, before, rows: int, row: int, start: int, out: list[torch.Tensor]) -> None:
    """Returns the sums of d n and d over all rows for the columns from ``start`` on."""
    columns = out[0].numel()
    rows_per_part = cdiv(cdiv(rows, MAX_PARTS), PART_ROWS) * PART_ROWS
    parts = cdiv(rows, rows_per_part)
    table = torch.empty((2, parts, columns), dtype=torch.float64, device=before.device)
    launch(norm_gradient_kernel, (cdiv(columns, BLOCK_P), parts),
        normed[start:], before[start:], table, rows, rows_per_part, row, columns,
        BLOCK_R=PART_ROWS, BLOCK_C=BLOCK_P, num_warps=4,
    )  # fmt: skip
    add_pair(table, *out, NORM_SUMS)
