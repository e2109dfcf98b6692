# SPDX-License-Identifier: Apache-2.0
"""Pieces of attention with relative positions: scores of a tile, its masks, the layout of operands.

Scores are s[i, j] = q[i] . k[j] + p[i] . R[T - 1 - i + j]: the row of R moves by one along either side of a tile. With
recordings in a row, R has 2 L - 1 rows, L in place of T, and frames L or more apart do not see each other. Where
a row has four numbers of 16 bits (PACKED), one 64-bit load reads it and registers unpack it; any other R is read by
channel. Both ways need R separated by head, so the launcher copies it, between margins: pairs of a tile that have no
row read those, and the kernels discard their scores later.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastasr._tables import table
from fastasr.kernels._attention_tiles import NONE, load_rows, products
from fastasr.kernels._launch import next_power_of_2
from fastasr.kernels._recordings import ORDER, bounds
from fastasr.kernels._special import INTERPRETED

MASKED = tl.constexpr(-1000.0)
ALONE = tl.constexpr(-896.0)  # above it, masked keys weigh exactly 0
MARGIN = tl.constexpr(544)  # rows before and behind R: at least the queries and keys of a tile, 16 + 512


@triton.jit
def place(program, blocks, batch):
    """Returns (head, sequence, block) of a program."""
    pair = program // blocks
    return (pair // batch).to(tl.int64), (pair % batch).to(tl.int64), program % blocks


@triton.jit
def dealt(program, blocks, batch, BOUNDS, frames, BLOCK: tl.constexpr):
    """Returns the same. With recordings in a row, the programs of all heads follow block by block, those of the longest
    recordings first: who has much to do begins early, and the last ones end together. All blocks have programs.
    """
    if BOUNDS is not None:
        pairs = tl.num_programs(0) // blocks
        program = program % pairs * blocks + program // pairs
    head, sequence, block = place(program, blocks, batch)
    if BOUNDS is not None and BLOCK <= ORDER:
        EACH: tl.constexpr = ORDER // BLOCK
        block = tl.load(BOUNDS + 2 * frames + block // EACH) * EACH + block % EACH
    return head, sequence, block


@triton.jit
def window(i, frames, left, keys, offsets, chunk, left_chunks, BOUNDS, WINDOW: tl.constexpr):
    """Returns [low, high), [first, end): the keys of the recordings of frames i that R reaches, and the keys in their
    chunk windows; frames behind the last one see what it sees. Nothing reads the former where BOUNDS, (2, frames), is
    None, the latter without WINDOW.
    """
    low, high = i, i
    first, end = i, i
    if BOUNDS is not None:
        i = tl.minimum(i, frames - 1)
        begun, ended = tl.load(BOUNDS + i), tl.load(BOUNDS + frames + i)
        low, high = tl.maximum(begun, i - offsets // 2), tl.minimum(ended, i + offsets // 2 + 1)
        if WINDOW:  # chunks count from the recording's first frame
            number = (i - begun) // chunk
            first = tl.where(left_chunks < 0, low, tl.maximum(begun + (number - left_chunks) * chunk, low))
            end = tl.minimum(begun + (number + 1) * chunk, high)
    elif WINDOW:
        number = tl.minimum(i, frames - 1) // chunk
        first = tl.where(left_chunks < 0, 0, left + (number - left_chunks) * chunk)
        first, end = tl.maximum(first, 0), tl.minimum(left + (number + 1) * chunk, keys)
    return low, high, first, end


@triton.jit
def keys_seen(masks, keys, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Returns [begin, end) of the keys in the windows of any of a tile's queries; begin is a multiple of BLOCK."""
    _padding, _mask, BOUNDS, _low, _high, first, last = masks
    begin, end = 0, keys
    if WINDOW and BOUNDS is None:
        begin, end = tl.min(first) // BLOCK * BLOCK, tl.max(last)
    elif WINDOW:
        begin, end = _around(first, last, keys, BLOCK)
    elif BOUNDS is not None:
        begin, end = keys_reached(masks, keys, BLOCK)
    return begin, end


@triton.jit
def keys_reached(masks, keys, BLOCK: tl.constexpr):
    """Returns the same of the keys that may have weight, outside the chunk windows too."""
    _padding, _mask, BOUNDS, low, high, _first, _last = masks
    begin, end = 0, keys
    if BOUNDS is not None:
        begin, end = _around(low, high, keys, BLOCK)
    return begin, end


@triton.jit
def _around(first, end, keys, BLOCK: tl.constexpr):
    """Returns the range around the ranges [first, end) that are not empty, (0, 0) without any."""
    some = first < end
    behind = tl.max(tl.where(some, end, 0))
    return tl.minimum(tl.min(tl.where(some, first, keys)), behind) // BLOCK * BLOCK, behind


@triton.jit
def any_alone(maximum, keep, masks):
    """Says whether masked keys have weight in any of a tile's queries."""
    _padding, _mask, BOUNDS, low, high, _first, _last = masks
    if BOUNDS is not None:
        keep = keep & (low < high)
    return tl.min(tl.where(keep, maximum, 0.0)) <= ALONE


@triton.jit
def settled(maximum, total, masks):
    """Returns the maximum and the sum of the rows of a softmax, 0 and 1 for queries outside of all recordings."""
    _padding, _mask, BOUNDS, low, high, _first, _last = masks
    if BOUNDS is not None:
        none = low >= high
        maximum, total = tl.where(none, 0.0, maximum), tl.where(none, 1.0, total)
    return maximum, total


@triton.jit
def _filled(values, fill, i, j, masks, frames, keys, WINDOW: tl.constexpr):
    """Returns values of queries i and keys j, ``fill`` outside of chunk windows and where MASK hides the key."""
    _padding, MASK, _bounds, _low, _high, first, end = masks
    if WINDOW:
        values = tl.where((j[None, :] >= first[:, None]) & (j[None, :] < end[:, None]), values, fill)
    if MASK is not None:
        inside = (i < frames)[:, None] & (j < keys)[None, :]
        hidden = tl.load(MASK + (i.to(tl.int64) * keys)[:, None] + j[None, :], mask=inside, other=0)
        values = tl.where(hidden != 0, fill, values)
    return values


@triton.jit
def in_reach(j, masks):
    """Says which keys j are in the recordings of a tile's queries, where R reaches them, [queries, keys]."""
    _padding, _mask, _bounds, low, high, _first, _last = masks
    return (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])


@triton.jit
def _hidden(PADDING, start, keys, BLOCK_N: tl.constexpr):
    """Says which keys from ``start`` on are padding, or behind the last one, [1, BLOCK_N]."""
    column = tl.arange(0, BLOCK_N)
    return (tl.load(PADDING + start + column, mask=column < keys - start, other=1) != 0)[None, :]


@triton.jit
def masked_slopes(ds, i, start, masks, frames, keys, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the gradients of the scores of queries i and BLOCK_N keys from ``start`` on, 0 where masks hide them."""
    PADDING, _mask, BOUNDS, _low, _high, _first, _end = masks
    j = start + tl.arange(0, BLOCK_N)
    ds = _filled(ds, 0.0, i, j, masks, frames, keys, WINDOW)
    if PADDING is not None:
        ds = tl.where(_hidden(PADDING, start, keys, BLOCK_N), 0.0, ds)
    if BOUNDS is not None:
        ds = tl.where(in_reach(j, masks), ds, 0.0)
    return ds


@triton.jit
def positions_of(R, sequence, r_batch, head, offsets, POS_DIM: tl.constexpr, PACKED: tl.constexpr):
    """Returns a pointer to a head's first row of R."""
    if POS_DIM > 0:
        R += sequence * r_batch + head * (offsets + 2 * MARGIN) * (1 if PACKED else POS_DIM) + MARGIN
    return R


@triton.jit
def rows_of_positions(R, top, start, frames, offsets, BOUNDS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns pointers to the rows of R of a tile's queries, from ``top`` on, and keys, from ``start`` on. Pairs that
    have none point to other rows or to R's margins.

    What a pair adds to the tile's first row is a small constant per thread, which loads add for nothing.
    """
    rows = R
    if R is not None:  # there are position scores
        if BOUNDS is None:
            first = frames - BLOCK_M - top + start
        else:  # a tile without pairs of one recording may be anywhere
            first = tl.maximum(offsets // 2 - (BLOCK_M - 1) - top + start, -(BLOCK_M + BLOCK_N))
            first = tl.minimum(first, offsets)
        # In the width of addresses the compiler sees where a thread meets a row again.
        if R.dtype.element_ty == tl.int64:
            rows = R + first + (BLOCK_M - 1) - tl.arange(0, BLOCK_M).to(tl.int64)
        else:
            rows = R + first + (BLOCK_M - 1 - tl.arange(0, BLOCK_M))
        rows = rows[:, None] + tl.arange(0, BLOCK_N)[None, :]
    return rows


@triton.jit
def _half(bits, ELEMENT: tl.constexpr, HIGH: tl.constexpr):
    """Returns the 16-bit number in the lower or upper half of 32 bits, as float32."""
    if tl.bfloat16 == ELEMENT:
        shifted = (bits & -65536) if HIGH else (bits << 16)
        number = shifted.to(tl.float32, bitcast=True)
    else:
        shifted = (bits >> 16) if HIGH else bits
        number = shifted.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def load_packed(rows, ELEMENT: tl.constexpr):
    """Returns the four 16-bit numbers at pointers to rows of R, as float32.

    The compiler shares out a load among threads in the order of memory, and moves the tile to the threads that need it.
    Assembly loads in these; there a thread meets the same row of R several times, and loads it once.
    """
    if INTERPRETED:
        packed = tl.load(rows)
        low, high = packed.to(tl.int32), (packed >> 32).to(tl.int32)
    else:
        low, high = tl.inline_asm_elementwise(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [rows.to(tl.int64)], dtype=(tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
    return (
        _half(low, ELEMENT, False),
        _half(low, ELEMENT, True),
        _half(high, ELEMENT, False),
        _half(high, ELEMENT, True),
    )


@triton.jit
def load_positions(P, keep, PACKED: tl.constexpr):
    """Returns the four channels of p when PACKED, else zeros. P points at rows, which lie at multiples of 8 bytes then.

    A load with at most one element per thread is done again by each thread that needs it. Triton would not do that with
    a tile of channels, and from version 3.9 on would move the position scores through shared memory instead.
    """
    if PACKED:
        ELEMENT: tl.constexpr = P.dtype.element_ty
        packed = tl.load(P.to(tl.pointer_type(tl.int64)), mask=keep, other=0)
        low, high = packed.to(tl.int32), (packed >> 32).to(tl.int32)
        p0, p1 = _half(low, ELEMENT, False), _half(low, ELEMENT, True)
        p2, p3 = _half(high, ELEMENT, False), _half(high, ELEMENT, True)
    else:
        p0 = tl.zeros(keep.shape, tl.float32)
        p1, p2, p3 = p0, p0, p0
    return p0, p1, p2, p3


@triton.jit
def position_scores(
    scores, P, keep, p0, p1, p2, p3, rows, offsets,
    POS_DIM: tl.constexpr, PACKED: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Returns scores + p . R of the pointers ``rows``. p0 to p3, P and keep have the shape of queries, a row or a
    column."""
    if PACKED:
        r0, r1, r2, r3 = load_packed(rows, ELEMENT)
        scores += tl.fma(p3, r3, tl.fma(p2, r2, tl.fma(p1, r1, p0 * r0)))
    elif POS_DIM > 0:  # a separate sum: one chain with the products would have an error 10 % above eager's
        total = tl.zeros(scores.shape, tl.float32)
        for c in range(POS_DIM):
            p = tl.load(P + c, mask=keep, other=0.0).to(tl.float32)
            total = tl.fma(p, tl.load(rows + c * (offsets + 2 * MARGIN)).to(tl.float32), total)
        # Triton would make a plain addition the start of the products' chain.
        scores = tl.fma(total, 1.0, scores)
    return scores


@triton.jit
def query_key(
    query, Q, i, q_time, keep_i, K, j, k_time, keep_j,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS=None,
):  # fmt: skip
    """Returns the [BLOCK_M, BLOCK_N] products of queries i and keys j. ``query`` holds the queries' rows if they fit a
    block; otherwise they are loaded and BIAS is added.
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DIM <= BLOCK_D:
        key = load_rows(K, j, k_time, tl.arange(0, BLOCK_D), keep_j, DIM)  # [BLOCK_N, BLOCK_D]
        total = tl.dot(query, tl.trans(key), total)
    else:
        total = products(total, Q, i, q_time, keep_i, K, j, k_time, keep_j, DIM, BLOCK_D, BIAS)
    return total


@triton.jit
def raw_scores(
    query, Q, P, K, R, masks, top, start, p0, p1, p2, p3, frames, keys, offsets, q_time, k_time,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns scores of the queries from ``top`` on and the keys from ``start`` on, before the masks. P points at the
    queries' rows.
    """
    _padding, _mask, BOUNDS, _low, _high, _first, _end = masks
    i, j = top + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    keep_i, keep_j = i < frames, j < keys
    scores = query_key(query, Q, i, q_time, keep_i, K, j, k_time, keep_j, DIM, BLOCK_D, BLOCK_M, BLOCK_N)
    rows = rows_of_positions(R, top, start, frames, offsets, BOUNDS, BLOCK_M, BLOCK_N)
    return position_scores(
        scores, P[:, None], keep_i[:, None], p0[:, None], p1[:, None], p2[:, None], p3[:, None], rows, offsets,
        POS_DIM, PACKED, Q.dtype.element_ty,
    )  # fmt: skip


@triton.jit
def masked_scores(scores, i, start, masks, frames, keys, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the scores of queries i and BLOCK_N keys from ``start`` on as masks leave them, -inf behind the last key
    and in other recordings."""
    PADDING, _mask, BOUNDS, _low, _high, _first, _end = masks
    j, there = start + tl.arange(0, BLOCK_N), (tl.arange(0, BLOCK_N) < keys - start)[None, :]
    scores = _filled(scores, MASKED, i, j, masks, frames, keys, WINDOW)
    if PADDING is not None:
        scores = tl.where(_hidden(PADDING, start, keys, BLOCK_N), tl.where(there, MASKED, NONE), scores)
    elif BOUNDS is None:
        scores = tl.where(there, scores, NONE)
    if BOUNDS is not None:
        scores = tl.where(in_reach(j, masks), scores, NONE)
    return scores


@triton.jit
def scores_of(
    query, Q, P, K, R, masks, top, start, p0, p1, p2, p3, frames, keys, offsets, q_time, k_time,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns masked scores of the queries from ``top`` on and the keys from ``start`` on, -inf behind the last key and
    in other recordings. P points at the queries' rows; masks: (PADDING, MASK, BOUNDS, and what ``window`` returns), the
    first three or None.
    """
    scores = raw_scores(
        query, Q, P, K, R, masks, top, start, p0, p1, p2, p3, frames, keys, offsets, q_time, k_time,
        DIM, POS_DIM, PACKED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    return masked_scores(scores, top + tl.arange(0, BLOCK_M), start, masks, frames, keys, WINDOW, BLOCK_N)


@triton.jit
def penalties(scores, i, j, masks, frames, keys, penalty, limit):
    """Returns what the penalty adds to the gradients of the scores, which are those before the masks."""
    _padding, _mask, BOUNDS, _low, _high, _first, _end = masks
    large = tl.where(scores > limit, penalty, tl.where(scores < -limit, -penalty, 0.0))
    if BOUNDS is not None:
        large = tl.where(in_reach(j, masks), large, 0.0)
    return tl.where((i < frames)[:, None] & (j < keys)[None, :], large, 0.0)


# --------------------------------------------------------------------------- launching
@dataclass
class Operands:
    """The sizes, the keys in one tensor and R separated by head, which the launches of one call share."""

    frames: int
    batch: int
    heads: int
    dim: int
    pos_dim: int  # 0 without position scores
    left: int
    offsets: int
    chunk: int
    left_chunks: int
    key: torch.Tensor  # (keys, batch, ...), channels of head h from h * dim on
    r: torch.Tensor | None
    r_batch: int  # stride of R's sequences in elements of ``r``
    packed: bool
    bounds: torch.Tensor | None  # of recordings in a row, see _recordings.py

    @property
    def keys(self) -> int:
        return self.left + self.frames

    @property
    def center(self) -> int:
        """The row of R of the first query and its own key."""
        return self.frames - 1 if self.bounds is None else self.offsets // 2

    @property
    def pairs(self) -> int:
        return self.heads * self.batch

    @property
    def constants(self) -> dict:
        return {"DIM": self.dim, "POS_DIM": self.pos_dim, "PACKED": self.packed, "WINDOW": self.chunk > 0}


def operands(x, pos, cached_key, starts, heads: int, dim: int, chunk: int, left_chunks: int) -> Operands:
    """Returns the operands of a call on contiguous tensors. It copies R, and the keys where there is a
    cache.
    """
    frames, batch, width = x.shape
    left = 0 if cached_key is None else cached_key.shape[0]
    pos_dim = width // heads - 2 * dim if pos is not None else 0
    own = x[..., heads * dim : 2 * heads * dim]
    key = own if not left else torch.cat([cached_key, own])
    r, r_batch, packed = None, 0, False
    if pos_dim:
        aligned = heads * dim % 2 == 0 and x.data_ptr() % 8 == 0  # so p of a head is one load
        packed = pos_dim == 4 and x.dtype.itemsize == 2 and aligned
        r = table(pos, ("by head", heads, packed), lambda: _by_head(pos, heads, packed))
        r_batch = r.stride(0) if pos.shape[0] > 1 else 0
    if chunk > 0:  # all windows are the same beyond; clamping avoids overflow
        chunk = min(chunk, max(frames, left, 1))
        left_chunks = min(left_chunks, (left + frames) // chunk + 1)
    offsets = 2 * frames - 1 + left if pos is None else pos.shape[1]
    of_row = None if starts is None else bounds(starts, frames)
    return Operands(
        frames, batch, heads, dim, pos_dim, left, offsets, chunk, left_chunks, key, r, r_batch, packed, of_row
    )  # fmt: skip


def _by_head(pos: torch.Tensor, heads: int, packed: bool) -> torch.Tensor:
    """Returns R as (1 or B, H, rows, 1) with four 16-bit numbers in each element, or as (1 or B, H, pos_dim, rows):
    all rows between margins, which repeat the first one MARGIN times.
    """
    apart = pos.unflatten(2, (heads, -1))
    r, rows = (apart.transpose(1, 2), 2) if packed else (apart.permute(0, 2, 3, 1), 3)
    margin = r.narrow(rows, 0, 1).expand(*r.shape[:rows], MARGIN.value, *r.shape[rows + 1 :])
    r = torch.cat([margin, r, margin], rows)
    return r.view(torch.int64) if packed else r


def head_block(dim: int, dtype: torch.dtype) -> int:
    """Returns how many channels of a head a tile holds."""
    return min(32 if dtype == torch.float32 else 128, max(16, next_power_of_2(dim)))
