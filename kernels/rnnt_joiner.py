# SPDX-License-Identifier: Apache-2.0
"""A transducer's joiner down to two log-probabilities per row; logits stay in registers.

    h = m act(am[b, t] + lm[b, s]), l = W h + bias, L = log sum_v exp(l_v), blank = l_blank - L, symbol = l_y - L
    With gx, gy the gradients of symbol and blank: dl = gx e_y + gy e_blank - (gx + gy) exp(l - L), dbias = sum dl,
    dW = sum dl h^T, da = m (W^T dl) act', summed over the rows of a frame (dam) and of a context (dlm).

For N rows of D channels, V outputs, e bytes, per kernel:

    hidden            BLOCK_R rows x BLOCK_C channels   writes h, N D e; reads am and lm, mostly from the cache
    scores            BLOCK_M rows, a share of outputs  2 N D V FLOPs; a running maximum and sum
    normalise         BLOCK_M rows                      adds up the shares
    logits gradient   BLOCK_M rows x BLOCK_N outputs    2 N D V FLOPs; writes dl, N V e, and its column sums
    (products)        dl W and dl^T h                   4 N D V FLOPs, cuBLAS
    frame gradient    a frame x BLOCK_C channels        dh to da in place, N D e; dam
    context gradient  a context x BLOCK_C channels      reads da of its rows, dlm; adds up the parts of dbias

Rows pass through in chunks that hold h, and in the backward pass dl and dh, in at most CHUNK_BYTES: the tensor of all
logits never exists. If the forward's h was one chunk, the backward pass reads it, unless the caller keeps nothing. dlm
and dW are sums over chunks in float32; one chunk writes them in their own dtypes. A fused sweep that also forms W^T dl
would compute the logits twice: 8 N D V FLOPs instead of 6. Blocks whose rows are all outside the boundary, or all have
gradients of 0, multiply nothing. A list of rows would need a synchronisation, so there is none. What a program does
depends on the shape and on the device's generation and number of multiprocessors: on one kind of device results repeat
bit for bit, without atomics.

The few durations of a TDT joiner are outputs behind the tokens. A kernel of their own, ``durations``, multiplies a
block of rows of h, and writes their log-probabilities or their part of dl.

Launches: forward 3; backward, of one chunk whose h is kept, 3 and two products, and a copy of W where V is no multiple
of 16. Of durations, 1 more in each.

At B = 20, T = 750, R = 5, D = 512, V = 5000 in bf16 the products need 0.49 ms forward and 1.46 backward at 790 TFLOP/s.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import TANH, activate_with_slope, exp_nonpositive, sigmoid_pair
from fastasr.kernels._attention_tiles import NONE, products, running, sums
from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._launch import cdiv, dot_options, generation, launch, next_power_of_2, processors
from fastasr.kernels._parts import add_parts, add_parts_at
from fastasr.kernels._weights_dropout import constants, dropped, row_words

CHUNK_BYTES = 128 << 20
FRAME = {"BLOCK_R": 8, "BLOCK_C": 128, "num_warps": 4}
# Frames with at most SHORT rows have a program for each row: tiles of eight rows would be mostly empty.
SHORT, SHORT_FRAME = 16, {"BLOCK_R": 1, "BLOCK_C": 512, "num_warps": 4}
# a thread for each channel: each stores the element of DLM that it loaded as BEFORE
CONTEXT = {"BLOCK_T": 64, "BLOCK_C": 128, "BLOCK_P": 128, "BLOCK_V": 8, "num_warps": 4}
NORMALISE = {"BLOCK_M": 32, "num_warps": 4}
MAX_SHARES = 16  # programs of `scores` that share the outputs of a block of rows
NO_SYMBOL, UNKNOWN = tl.constexpr(-1), tl.constexpr(-2)
SIZES = ["first", "rows", "frames", "length", "s_range"]


@triton.jit
def locate_in_frame(frame, batch, t, r, STARTS, SYMBOLS, BOUNDARY, length, outputs):
    """Returns (context, whether inside, symbol) of the r-th rows of frames, all of 64 bits."""
    s = tl.load(STARTS + frame) + r
    inside = s >= 0
    last = tl.zeros_like(s) + length
    if BOUNDARY is not None:
        inside = inside & (s >= tl.load(BOUNDARY + batch * 4))
        inside = inside & (t >= tl.load(BOUNDARY + batch * 4 + 1))
        inside = inside & (t < tl.load(BOUNDARY + batch * 4 + 3))
        last = tl.minimum(last, tl.load(BOUNDARY + batch * 4 + 2))
    inside = inside & (s <= last)
    has_symbol = inside & (s < last)
    symbol = tl.load(SYMBOLS + batch * length + s, mask=has_symbol, other=NO_SYMBOL)
    symbol = tl.where(has_symbol & ((symbol < 0) | (symbol >= outputs)), UNKNOWN, symbol)
    return batch * (length + 1) + tl.where(inside, s, 0), inside, symbol


@triton.jit
def locate_frame(place, first, frames, s_range):
    """Returns (frame, batch, its number within) of a chunk's frames, whose ``place`` has 32 bits: division takes longer
    with 64.
    """
    begin = first // s_range
    t = (begin % frames).to(tl.int32) + place
    return begin.to(tl.int64) + place, (begin // frames).to(tl.int64) + t // frames, t % frames


@triton.jit
def locate(local, STARTS, SYMBOLS, BOUNDARY, first, rows, frames, length, s_range, outputs):
    """Returns (frame, context, whether inside, symbol) of the rows first + local, all of 64 bits. Those from ``rows``
    on are not inside. A chunk begins with a frame.
    """
    own = tl.minimum(local, rows - first - 1).to(tl.int32)
    frame, batch, t = locate_frame(own // s_range, first, frames, s_range)
    context, inside, symbol = locate_in_frame(
        frame, batch, t, own % s_range, STARTS, SYMBOLS, BOUNDARY, length, outputs
    )
    return frame, context, inside & (local < rows - first), symbol


@triton.jit
def softplus(x):
    """Returns log(1 + e^x), of float64."""
    return tl.log(1.0 + tl.exp(-tl.abs(x))) + tl.maximum(x, 0.0)


@triton.jit
def _or_none(BIAS, v, here):
    """Returns the bias of outputs, and -inf where there is none: such a logit has a gradient of 0."""
    if BIAS is not None:
        bias = tl.load(BIAS + v, mask=here, other=NONE).to(tl.float32)
    else:
        bias = tl.where(here, 0.0, NONE)
    return bias


# --------------------------------------------------------------------------- forward
@triton.jit(do_not_specialize=[*SIZES, "threshold"])
def hidden_kernel(
    AM, LM, STARTS, SYMBOLS, BOUNDARY, SEED, HIDDEN, first, rows, frames, length, s_range, D, width, threshold, factor,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes m act(am + lm) of rows [first, rows), with zeros outside the boundary and behind the last
    channel.
    """
    PRECISE: tl.constexpr = HIDDEN.dtype.element_ty == tl.float32
    tiles = tl.cdiv(width, BLOCK_C)
    local = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = first + local
    frame, context, inside, _ = locate(
        local, STARTS, SYMBOLS, BOUNDARY, first, rows, frames, length, s_range, 1
    )
    keep = inside[:, None] & (c < D)[None, :]  # [BLOCK_R, BLOCK_C]
    a = tl.load(AM + frame[:, None] * D + c[None, :], mask=keep, other=0.0).to(tl.float32)
    b = tl.load(LM + context[:, None] * D + c[None, :], mask=keep, other=0.0).to(tl.float32)
    h, _slope = activate_with_slope(a + b, ACTIVATION, PRECISE)
    h = dropped(h, SEED, row_words(SEED, row), c, threshold, factor)
    whole = (row < rows)[:, None] & (c < width)[None, :]
    tl.store(HIDDEN + local[:, None] * width + c[None, :], h.to(HIDDEN.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize=[*SIZES, "blank"])
def scores_kernel(
    HIDDEN, WEIGHT, BIAS, STARTS, SYMBOLS, BOUNDARY, PARTS,
    first, rows, frames, length, s_range, width, V, blank, share,
    HAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes the maximum, the sum of exponentials, and the logits of symbol and blank, of a block of rows and of
    ``share`` outputs. PARTS: (shares of the outputs, 4, rows).
    """
    PRECISE: tl.constexpr = HIDDEN.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first + local
    _frame, _context, inside, symbol = locate(
        local, STARTS, SYMBOLS, BOUNDARY, first, rows, frames, length, s_range, V
    )
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], SUM)
    at_symbol = tl.zeros([BLOCK_M], tl.float32)
    at_blank = tl.zeros([BLOCK_M], tl.float32)
    # Outputs are counted from the share's first one, in 32 bits: symbols of 64 bits take 70 registers more on sm_90.
    begin = tl.program_id(1) * share
    WEIGHT += begin.to(tl.int64) * width
    if BIAS is not None:
        BIAS += begin
    symbol = (symbol - begin).to(tl.int32)
    blank -= begin
    outputs = tl.minimum(V - begin, share)
    end = tl.max(inside.to(tl.int32)) * outputs  # 0 if the boundary holds no row
    for start in range(0, end, BLOCK_N):
        v = start + tl.arange(0, BLOCK_N)
        here = v < outputs
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        logits = products(logits, HIDDEN, local, width, inside, WEIGHT, v, width, here, width, BLOCK_K)
        logits += _or_none(BIAS, v, here)[None, :]
        at_symbol += tl.sum(tl.where(v[None, :] == symbol[:, None], logits, 0.0), axis=1)
        if (start <= blank) & (blank < start + BLOCK_N):
            at_blank += tl.sum(tl.where((v == blank)[None, :], logits, 0.0), axis=1)
        if HAT:
            logits = tl.where((v != blank)[None, :], logits, NONE)
        maximum, factor, e = running(maximum, logits, PRECISE, ONE=True)
        total = total * factor + sums(e, 1, PRECISE)
    count = rows - first
    at = PARTS + tl.program_id(1).to(tl.int64) * 4 * count + local
    keep = row < rows
    tl.store(at, maximum.to(tl.float64), mask=keep)
    tl.store(at + count, total.to(tl.float64), mask=keep)
    tl.store(at + 2 * count, at_symbol.to(tl.float64), mask=keep)
    tl.store(at + 3 * count, at_blank.to(tl.float64), mask=keep)


@triton.jit(do_not_specialize=[*SIZES, "V", "blank", "shares"])
def normalise_kernel(
    PARTS, STARTS, SYMBOLS, BOUNDARY, PX, PY, NORMALISER, first, rows, frames, length, s_range, V, blank, shares,
    HAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes symbol, blank and L of a block of rows from the shares of the outputs."""
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first + local
    _frame, _context, inside, symbol = locate(
        local, STARTS, SYMBOLS, BOUNDARY, first, rows, frames, length, s_range, V
    )
    count = rows - first
    s = tl.arange(0, BLOCK_S)
    at = PARTS + (s.to(tl.int64) * 4 * count)[:, None] + local[None, :]  # [BLOCK_S, BLOCK_M]
    here = (s < shares)[:, None] & inside[None, :]
    maxima = tl.load(at, mask=here, other=NONE)
    maximum = tl.max(maxima, axis=0)
    factors = tl.where(maxima == NONE, 0.0, tl.exp(maxima - maximum[None, :]))
    total = tl.sum(tl.load(at + count, mask=here, other=0.0) * factors, axis=0)
    at_symbol = tl.sum(tl.load(at + 2 * count, mask=here, other=0.0), axis=0)
    z = tl.sum(tl.load(at + 3 * count, mask=here, other=0.0), axis=0)
    normaliser = maximum + tl.log(total)
    px = at_symbol - normaliser
    py = z - normaliser
    if HAT:
        px = tl.where(symbol == blank, NONE, px - softplus(z))
        py = -softplus(-z)
    px = tl.where(symbol == UNKNOWN, float("nan"), tl.where(symbol == NO_SYMBOL, NONE, px))
    keep = row < rows
    tl.store(PX + row, tl.where(inside, px, NONE).to(tl.float32), mask=keep)
    tl.store(PY + row, tl.where(inside, py, NONE).to(tl.float32), mask=keep)
    tl.store(NORMALISER + row, tl.where(inside, normaliser, 0.0), mask=keep)


# --------------------------------------------------------------------------- backward
# PARTS may begin at any row of a table
@triton.jit(do_not_specialize=[*SIZES, "outputs", "blank"], do_not_specialize_on_alignment=["PARTS"])
def logits_gradient_kernel(
    HIDDEN, WEIGHT, BIAS, STARTS, SYMBOLS, BOUNDARY, GX, GY, NORMALISER, DLOGITS, PARTS,
    first, rows, frames, length, s_range, width, V, outputs, d_stride, blank,
    HAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes dl of a block of rows and of outputs, and its sum over the rows. Behind the last output it writes zeros,
    up to ``d_stride``: only a mask that ends at a multiple of 16 keeps stores of 128 bits.
    """
    PRECISE: tl.constexpr = HIDDEN.dtype.element_ty == tl.float32
    tiles = tl.cdiv(V, BLOCK_N)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.arange(0, BLOCK_M)  # places counted from the block's first row fit 32 bits, in fewer registers
    local = block * BLOCK_M + i
    v = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first + local
    _frame, _context, inside, symbol = locate(
        local, STARTS, SYMBOLS, BOUNDARY, first, rows, frames, length, s_range, V
    )
    gx = tl.load(GX + row, mask=inside & (symbol != NO_SYMBOL), other=0.0)
    gy = tl.load(GY + row, mask=inside, other=0.0)
    active = (gx != 0.0) | (gy != 0.0)
    symbol = symbol.to(tl.int32)  # half the instructions of a comparison
    end = tl.max(active.to(tl.int32)) * width  # 0 without a gradient
    here = v < V
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    logits = products(logits, HIDDEN, local, width, active, WEIGHT, v, width, here, end, BLOCK_K)
    logits += _or_none(BIAS, v, here)[None, :]
    normaliser = tl.load(NORMALISER + row, mask=inside, other=0.0)
    high = normaliser.to(tl.float32)
    low = (normaliser - high.to(tl.float64)).to(tl.float32)  # its rounding would scale the whole row
    x = (logits - high[:, None]) - low[:, None]
    soft = exp_nonpositive(tl.where(x > 0.0, 0.0, x), PRECISE)
    is_symbol = v[None, :] == symbol[:, None]
    is_blank = (v == blank)[None, :]
    if HAT:
        d = tl.where(is_symbol, gx[:, None], 0.0) - gx[:, None] * soft
        s, r = sigmoid_pair(tl.sum(tl.where(is_blank, logits, 0.0), axis=1), PRECISE)
        d = tl.where(is_blank, (gy * r - gx * s)[:, None], d)
    else:
        own = tl.where(is_symbol, gx[:, None], 0.0) + tl.where(is_blank, gy[:, None], 0.0)
        d = own - (gx + gy)[:, None] * soft
    d = tl.where(active[:, None], d, 0.0)
    left = tl.minimum(rows - first - block * BLOCK_M, BLOCK_M).to(tl.int32)
    keep = (i < left)[:, None] & (v < d_stride)[None, :]
    DLOGITS += block * BLOCK_M * d_stride
    tl.store(DLOGITS + (i[:, None] * d_stride + v[None, :]), d.to(DLOGITS.dtype.element_ty), mask=keep)
    tl.store(PARTS + block * outputs + v, sums(d, 0, PRECISE), mask=here)


@triton.jit(do_not_specialize=[*SIZES, "V", "durations"], do_not_specialize_on_alignment=["BIAS", "PARTS"])
def durations_kernel(
    HIDDEN, WEIGHT, BIAS, STARTS, SYMBOLS, BOUNDARY, PD, GZ, DLOGITS, PARTS,
    first, rows, frames, length, s_range, width, V, durations, d_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes the log-probabilities of the durations of a block of rows. With their gradients GZ it writes their part of
    dl, and its sum over the rows.
    """
    PRECISE: tl.constexpr = HIDDEN.dtype.element_ty == tl.float32
    block = tl.program_id(0).to(tl.int64)
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first + local
    n = tl.arange(0, BLOCK_N)
    here = n < durations
    _frame, _context, inside, _symbol = locate(
        local, STARTS, SYMBOLS, BOUNDARY, first, rows, frames, length, s_range, V
    )
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    logits = products(logits, HIDDEN, local, width, inside, WEIGHT, n, width, here, width, BLOCK_K)
    logits += _or_none(BIAS, n, here)[None, :]
    maximum = tl.max(logits, axis=1)
    x = logits - maximum[:, None]
    e = exp_nonpositive(x, PRECISE)
    total = sums(e, 1, PRECISE)
    keep = (row < rows)[:, None] & here[None, :]
    at = row[:, None] * durations + n[None, :]
    if GZ is None:
        pd = x - tl.log(total).to(tl.float32)[:, None]
        tl.store(PD + at, tl.where(inside[:, None], pd, NONE), mask=keep)
    else:
        gz = tl.load(GZ + at, mask=keep & inside[:, None], other=0.0)
        d = gz - e * (sums(gz, 1, PRECISE) / total).to(tl.float32)[:, None]
        at = DLOGITS + local[:, None] * d_stride + (V + n)[None, :]
        tl.store(at, d.to(DLOGITS.dtype.element_ty), mask=keep)
        tl.store(PARTS + block * (V + durations) + V + n, sums(d, 0, PRECISE), mask=here)


@triton.jit(do_not_specialize=[*SIZES, "threshold"])
def frame_gradient_kernel(
    AM, LM, STARTS, SYMBOLS, BOUNDARY, SEED, DHIDDEN, DAM, first, rows, frames, length, s_range, D, threshold, factor,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes da over dh, in place, and dam, of a frame. Where it has many rows, they pass through in blocks: one by
    one, each would wait for its loads.
    """
    tiles = tl.cdiv(D, BLOCK_C)
    place = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = c < D
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    frame, batch, t = locate_frame(place, first, frames, s_range)
    a = tl.load(AM + frame * D + c, mask=in_row, other=0.0).to(tl.float32)
    for start in range(0, s_range, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        local = place.to(tl.int64) * s_range + r
        context, inside, _ = locate_in_frame(frame, batch, t, r, STARTS, SYMBOLS, BOUNDARY, length, 1)
        own = (r < s_range)[:, None] & in_row[None, :]  # [BLOCK_R, BLOCK_C]
        keep = own & inside[:, None]
        b = tl.load(LM + context[:, None] * D + c[None, :], mask=keep, other=0.0).to(tl.float32)
        d = tl.load(DHIDDEN + local[:, None] * D + c[None, :], mask=keep, other=0.0).to(tl.float32)
        d = dropped(d, SEED, row_words(SEED, first + local), c, threshold, factor)
        h, slope = activate_with_slope(a[None, :] + b, ACTIVATION, PRECISE)
        if ACTIVATION == TANH:
            # one rounding; a sum over outputs does not show the digits that cancel near 0
            slope = tl.fma(-h, h, 1.0)
        da = tl.where(keep, d * slope, 0.0)
        tl.store(DHIDDEN + local[:, None] * D + c[None, :], da.to(DHIDDEN.dtype.element_ty), mask=own)
        total += da
    tl.store(DAM + frame * D + c, column_sums(total).to(DAM.dtype.element_ty), mask=in_row)


@triton.jit
def _context_gradient(
    place, STARTS, DA, BEFORE, DLM, first, rows, frames, length, s_range, D,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_C)
    context = (place // tiles).to(tl.int64)
    c = place % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = c < D
    batch = context // (length + 1)
    s = context % (length + 1)
    begin = tl.maximum(batch * frames, first // s_range)
    end = tl.minimum((batch + 1) * frames, rows // s_range)
    total = tl.zeros([8, BLOCK_C], tl.float32)
    for frame in range(begin, end, BLOCK_T):
        t = frame + tl.arange(0, BLOCK_T)
        start = tl.load(STARTS + t, mask=t < end, other=0)
        r = s - start
        mine = (t < end) & (r >= 0) & (r < s_range)
        if tl.max(mine.to(tl.int32)) > 0:
            local = t * s_range + r - first
            keep = mine[:, None] & in_row[None, :]
            da = tl.load(DA + local[:, None] * D + c[None, :], mask=keep, other=0.0).to(tl.float32)
            total += tl.sum(tl.reshape(da, [BLOCK_T // 8, 8, BLOCK_C]), axis=0)
    total = column_sums(total)
    if BEFORE is not None:
        total += tl.load(BEFORE + context * D + c, mask=in_row, other=0.0)
    tl.store(DLM + context * D + c, total.to(DLM.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=[*SIZES, "programs", "parts"])
def context_gradient_kernel(
    STARTS, DA, BEFORE, DLM, PARTS, DBIAS, first, rows, frames, length, s_range, D, programs, parts, outputs,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes dlm of a context: the sum of da over its rows among [first, rows), plus BEFORE, that of earlier chunks.
    Rows outside the boundary hold zeros. Programs behind those of the contexts add up the parts of the bias's gradient.
    """
    pid = tl.program_id(0)
    if pid < programs:
        sizes = first, rows, frames, length, s_range, D
        _context_gradient(pid, STARTS, DA, BEFORE, DLM, *sizes, BLOCK_T, BLOCK_C)
    elif PARTS is not None:
        add_parts_at(pid - programs, PARTS, DBIAS, parts, outputs, BLOCK_P, BLOCK_V)


# --------------------------------------------------------------------------- launchers
def tiles(d: int, dtype: torch.dtype, generation: int) -> dict[str, dict[str, int]]:
    """Returns tile shape, warps and stages of ``hidden`` and of the kernels that multiply
    (tests/kernels/budgets.toml: no spills; 128 rows spill on capability 12.0). On 9.0, 256 outputs at once read a
    quarter less from the second-level cache. ``logits_gradient`` would spill; 64 outputs at once in four warps took
    less time in a trial on an H200 than 128 in eight.
    """
    wide = dtype == torch.float32
    size = max(16, next_power_of_2(d))
    rows = 64 if wide or generation == 120 else 128
    found = {"BLOCK_M": rows, "BLOCK_N": 32 if wide else 128, "BLOCK_K": min(16 if wide else 64, size)}
    found |= {"num_warps": 8, "num_stages": 2 if wide else 3} | dot_options(dtype)
    scores = gradient = found
    if generation == 90 and not wide:
        scores = found | {"BLOCK_N": 256, "BLOCK_K": min(32, size), "num_stages": 4}
        gradient = found | {"BLOCK_N": 64, "num_warps": 4}
    hidden = {"BLOCK_R": 8, "BLOCK_C": 512} if generation >= 90 else {"BLOCK_R": 4, "BLOCK_C": 256}
    few = found | {"BLOCK_N": 16, "num_warps": 4}
    hidden |= {"num_warps": 4}
    return {"hidden": hidden, "scores": scores, "logits_gradient": gradient, "durations": few}


class _Plan:
    """Operands and sizes that the launches of one call share."""

    def __init__(
        self,
        am,
        lm,
        weight,
        bias,
        symbols,
        starts,
        boundary,
        seed,
        s_range,
        blank,
        activation,
        hat,
        durations,
        p,
    ):
        self.am, self.lm, self.weight = am.contiguous(), lm.contiguous(), weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.v, self.durations = weight.shape[0] - durations, durations  # durations lie behind the tokens
        self.seed, self.dropout = seed if p else None, constants(p)
        self.band = (
            starts.contiguous(),
            symbols.contiguous(),
            None if boundary is None else boundary.contiguous(),
        )
        self.batch, self.frames, self.d = am.shape
        self.length, self.s_range = symbols.shape[1], s_range
        self.blank, self.activation, self.hat = blank, activation, hat
        shapes = tiles(self.d, weight.dtype, generation(weight))
        self.tile, self.scores, self.logits_gradient, few = shapes.values()
        self.few = few | {"BLOCK_N": max(16, next_power_of_2(max(1, durations)))}
        self.width = cdiv(self.d, 16) * 16  # row width of h and of this weight: loads of 128 bits
        more = self.width - self.d
        self.padded = torch.nn.functional.pad(self.weight, (0, more)) if more else self.weight

    def chunks(self, bytes_per_row: int):
        """Returns (first row, end) of chunks of whole frames."""
        step = max(1, CHUNK_BYTES // max(1, bytes_per_row * self.s_range)) * self.s_range
        rows = self.batch * self.frames * self.s_range
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def sizes(self, first: int, end: int) -> tuple[int, ...]:
        return first, end, self.frames, self.length, self.s_range

    def blocks(self, count: int) -> int:
        return cdiv(count, self.scores["BLOCK_M"])

    def share(self, count: int) -> int:
        """Returns the outputs of a program of `scores`: those for which its programs take the fewest turns of a block.

        A multiprocessor holds one program of 16 bits, two of float32 (tests/kernels/budgets.toml: registers). The
        shares of a row are added up: devices with other numbers of multiprocessors may round the last bits of L
        otherwise.
        """
        block, blocks = self.scores["BLOCK_N"], self.blocks(count)
        tiles = cdiv(self.v, block)
        places = processors(self.weight) * (2 if self.weight.dtype is torch.float32 else 1)

        def turns(share: int) -> int:
            return -(blocks * (-tiles // share) // places) * share  # both divisions round up

        choices = (-(-tiles // shares) for shares in range(1, min(MAX_SHARES, tiles) + 1))
        return block * min(choices, key=turns)  # min takes the first of equals, which has the fewest shares

    def hidden(self, first: int, end: int) -> torch.Tensor:
        h = self.weight.new_empty(end - first, self.width)
        if self.width:
            tile = self.tile
            grid = cdiv(end - first, tile["BLOCK_R"]) * cdiv(self.width, tile["BLOCK_C"])
            launch(hidden_kernel, (grid,),
                self.am, self.lm, *self.band, self.seed, h, *self.sizes(first, end), self.d, self.width, *self.dropout,
                ACTIVATION=self.activation, **tile,
            )  # fmt: skip
        return h

    def launch_durations(self, hidden, first: int, end: int, pd, gz=None, dlogits=None, parts=None) -> None:
        bias = None if self.bias is None else self.bias[self.v :]
        launch(durations_kernel, (self.blocks(end - first),),
            hidden, self.padded[self.v :], bias, *self.band, pd, gz, dlogits, parts,
            *self.sizes(first, end), self.width, self.v, self.durations, 0 if gz is None else dlogits.stride(0),
            **self.few,
        )  # fmt: skip


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a b in float32."""
    if a.dtype is torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def rnnt_joiner_forward(
    am, lm, weight, bias, symbols, starts, boundary, seed, s_range: int, blank: int, activation: int, hat: bool,
    durations: int, dropout: float, need_gradients: bool, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Returns (symbol_logprobs, blank_logprobs, duration_logprobs, L, h of all rows or None)."""
    options = s_range, blank, activation, hat, durations, dropout
    p = _Plan(am, lm, weight, bias, symbols, starts, boundary, seed, *options)
    shape = p.batch, p.frames, s_range
    px, py = (torch.empty(shape, dtype=torch.float32, device=am.device) for _ in range(2))
    pd = torch.empty(*shape, durations, dtype=torch.float32, device=am.device)
    normaliser = torch.empty(shape, dtype=torch.float64, device=am.device)
    kept = None
    for first, end in p.chunks(p.width * weight.element_size()):
        blocks, share = p.blocks(end - first), p.share(end - first)
        shares = cdiv(p.v, share)
        parts = torch.empty(shares, 4, end - first, dtype=torch.float64, device=am.device)
        hidden = p.hidden(first, end)
        launch(scores_kernel, (blocks, shares),
            hidden, p.padded, p.bias, *p.band, parts,
            *p.sizes(first, end), p.width, p.v, blank, share, HAT=hat, **p.scores,
        )  # fmt: skip
        launch(normalise_kernel, (cdiv(end - first, NORMALISE["BLOCK_M"]),),
            parts, *p.band, px, py, normaliser, *p.sizes(first, end), p.v, blank, shares,
            HAT=hat, BLOCK_S=next_power_of_2(shares), **NORMALISE,
        )  # fmt: skip
        if keep and need_gradients and end - first == px.numel():
            kept = hidden
        if durations:
            p.launch_durations(hidden, first, end, pd)
    return px, py, pd, normaliser, kept


def rnnt_joiner_backward(
    grad_symbol, grad_blank, grad_durations, am, lm, weight, bias, symbols, starts, boundary, seed,
    s_range: int, blank: int, activation: int, hat: bool, durations: int, dropout: float, normaliser, needs, kept,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns (dam, dlm, dweight, dbias); those that ``needs`` does not ask for may be zeros."""
    options = s_range, blank, activation, hat, durations, dropout
    p = _Plan(am, lm, weight, bias, symbols, starts, boundary, seed, *options)
    gx, gy = grad_symbol.contiguous(), grad_blank.contiguous()
    outputs, size = weight.shape[0], weight.element_size()
    # cuBLAS takes slow kernels for products with 8,198 outputs. The gradients of more outputs are zeros, which any
    # weights may meet.
    stride = cdiv(outputs, 16) * 16 if outputs > 16 else outputs
    more = stride - outputs
    output_weight = torch.cat((p.weight, p.weight[:more])) if more else p.weight
    # Rounded once, to the dtype of the operands, dh has the error of eager's.
    multiply = torch.mm if am.dtype is weight.dtype else _product
    chunks = list(p.chunks((stride + p.width) * size + p.width * am.element_size()))
    to_hidden = p.d > 0 and len(chunks) > 0 and (needs[0] or needs[1])
    make = torch.empty_like if to_hidden else torch.zeros_like
    dam, dlm, dweight = make(p.am), make(p.lm), None
    blocks_of = [p.blocks(end - first) for first, end in chunks]
    sum_dtype = torch.float64 if weight.dtype is torch.float32 else torch.float32
    parts = torch.empty(sum(blocks_of), outputs, dtype=sum_dtype, device=am.device)
    dbias, of_bias = weight.new_empty(0), None
    if bias is not None:
        of_bias = (parts, bias.new_empty(outputs)) if needs[3] and len(chunks) else None
        dbias = torch.zeros_like(bias) if of_bias is None else of_bias[1]
    gz = grad_durations.contiguous() if durations else None
    table = torch.empty_like(p.lm, dtype=torch.float32) if len(chunks) > 1 else None  # dlm of several chunks
    # a backward inside autocast would take float32 products in 16 bits
    with torch.autocast(am.device.type, enabled=False):
        for (first, end), blocks, own in zip(chunks, blocks_of, parts.split(blocks_of), strict=True):
            hidden, count = p.hidden(first, end) if kept is None else kept[first:end], end - first
            last = (first, end) == chunks[-1]
            dlogits = weight.new_empty(count, stride)
            launch(logits_gradient_kernel, (blocks * cdiv(p.v, p.logits_gradient["BLOCK_N"]),),
                hidden, p.padded, p.bias, *p.band, gx, gy, normaliser, dlogits, own,
                *p.sizes(first, end), p.width, p.v, outputs, stride, blank, HAT=hat, **p.logits_gradient,
            )  # fmt: skip
            if durations:
                p.launch_durations(hidden, first, end, None, gz, dlogits, own)
            if needs[2]:
                product = (torch.mm if len(chunks) == 1 else _product)(dlogits.t(), hidden[:, : p.d])
                if dweight is not None:
                    product = torch.add(
                        dweight, product, out=weight.new_empty(product.shape) if last else dweight
                    )
                dweight = product
            if to_hidden:
                dhidden = multiply(dlogits, output_weight)
                before, after = table if first else None, dlm if last else table
                _hidden_gradient(p, dhidden, first, end, dam, before, after, of_bias if last else None)
    dweight = torch.zeros_like(weight) if dweight is None else dweight[:outputs]
    if of_bias is not None and not to_hidden:
        add_parts(parts, dbias)
    return dam, dlm, dweight, dbias


def _hidden_gradient(p: _Plan, dhidden, first: int, end: int, dam, before, dlm, of_bias) -> None:
    """Writes dam and dlm of a chunk, dlm of contexts plus ``before``. ``of_bias``: (parts, their sum), or None."""
    sizes = *p.sizes(first, end), p.d
    tile = SHORT_FRAME if p.s_range <= SHORT else FRAME
    grid = (end - first) // p.s_range * cdiv(p.d, tile["BLOCK_C"])
    precise = p.am.dtype is torch.float32
    launch(frame_gradient_kernel, (grid,),
        p.am, p.lm, *p.band, p.seed, dhidden, dam, *sizes, *p.dropout,
        ACTIVATION=p.activation, PRECISE=precise, **tile,
    )  # fmt: skip
    programs = p.batch * (p.length + 1) * cdiv(p.d, CONTEXT["BLOCK_C"])
    parts, dbias, count, more = None, None, 0, 0
    if of_bias is not None:
        parts, dbias = of_bias
        count, more = len(parts), cdiv(len(dbias), CONTEXT["BLOCK_V"])
    launch(context_gradient_kernel, (programs + more,),
        p.band[0], dhidden, before, dlm, parts, dbias, *sizes, programs, count, len(p.weight), **CONTEXT,
    )  # fmt: skip
