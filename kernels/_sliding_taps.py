# SPDX-License-Identifier: Apache-2.0
"""Sums over the taps of a depthwise convolution along time, and the gradients of its taps, from registers.

    sums        y[t + r] = sum_(k < K) w[k] x[t + r + k]     for GROUP frames, r < GROUP
    gradients   dw[k + n] = sum_t g[t] x[t + k + n - P]      for TAPS taps, n < TAPS, of COLUMNS columns of a map

A thread loads each frame of its channels once, converts it once, and multiplies it with GROUP taps, or with the
gradients of TAPS frames. What the next frame meets again stays in registers. Code is written out for GROUP or TAPS
frames at a time, after which each value is in the variable that it began in, so that little is moved. A thread has few
channels and many frames, so that loads, conversions and addresses are few beside the products: for 31 taps of bfloat16
on sm_90, two of three instructions of `sums` and seven of ten of the loop over frames of gradients are products.

Kernels pass data to each other in tiles, (tiles, sequences, frames, BLOCK_C), and the taps in (tiles, taps, BLOCK_C):
the step to the next frame or tap is then a constant, and costs no instruction.

Frames outside a span count as zeros, whatever lies there. No frame is added to a sum that has no tap for it, since 0
times infinity is not 0: the first and the last frames have code of their own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastasr.kernels._column_sums import column_sums
from fastasr.kernels._launch import cdiv, launch, next_power_of_2
from fastasr.kernels._parts import sum_parts
from fastasr.kernels._recordings import group_at
from fastasr.kernels._recordings import groups as groups_of
from fastasr.kernels._vectors import load

MOST_FRAMES = 8  # A group has at most this many: the compiler takes three times as long for 16.
# Keyed by the bytes of an element: in a program that computes gradients, its taps and a thread's sums per channel.
MOST_TAPS, MOST_SUMS = {2: 16, 4: 8}, {2: 28, 4: 21}
LEAST_FRAMES, GOOD_FRAMES = 16, 128  # frames of a segment, which loads TAPS - 1 more
LEAST_PARTS, GOOD_PROGRAMS = 16, 768  # for one launch
BLOCK_G, BLOCK_C, NUM_WARPS = 8, 64, 4  # groups and channels of a tile: four channels per thread
BLOCK_S = 4  # segments of a tile: two channels per thread
# With fewer than FEW taps a loaded frame serves few products: a tile has WIDE segments, a thread eight channels.
FEW, WIDE = 5, 16
MAX_PARTS = 64  # A sum over frames has at most this many parts.


@triton.jit
def _frame(at, there, in_row, PAIRS: tl.constexpr = True):
    keep = there[:, None]
    if in_row is not None:
        keep = keep & in_row[None, :]
    return load(at, tl.broadcast_to(keep, at.shape), PAIRS)


@triton.jit
def groups(program, batch, chunk, before, CHUNKED: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """Returns (sequence, first frames of groups, first frames of their chunks). A group lies in one chunk; ``before``
    frames before the first, which groups that end there cover, have no chunk. Not CHUNKED: all frames are one.
    """
    number = program // batch * BLOCK_G + tl.arange(0, BLOCK_G) - tl.cdiv(before, GROUP)
    if not CHUNKED:
        return program % batch, number * GROUP, tl.zeros_like(number)
    per_chunk = tl.cdiv(chunk, GROUP)
    first = tl.maximum(number, 0) // per_chunk * chunk
    return program % batch, tl.where(number < 0, number * GROUP, first + number % per_chunk * GROUP), first


def group_of(chunk: int, most: int = MOST_FRAMES) -> int:
    """Returns the frames of a group."""
    return min(most, next_power_of_2(chunk))


def group_blocks(frames: int, chunk: int, before: int, group: int, block: int = BLOCK_G) -> int:
    """Returns the blocks of groups of a sequence."""
    number = -(-frames // chunk) * -(-chunk // group) + -(-before // group)
    return -(-number // block)


@triton.jit
def _add_frame(
    z, w, k, X, offset, span, TABLE, in_row, x_step, w_step,
    FIRST: tl.constexpr, END: tl.constexpr, LOADS: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Adds frame k to the sums [FIRST, END), with the weights of tap k where LOADS, and moves the others on."""
    there = (offset + k).to(tl.uint32) < span.to(tl.uint32)
    x = _frame(X + tl.cast(k, tl.int64) * x_step, there, in_row, PAIRS)  # [groups, channels]
    newest = w[GROUP - 1]
    if LOADS:
        keep = None if in_row is None else tl.broadcast_to(in_row[None, :], TABLE.shape)
        newest = tl.load(TABLE + k * w_step, mask=keep)
    moved = (newest,)
    moved += w[: GROUP - 1]
    added = ()
    for r in tl.static_range(GROUP):
        if r >= FIRST and r < END:
            added += (tl.fma(x, moved[r], z[r]),)
        else:
            added += (z[r],)
    return added, moved


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns a tuple of COUNT tensors."""
    return (tl.zeros([BLOCK_G, BLOCK_C], tl.float32),) * COUNT


@triton.jit
def _added(a, b, COUNT: tl.constexpr):
    """Returns the sums of two tuples' tensors."""
    found = ()
    for n in tl.static_range(COUNT):
        found += (a[n] + b[n],)
    return found


@triton.jit
def _pairwise(values, COUNT: tl.constexpr):
    """Returns the sum of a tuple's COUNT <= 8 tensors, each of which is rounded three times."""
    for level in tl.static_range(3):
        found = ()
        for n in tl.static_range(COUNT):
            if n % (2 << level) == 0 and n + (1 << level) < COUNT:
                found += (values[n] + values[n + (1 << level)],)
            else:
                found += (values[n],)
        values = found
    return values[0]


@triton.jit
def _stacked(values, COUNT: tl.constexpr, STACKED: tl.constexpr):
    """Returns a tuple's COUNT tensors along a last dimension of STACKED, a power of 2, so that one pass through shared
    memory adds up the rows of all of them.
    """
    rows: tl.constexpr = values[0].shape[0]
    columns: tl.constexpr = values[0].shape[1]
    stacked = ()
    for n in tl.static_range(STACKED):
        stacked += (values[n if n < COUNT else 0],)
    for level in tl.static_range(5):
        found = ()
        for n in tl.static_range(STACKED >> (level + 1)):
            found += (tl.join(stacked[n], stacked[n + (STACKED >> (level + 1))]),)
        if STACKED >> (level + 1):
            stacked = found
    return tl.reshape(stacked[0], [rows, columns, STACKED])


@triton.jit
def taps_at(TABLE, row, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns where a row of a tile's taps lies, for each group: one row of them would be laid out anew in shared
    memory.
    """
    return TABLE + tl.broadcast_to((row * BLOCK_C + tl.arange(0, BLOCK_C))[None, :], [BLOCK_G, BLOCK_C])


@triton.jit
def sums(
    z, X, offset, span, TABLE, in_row, x_step, w_step, TAPS: tl.constexpr, GROUP: tl.constexpr,
    UNROLLED: tl.constexpr = False, PAIRS: tl.constexpr = True,
):  # fmt: skip
    """Returns the tuple z with the sums of groups added. Their first tap meets the frames ``offset`` of [0, span),
    which lie at X [groups, channels]; its weights lie at TABLE, in float32 and of the same shape. A step goes to the
    next frame, or the next tap's weights. UNROLLED: without a loop, at whose end weights move to the registers that it
    began with. PAIRS: as in ``load``.
    """
    w = z
    if UNROLLED:
        for k in tl.static_range(TAPS + GROUP - 1):
            z, w = _add_frame(
                z, w, k, X, offset, span, TABLE, in_row, x_step, w_step,
                max(0, k - TAPS + 1), min(GROUP, k + 1), k < TAPS, GROUP, PAIRS,
            )  # fmt: skip
        return z
    HEAD: tl.constexpr = GROUP if TAPS >= GROUP else 0
    TAIL: tl.constexpr = TAPS % GROUP
    for n in tl.static_range(HEAD):
        z, w = _add_frame(
            z, w, n, X, offset, span, TABLE, in_row, x_step, w_step, 0, n + 1, True, GROUP, PAIRS
        )
    if TAPS >= 2 * GROUP:
        for k in range(GROUP, TAPS - TAIL, GROUP):
            for n in tl.static_range(GROUP):
                z, w = _add_frame(
                    z, w, k + n, X, offset, span, TABLE, in_row, x_step, w_step, 0, GROUP, True, GROUP, PAIRS
                )
    for n in tl.static_range(TAIL + GROUP - 1):
        z, w = _add_frame(
            z, w, TAPS - TAIL + n, X, offset, span, TABLE, in_row, x_step, w_step,
            n - TAIL + 1, GROUP if HEAD else n + 1, n < TAIL, GROUP, PAIRS,
        )  # fmt: skip
    return z


@triton.jit
def _add_products(g, sums, windows, x, COLUMN: tl.constexpr, TAPS: tl.constexpr):
    """Adds the products of g with a column's frames, the newest of which is x. Returns the sums and the windows."""
    window = windows[COLUMN * (TAPS - 1) : (COLUMN + 1) * (TAPS - 1)]
    window += (x,)
    added = sums[: COLUMN * TAPS]
    for n in tl.static_range(TAPS):
        added += (tl.fma(g, window[n], sums[COLUMN * TAPS + n]),)
    added += sums[(COLUMN + 1) * TAPS :]
    windows = windows[: COLUMN * (TAPS - 1)] + window[1:] + windows[(COLUMN + 1) * (TAPS - 1) :]
    return added, windows


@triton.jit(
    do_not_specialize=[
        *("frames", "batch", "chunk", "pad", "shift", "width", "x_width", "columns", "pad_f"),
        *("length", "groups", "per_part", "count", "row", "sum_row", "rows"),
    ]
)
def gradient_kernel(
    G, X, PARTS, GROUPS, g_tile, g_batch, g_time, x_tile, x_batch, x_time, frames, batch, C, chunk, pad, shift, width,
    x_width, columns, pad_f, length, groups, per_part, count, row, sum_row, rows,
    G_STEP: tl.constexpr, X_STEP: tl.constexpr, PIXEL: tl.constexpr, EARLY: tl.constexpr, CHUNKED: tl.constexpr,
    FEW_TAPS: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the rows ``sum_row`` (sum of G) and row + k columns + j (tap k < count of column j) of a part's ``rows``
    rows. A frame has ``width`` pixels of C channels in G, ``x_width`` in X, and tap 0 of column 0 meets the frame
    ``pad`` and the pixel ``pad_f`` earlier. X has ``shift`` frames more before the first. Steps lead to the next tile
    of channels, sequence and frame; that of a frame is G_STEP or X_STEP where that is not 0. PIXEL leads to X's next
    pixel where COLUMNS > 1. EARLY: ``pad`` is at least TAPS, so that the newest frames may lie before the first one.
    FEW_TAPS: pairs and stacks would take registers from resident programs, which wait for memory.

    A part is of ``per_part`` segments. A segment is ``length`` frames of one pixel of a chunk of a sequence. CHUNKED:
    taps meet frames of the chunk alone, else all that X has. With GROUPS (see _recordings.py) these are the segments,
    and taps meet frames of the recording alone.
    """
    c_tiles = tl.cdiv(C, BLOCK_C)
    tap_groups, column_groups = tl.cdiv(count, TAPS), tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    tile = program % c_tiles
    k = program // c_tiles % tap_groups * TAPS
    j = program // (c_tiles * tap_groups) % column_groups * COLUMNS
    part = program // (c_tiles * tap_groups * column_groups)
    lane = tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + lane
    in_row = c < C
    zero = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    # summed in float32, the bias' gradient of few frames would be less exact than eager's
    PRECISE: tl.constexpr = G.dtype.element_ty == tl.float32
    total = zero.to(tl.float64 if PRECISE else tl.float32)
    sums = zeros(TAPS * COLUMNS, BLOCK_G, BLOCK_C)
    totals = sums
    g_step = G_STEP if G_STEP else tl.cast(g_time, tl.int64)  # 1 is a constant, which has no ``to``
    x_step = X_STEP if X_STEP else tl.cast(x_time, tl.int64)
    g_first = G + tl.cast(tile, tl.int64) * g_tile
    x_first = X + tl.cast(tile, tl.int64) * x_tile
    per_chunk = tl.cdiv(chunk, length)
    per_sequence = tl.cdiv(frames, chunk) * per_chunk if GROUPS is None else groups
    for block in range(0, per_part, BLOCK_G):
        segment = part * per_part + block + tl.arange(0, BLOCK_G)
        f, here = segment % width, segment // width
        b, here = here // per_sequence, here % per_sequence
        if GROUPS is None:
            first = here // per_chunk * chunk
            t = first + here % per_chunk * length
            begin, end = -shift, frames
        else:
            t, begin, end = group_at(GROUPS, groups, here, frames)
            first = begin + (t - begin) // chunk * chunk
        last = tl.minimum(first + chunk, end)
        there = b < batch
        left = tl.where(there, tl.minimum(length, last - t), 0)
        here = b.to(tl.int64) * g_batch + t.to(tl.int64) * g_step + f.to(tl.int64) * C
        at = g_first + (here[:, None] + lane[None, :])
        pixel = f + j - pad_f
        here = b.to(tl.int64) * x_batch + (t + k + shift - pad).to(tl.int64) * x_step + pixel.to(tl.int64) * C
        x_at = x_first + (here[:, None] + lane[None, :])
        offset = t + k - pad - (first if CHUNKED else begin)
        span = tl.where(there, last - first if CHUNKED else end - begin, 0)
        windows = ()
        for m in tl.static_range(COLUMNS):
            seen = tl.where((pixel + m).to(tl.uint32) < x_width.to(tl.uint32), span, 0)
            for n in tl.static_range(TAPS - 1):
                there = (offset + n).to(tl.uint32) < seen.to(tl.uint32)
                windows += (_frame(x_at + (n * x_step + m * PIXEL), there, in_row, not FEW_TAPS),)
        x_at += (TAPS - 1) * x_step
        offset += TAPS - 1
        behind = tl.where(span > 0, span - offset, 0)  # frames from the newest on
        for _ in range(0, length, TAPS):
            grads = ()
            for n in tl.static_range(TAPS):
                g = _frame(at, left > n, in_row, not FEW_TAPS)
                if PRECISE:
                    grads += (g,)
                else:
                    total += g
                for m in tl.static_range(COLUMNS):
                    inside = (pixel + m).to(tl.uint32) < x_width.to(tl.uint32)
                    if EARLY:
                        there = (offset + n).to(tl.uint32) < tl.where(inside, span, 0).to(tl.uint32)
                    else:
                        there = tl.where(inside, behind, 0) > n
                    x = _frame(x_at + m * PIXEL, there, in_row, not FEW_TAPS)
                    sums, windows = _add_products(g, sums, windows, x, m, TAPS)
                at += g_step
                x_at += x_step
            left -= TAPS
            behind -= TAPS
            offset += TAPS
            if PRECISE:  # one chain of additions through all frames would round more than torch does
                total += _pairwise(grads, TAPS).to(tl.float64)
                totals = _added(totals, sums, TAPS * COLUMNS)
                sums = zeros(TAPS * COLUMNS, BLOCK_G, BLOCK_C)
    at = PARTS + (part * rows).to(tl.int64) * C + c
    if (k == 0) & (j == 0):
        tl.store(at + sum_row * C, column_sums(total).to(PARTS.dtype.element_ty), mask=in_row)
    STACKED: tl.constexpr = 1 if FEW_TAPS else triton.next_power_of_2(TAPS)
    for m in tl.static_range(COLUMNS):
        for first in tl.static_range(0, TAPS, STACKED):
            found = (totals if PRECISE else sums)[m * TAPS + first : m * TAPS + min(first + STACKED, TAPS)]
            n = first + tl.arange(0, STACKED)
            here = (row + (k + n) * columns + j + m) * C
            keep = in_row[:, None] & ((n < TAPS) & (k + n < count) & (j + m < columns))[None, :]
            found = _stacked(found, min(STACKED, TAPS - first), STACKED)
            found = column_sums(tl.reshape(found, [BLOCK_G, BLOCK_C * STACKED]))
            tl.store(at[:, None] + here[None, :], tl.reshape(found, [BLOCK_C, STACKED]), mask=keep)


def shares(count: int, most: int) -> int:
    """Returns the size of the equal shares, of at most ``most`` each, that ``count`` things fall into."""
    return cdiv(count, cdiv(count, most))


class Map(NamedTuple):
    """The pixels of a frame of g and of x, the columns of taps, and how far left the first of them looks."""

    width: int = 1
    x_width: int = 1
    columns: int = 1
    pad: int = 0


LINE = Map()  # frames of one pixel


class Segments:
    """How the frames of sequences in chunks are shared among at most ``most`` parts, for gradients of ``count`` taps of
    ``others`` tiles of channels or groups of columns. With ``starts`` chunks begin with recordings.
    """

    def __init__(
        self,
        frames: int,
        sequences: int,
        chunk: int,
        count: int,
        others: int,
        most: int,
        dtype: torch.dtype,
        starts: torch.Tensor | None = None,
    ):
        self.frames, self.chunk, self.count = frames, chunk, count
        self.bytes = dtype.itemsize
        self.taps, self.block = shares(count, MOST_TAPS[self.bytes]), WIDE if count < FEW else BLOCK_S
        most = min(most, max(LEAST_PARTS, GOOD_PROGRAMS // (cdiv(count, self.taps) * others)))
        chunks = sequences * cdiv(frames, chunk)
        wanted = max(1, most * self.block // chunks)  # segments of a chunk
        length = max(min(LEAST_FRAMES, chunk), min(GOOD_FRAMES, cdiv(chunk, wanted)))
        self.length = cdiv(length, self.taps) * self.taps
        segments = chunks * cdiv(chunk, self.length)
        self.groups, self.per_sequence = None, 0
        if starts is not None:
            self.groups = groups_of(starts, frames, chunk, self.length)
            self.per_sequence = self.groups.shape[1]
            segments = sequences * self.per_sequence
        self.per_part = cdiv(cdiv(segments, self.block), most) * self.block
        self.parts = cdiv(segments, self.per_part)

    def form(self, shape: Map) -> dict[str, int]:
        """Returns the constants of the kernel that depend on the taps."""
        columns = shares(shape.columns, max(1, MOST_SUMS[self.bytes] // self.taps))
        form = {"FEW_TAPS": self.count < FEW, "TAPS": self.taps, "COLUMNS": columns}
        return form | {"BLOCK_G": self.block, "BLOCK_C": BLOCK_C}


class Steps(NamedTuple):
    """The steps to the next tile of channels, sequence and frame. FRAME is the last one where it is a constant."""

    tile: int
    sequence: int
    frame: int
    FRAME: int = 0


def tiles(batch: int, frames: int, channels: int, like: torch.Tensor) -> tuple[torch.Tensor, Steps]:
    """Returns a tensor of tiles with the dtype and device of ``like``, and its steps."""
    table = like.new_empty(cdiv(channels, BLOCK_C), batch, frames, BLOCK_C)
    return table, Steps(*table.stride()[:3], BLOCK_C)


def gradients(
    g, x, table, segments: Segments, g_steps: Steps, x_steps: Steps, batch: int, channels: int,
    pad: int, shift: int, row: int, sum_row: int, chunked: bool, shape: Map = LINE,
) -> None:  # fmt: skip
    """Writes rows of ``table`` (parts, rows, C), see ``gradient_kernel``."""
    form = segments.form(shape)
    programs = cdiv(segments.count, segments.taps) * cdiv(shape.columns, form["COLUMNS"])
    launch(gradient_kernel, (segments.parts * programs * cdiv(channels, BLOCK_C),),
        g, x, table, segments.groups, *g_steps[:3], *x_steps[:3], segments.frames, batch, channels, segments.chunk,
        pad, shift, *shape, segments.length, segments.per_sequence, segments.per_part, segments.count, row, sum_row,
        table.shape[1],
        G_STEP=g_steps.FRAME, X_STEP=x_steps.FRAME, PIXEL=channels if form["COLUMNS"] > 1 else 0,
        EARLY=pad >= form["TAPS"], CHUNKED=chunked, **form, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def lay_out(SOURCE, TABLE, row, rows, taps, C, pid, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Copies SOURCE (C, taps) to the rows of TABLE (tiles, rows, BLOCK_C) from ``row`` on."""
    tile = pid % tl.cdiv(C, BLOCK_C)
    k = pid // tl.cdiv(C, BLOCK_C) * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + lane
    keep = (k < taps)[:, None] & (c < C)[None, :]
    w = tl.load(SOURCE + c[None, :] * taps + k[:, None], mask=keep, other=0.0)  # [BLOCK_K, BLOCK_C]
    at = TABLE + (tile * rows + row + k)[:, None] * BLOCK_C + lane[None, :]
    tl.store(at, w.to(TABLE.dtype.element_ty), mask=(k < taps)[:, None])


@triton.jit
def in_tiles(tile, batch, b, frames, t, lane, BLOCK_C: tl.constexpr):
    """Returns the offsets of frames t of sequences b in tiles."""
    return ((tile * batch + b).to(tl.int64) * frames + t)[:, None] * BLOCK_C + lane[None, :]


@triton.jit
def _store_column(POINTER, total, c, C, columns, column):
    at = POINTER + c.to(tl.int64) * columns + column
    tl.store(at, total.to(POINTER.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["parts", "causal_parts", "taps", "skip"])
def add_taps_kernel(
    PARTS, DWEIGHT, DBIAS, DCAUSAL_WEIGHT, DCAUSAL_BIAS, parts, causal_parts, C, taps, skip,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Rows of a part: dbias, dweight (K), and in chunk-causal form dcausal_bias, dcausal_weight (P + 1). The first and
    # last ``skip`` taps of dweight have no rows: no frame of a chunk meets them.
    pid = tl.program_id(0)
    c_tiles = tl.cdiv(C, BLOCK_C)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // c_tiles
    rows = tl.num_programs(0) // c_tiles
    p = tl.arange(0, BLOCK_P)
    there = tl.where(row > taps, causal_parts, parts)
    there = tl.where((row > 0) & (row <= skip) | (row > taps - skip) & (row <= taps), 0, there)
    keep = (p < there)[:, None] & (c < C)[None, :]
    total = sum_parts(PARTS + (p[:, None] * rows + row) * C + c[None, :], keep)
    if row == 0:
        if DBIAS is not None:
            _store_column(DBIAS, total, c, C, 1, 0)
    elif row <= taps:
        _store_column(DWEIGHT, total, c, C, taps, row - 1)
    elif row == taps + 1:
        if DCAUSAL_BIAS is not None:
            _store_column(DCAUSAL_BIAS, total, c, C, 1, 0)
    else:
        if DCAUSAL_WEIGHT is not None:
            _store_column(DCAUSAL_WEIGHT, total, c, C, taps // 2 + 1, row - taps - 2)
