# SPDX-License-Identifier: Apache-2.0
"""Sums over the taps of a depthwise convolution along time, and the gradients of its taps, from registers.

    sums        y[t + r] = sum_(k < K) w[k] x[t + r + k]     for GROUP frames, r < GROUP
    gradients   dw[k + n] = sum_t g[t] x[t + k + n - P]      for TAPS taps, n < TAPS

A thread loads each frame of its channels once, 128 bits at a time, converts it once, and multiplies it with GROUP taps,
or with the gradients of TAPS frames. What the next frame meets again stays in registers. Loops go GROUP or TAPS frames
at a time, after which each value is in the variable that it began in, so that nothing is moved.

Frames outside a span count as zeros, whatever lies there. No frame is added to a sum that has no tap for it, since 0
times infinity is not 0: the first and the last frames have code of their own.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import generation, launch

GROUP = tl.constexpr(4)  # 32 sums of 8 channels per thread
TAPS = tl.constexpr(8)  # 64 sums per thread
LEAST_FRAMES = 16  # of a segment, which loads TAPS - 1 more
BLOCK_G, BLOCK_S, BLOCK_C, NUM_WARPS = 16, 16, 64, 4  # groups or segments, and channels, of a tile


@triton.jit
def _frame(at, offset, span, in_row):
    keep = (offset.to(tl.uint32) < span.to(tl.uint32))[:, None] & in_row[None, :]
    return tl.load(at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def groups(program, batch, chunk, before, BLOCK_G: tl.constexpr):
    """Returns (sequence, first frames of groups, first frames of their chunks). A group lies in one chunk; ``before``
    frames before the first, which groups that end there cover, have no chunk.
    """
    number = program // batch * BLOCK_G + tl.arange(0, BLOCK_G) - tl.cdiv(before, GROUP)
    per_chunk = tl.cdiv(chunk, GROUP)
    first = tl.maximum(number, 0) // per_chunk * chunk
    return program % batch, tl.where(number < 0, number * GROUP, first + number % per_chunk * GROUP), first


def group_blocks(frames: int, chunk: int, before: int, block: int) -> int:
    """Returns the blocks of groups of a sequence."""
    number = -(-frames // chunk) * -(-chunk // GROUP.value) + -(-before // GROUP.value)
    return -(-number // block)


def remainder(taps: int) -> tuple[int, bool]:
    """Returns (TAIL, FEW) of ``sums``."""
    return taps % GROUP.value, taps < GROUP.value


@triton.jit
def _add_frame(
    sums, weights, k, X, offset, span, TABLE, in_row, x_step, w_step,
    FIRST: tl.constexpr, END: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """Adds frame k to the sums [FIRST, END), with the weights of tap k where LOADS, and moves the others on."""
    z0, z1, z2, z3 = sums
    w1, w2, w3 = weights
    x = _frame(X + k * x_step, offset + k, span, in_row)  # [groups, channels]
    w0 = w3
    if LOADS:  # of this shape, as a row of them would be laid out anew in shared memory
        keep = tl.broadcast_to(in_row[None, :], TABLE.shape)
        w0 = tl.load(TABLE + k * w_step, mask=keep, other=0.0)
    if FIRST <= 0:
        z0 = tl.fma(x, w0, z0)
    if FIRST <= 1 and END > 1:
        z1 = tl.fma(x, w1, z1)
    if FIRST <= 2 and END > 2:
        z2 = tl.fma(x, w2, z2)
    if FIRST <= 3 and END > 3:
        z3 = tl.fma(x, w3, z3)
    return (z0, z1, z2, z3), (w0, w1, w2)


@triton.jit
def sums(
    X, offset, span, TABLE, taps, in_row, x_step, w_step,
    TAIL: tl.constexpr, FEW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Returns the sums of groups, as a tuple. Their first tap meets the frames ``offset`` of [0, span), which lie at X
    [groups, channels]; its weights lie at TABLE, of the same shape. A step goes to the next frame, or the next tap's
    weights. TAIL is the remainder of ``taps`` by GROUP, FEW says that it is ``taps``.
    """
    zero = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    z, w = (zero, zero, zero, zero), (zero, zero, zero)
    if not FEW:
        for n in tl.static_range(GROUP):
            z, w = _add_frame(z, w, n, X, offset, span, TABLE, in_row, x_step, w_step, 0, n + 1, True)
        for k in range(GROUP, taps - TAIL, GROUP):
            for n in tl.static_range(GROUP):
                z, w = _add_frame(z, w, k + n, X, offset, span, TABLE, in_row, x_step, w_step, 0, GROUP, True)
    for n in tl.static_range(TAIL + GROUP - 1):
        z, w = _add_frame(
            z, w, taps - TAIL + n, X, offset, span, TABLE, in_row, x_step, w_step,
            n - TAIL + 1, n + 1 if FEW else GROUP, n < TAIL,
        )  # fmt: skip
    return z


@triton.jit(
    do_not_specialize=[
        *("frames", "batch", "chunk", "pad", "shift", "length", "per_part", "count", "row", "rows")
    ]
)
def gradient_kernel(
    G, X, PARTS, time_step, batch_step, frames, batch, C, chunk, pad, shift, length, per_part, count, row, rows,
    CHUNKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the rows ``row`` (sum of G) and row + 1 + k (tap k < count) of a part's ``rows`` rows. X has the steps of
    G, and ``shift`` frames more before the first.

    A part is of ``per_part`` segments. A segment is ``length`` frames, a multiple of TAPS, of a chunk of a sequence.
    CHUNKED: taps meet frames of the chunk alone, else all that X has.
    """
    c_tiles, tap_groups = tl.cdiv(C, BLOCK_C), tl.cdiv(count, TAPS)
    program = tl.program_id(0)
    c = program % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    k = program // c_tiles % tap_groups * TAPS
    part = program // (c_tiles * tap_groups)
    in_row = c < C
    zero = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    # in float32 the bias' gradient of few frames would else be less exact than eager's
    total = zero.to(tl.float64 if G.dtype.element_ty == tl.float32 else tl.float32)
    t0, t1, t2, t3, t4, t5, t6, t7 = zero, zero, zero, zero, zero, zero, zero, zero
    step = tl.cast(time_step, tl.int64)  # a number that is 1 is a constant, which has no ``to``
    per_chunk = tl.cdiv(chunk, length)
    per_sequence = tl.cdiv(frames, chunk) * per_chunk
    for block in range(0, per_part, BLOCK_S):
        segment = part * per_part + block + tl.arange(0, BLOCK_S)
        b, here = segment // per_sequence, segment % per_sequence
        first = here // per_chunk * chunk
        t = first + here % per_chunk * length
        last = tl.minimum(first + chunk, frames)
        there = b < batch
        left = tl.where(there, tl.minimum(length, last - t), 0)
        at = t[:, None].to(tl.int64) * step + (b[:, None].to(tl.int64) * batch_step + c[None, :])
        x_at = X + (at + (k + shift - pad) * step)
        at = G + at
        offset = t + k - pad - first if CHUNKED else t + k - pad + shift
        span = tl.where(there, last - first if CHUNKED else frames + shift, 0)
        x0 = _frame(x_at, offset, span, in_row)
        x1 = _frame(x_at + step, offset + 1, span, in_row)
        x2 = _frame(x_at + 2 * step, offset + 2, span, in_row)
        x3 = _frame(x_at + 3 * step, offset + 3, span, in_row)
        x4 = _frame(x_at + 4 * step, offset + 4, span, in_row)
        x5 = _frame(x_at + 5 * step, offset + 5, span, in_row)
        x6 = _frame(x_at + 6 * step, offset + 6, span, in_row)
        x_at += 7 * step
        offset += 7
        for i in range(0, length, TAPS):
            for n in tl.static_range(TAPS):
                g = _frame(at, tl.full([BLOCK_S], i + n, tl.int32), left, in_row)
                x7 = _frame(x_at, offset, span, in_row)
                total += g.to(total.dtype)
                t0 = tl.fma(g, x0, t0)
                t1 = tl.fma(g, x1, t1)
                t2 = tl.fma(g, x2, t2)
                t3 = tl.fma(g, x3, t3)
                t4 = tl.fma(g, x4, t4)
                t5 = tl.fma(g, x5, t5)
                t6 = tl.fma(g, x6, t6)
                t7 = tl.fma(g, x7, t7)
                x0, x1, x2, x3, x4, x5, x6 = x1, x2, x3, x4, x5, x6, x7
                at += step
                x_at += step
                offset += 1
    at = PARTS + (part * rows + row).to(tl.int64) * C + c
    if k == 0:
        tl.store(at, tl.sum(total, axis=0).to(PARTS.dtype.element_ty), mask=in_row)
    at += (k + 1) * C
    tl.store(at, tl.sum(t0, axis=0), mask=in_row)
    tl.store(at + C, tl.sum(t1, axis=0), mask=in_row & (k + 1 < count))
    tl.store(at + 2 * C, tl.sum(t2, axis=0), mask=in_row & (k + 2 < count))
    tl.store(at + 3 * C, tl.sum(t3, axis=0), mask=in_row & (k + 3 < count))
    tl.store(at + 4 * C, tl.sum(t4, axis=0), mask=in_row & (k + 4 < count))
    tl.store(at + 5 * C, tl.sum(t5, axis=0), mask=in_row & (k + 5 < count))
    tl.store(at + 6 * C, tl.sum(t6, axis=0), mask=in_row & (k + 6 < count))
    tl.store(at + 7 * C, tl.sum(t7, axis=0), mask=in_row & (k + 7 < count))


class Segments:
    """How the frames of sequences in chunks are shared among at most ``most`` parts."""

    def __init__(self, frames: int, batch: int, chunk: int, most: int):
        wanted = max(1, most * BLOCK_S // (batch * -(-frames // chunk)))  # segments per chunk
        length = max(min(LEAST_FRAMES, chunk), -(-chunk // wanted))
        self.length = -(-length // TAPS.value) * TAPS.value
        segments = batch * -(-frames // chunk) * -(-chunk // self.length)
        blocks = -(-segments // BLOCK_S)
        self.per_part = -(-blocks // most) * BLOCK_S
        self.parts = -(-segments // self.per_part)


def segment_block(dtype: torch.dtype, generation: int) -> int:
    """Returns the segments that a program takes at once. With more of them, some spill."""
    return BLOCK_S // 2 if dtype == torch.float32 or generation == 120 else BLOCK_S


def gradients(g, x, table, segments: Segments, steps, sizes, pad, shift, count, row, chunked: bool) -> None:
    """Writes rows of ``table`` (parts, rows, C), see ``gradient_kernel``. ``steps`` lead to the next frame and the next
    sequence; ``sizes`` are (frames, batch, C, chunk).
    """
    grid = segments.parts * triton.cdiv(count, TAPS.value) * triton.cdiv(sizes[2], BLOCK_C)
    launch(gradient_kernel, (grid,),
        g, x, table, *steps, *sizes, pad, shift, segments.length, segments.per_part, count, row, table.shape[1],
        CHUNKED=chunked, BLOCK_S=segment_block(g.dtype, generation(g)), BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
