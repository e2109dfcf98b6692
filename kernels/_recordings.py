# SPDX-License-Identifier: Apache-2.0
"""Recordings that lie one after the other in a sequence: the frames between two starts are one recording.

Kernels read where the recordings of frames begin and end from a table, which ``bounds`` makes in one launch: to compare
the frames of every tile with the starts would take longer than the tile.

Backward passes store gradients of scores, dS, for a piece of the rows at a time. A block of queries has rows as long as
the keys that it meets, and only the device knows how many these are. So a second table, which ``pieces`` makes, says
where a block's rows lie, and which blocks are a piece. The host counts pieces as if all recordings were of the longest
kind: if they are shorter, the last pieces are empty, and their programs end at once.

Convolutions cut recordings, or the chunks of each, into groups of frames, which a thread computes together: only the
device knows where these begin. A table that ``groups`` makes says so.
"""

import torch
import triton
import triton.language as tl

from fastasr._tables import share, table
from fastasr.kernels._launch import as_bytes, cdiv, launch, next_power_of_2

RECORDINGS = tl.constexpr(32)  # starts that are read at a time
LAST = tl.constexpr(2**31 - 1)
ORDER = tl.constexpr(64)  # frames of the tiles whose order ``bounds_kernel`` finds
TABLE = {"BLOCK": 128, "num_warps": 4}
BLOCKS = {"MANY": 128, "num_warps": 4}  # for ``pieces_kernel``


@triton.jit
def recordings_of(i, STARTS, count):
    """Returns [first, end) of the recordings of frames i. A frame of none has the next start, or the last one, as both:
    neither number decreases along the frames."""
    first = tl.full(i.shape, -1, tl.int32)
    end = tl.full(i.shape, LAST, tl.int32)
    for n in range(0, count, RECORDINGS):
        r = n + tl.arange(0, RECORDINGS)
        start = tl.minimum(tl.maximum(tl.load(STARTS + r, mask=r < count, other=0), 0), LAST - 1).to(tl.int32)
        start = tl.where(r < count, start, LAST)[None, :]
        begun = start <= i[:, None]  # [frames, RECORDINGS]
        first = tl.maximum(first, tl.max(tl.where(begun, start, -1), axis=1))
        end = tl.minimum(end, tl.min(tl.where(begun, LAST, start), axis=1))
    begun, ended = tl.where(first < 0, end, first), tl.where(end == LAST, first, end)
    return begun, ended


@triton.jit
def _spans_of(i, STARTS, ENDS, count, factor):
    """Returns the numbers of the recordings of frames i, where these end, and [first, end) as ``recordings_of``. With
    ENDS recordings lie at [STARTS, ENDS), in frames of which ``factor`` are one here, and a frame of none has the
    number of the recording before it, whose begin is the last one up to it."""
    if ENDS is None:
        first, end = recordings_of(i, STARTS, count)
        number, own_end = first, end
    else:
        number = tl.zeros(i.shape, tl.int32)
        for n in range(1, count, RECORDINGS):
            r = n + tl.arange(0, RECORDINGS)
            begin = tl.load(STARTS + r, mask=r < count, other=0) // factor
            begun = (begin[None, :] <= i[:, None]) & (r < count)[None, :]  # [frames, RECORDINGS]
            number += tl.sum(begun.to(tl.int32), axis=1)
        begin = (tl.load(STARTS + number) // factor).to(tl.int32)
        own_end = ((tl.load(ENDS + number) + (factor - 1)) // factor).to(tl.int32)
        following = number + 1 < count
        behind = (tl.load(STARTS + number + 1, mask=following, other=0) // factor).to(tl.int32)
        behind = tl.where(following, behind, own_end)
        inside = i < own_end
        first, end = tl.where(inside, begin, behind), tl.where(inside, own_end, behind)
    return number, own_end, first, end


@triton.jit
def _keys_of(tile, STARTS, ENDS, frames, count, factor):
    """Returns how many keys tiles of ORDER frames meet, -1 for one that is not whole or does not exist."""
    _number, _own, begin, _end = _spans_of(tile * ORDER, STARTS, ENDS, count, factor)
    _number, _own, _begin, end = _spans_of((tile + 1) * ORDER - 1, STARTS, ENDS, count, factor)
    return tl.where((tile + 1) * ORDER <= frames, tl.minimum(end, frames) - tl.minimum(begin, frames), -1)


@triton.jit
def _size(frames):
    """Returns the numbers of the table of a rate."""
    return tl.cdiv(3 * frames + tl.cdiv(frames, ORDER), 16) * 16


@triton.jit(
    do_not_specialize=["frames", "count", "factors"],
    do_not_specialize_on_alignment=["STARTS", "ENDS", "OUT", "HIDDEN", "WHOSE"],
)
def bounds_kernel(STARTS, ENDS, OUT, HIDDEN, WHOSE, frames, count, factors, BLOCK: tl.constexpr):
    """Writes [first, end) of the recordings of a block of frames, two rows of ``frames`` numbers; behind them the order
    of the tiles of ORDER frames, those that meet most keys first, and one that is not whole last. With ENDS it writes
    the tables of the rates whose factors are the bytes of ``factors``, program_id(1) being the rate: behind the order
    how many frames of its recording begin with each frame, to HIDDEN where there is none, and to WHOSE where recordings
    begin and end and each frame's number."""
    factor = tl.full([], 1, tl.int32)
    if ENDS is not None:
        whole = frames
        for rate in range(tl.program_id(1) + 1):
            factor = ((factors >> (8 * rate)) & 255).to(tl.int32)
            frames = whole // factor
            if rate < tl.program_id(1):
                OUT += _size(frames)
                HIDDEN += tl.cdiv(frames, 16) * 16
                WHOSE += 2 * count + tl.cdiv(frames, 2) * 2
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number, own_end, first, end = _spans_of(i, STARTS, ENDS, count, factor)
    tl.store(OUT + i, tl.minimum(first, frames), mask=i < frames)
    tl.store(OUT + frames + i, tl.minimum(end, frames), mask=i < frames)
    tile = tl.program_id(0) * (BLOCK // ORDER) + tl.arange(0, BLOCK // ORDER)
    tiles = tl.cdiv(frames, ORDER)
    own = _keys_of(tile, STARTS, ENDS, frames, count, factor)
    place = tl.zeros([BLOCK // ORDER], tl.int32)
    for n in range(0, tiles, RECORDINGS):
        other = n + tl.arange(0, RECORDINGS)
        keys = _keys_of(other, STARTS, ENDS, frames, count, factor)[None, :]
        earlier = (keys > own[:, None]) | ((keys == own[:, None]) & (other[None, :] < tile[:, None]))
        place += tl.sum((earlier & (other < tiles)[None, :]).to(tl.int32), axis=1)
    tl.store(OUT + 2 * frames + place, tile, mask=tile < tiles)
    if ENDS is not None:
        tl.store(OUT + 2 * frames + tiles + i, own_end - i, mask=i < frames)
        tl.store(HIDDEN + i, (i >= own_end).to(tl.uint8), mask=i < frames)
        tl.store(WHOSE + 2 * count + i, number.to(tl.int64), mask=i < frames)
        if tl.program_id(0) == 0:
            for n in range(0, count, BLOCK):
                r = n + tl.arange(0, BLOCK)
                begin, behind = tl.load(STARTS + r, mask=r < count), tl.load(ENDS + r, mask=r < count)
                tl.store(WHOSE + 2 * r, begin // factor, mask=r < count)
                tl.store(WHOSE + 2 * r + 1, (behind + (factor - 1)) // factor, mask=r < count)


def bounds(starts: torch.Tensor, frames: int) -> torch.Tensor:
    """Returns int32 (2, frames): the first frame of each frame's recording and the one behind its last, which are equal
    for a frame that belongs to none. Neither row decreases. Behind them in memory lies the order in which ``dealt``
    gives out tiles.
    """

    def made() -> torch.Tensor:
        found = torch.empty(2 * frames + cdiv(frames, ORDER), dtype=torch.int32, device=starts.device)
        launch(bounds_kernel, (cdiv(frames, TABLE["BLOCK"]),),
            starts, None, found, None, None, frames, len(starts), 1, **TABLE,
        )  # fmt: skip
        return found[: 2 * frames].view(2, frames)

    return table(starts, ("bounds", frames), made)


def tables(
    begins: torch.Tensor, ends: torch.Tensor, frames: int, factors: tuple[int, ...]
) -> list[tuple[torch.Tensor, ...]]:
    """Returns what ``ops._row.tables`` returns, by one launch."""
    sizes, count, device = [frames // factor for factor in factors], len(begins), begins.device
    shares = [cdiv(3 * n + cdiv(n, ORDER), 16) * 16 for n in sizes]
    flags, numbers = [cdiv(n, 16) * 16 for n in sizes], [2 * count + cdiv(n, 2) * 2 for n in sizes]
    made = torch.empty(sum(shares), dtype=torch.int32, device=device)
    hidden = torch.empty(sum(flags), dtype=torch.bool, device=device)
    whose = torch.empty(sum(numbers), dtype=torch.int64, device=device)
    code = sum(factor << 8 * i for i, factor in enumerate(factors))
    launch(bounds_kernel, (max(1, cdiv(max(sizes), TABLE["BLOCK"])), len(factors)),
        begins, ends, made, as_bytes(hidden), whose, frames, count, code, **TABLE,
    )  # fmt: skip
    found = []
    parts = made.split(shares), hidden.split(flags), whose.split(numbers)
    for n, of_rate, none, numbered in zip(sizes, *parts, strict=True):
        starts, recording = numbered[: 2 * count], numbered[2 * count :][:n]
        share(starts)
        table(starts, ("bounds", n), lambda of_rate=of_rate, n=n: of_rate[: 2 * n].view(2, n))
        found.append((starts, recording, of_rate[2 * n + cdiv(n, ORDER) :][:n], none[:n][None]))
    return found


@triton.jit
def _start(STARTS, r, count, frames):
    """Returns starts r, each a frame or the end of all; 0 behind the last one."""
    return tl.minimum(tl.maximum(tl.load(STARTS + r, mask=r < count, other=0), 0), frames).to(tl.int32)


@triton.jit
def _count(frames, chunk, group):
    """Returns the groups of a recording of so many frames."""
    return frames // chunk * tl.cdiv(chunk, group) + tl.cdiv(frames % chunk, group)


@triton.jit(
    do_not_specialize=["frames", "count", "chunk", "group", "groups"],
    do_not_specialize_on_alignment=["STARTS", "OUT"],
)
def groups_kernel(STARTS, OUT, frames, count, chunk, group, groups, BLOCK: tl.constexpr):
    """Writes the groups that begin in a block of frames: three rows of ``groups`` numbers, ``frames`` behind the last
    group."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, before = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    end = begin + frames
    last, total = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for n in range(0, count, RECORDINGS):
        r = n + tl.arange(0, RECORDINGS)
        start = _start(STARTS, r, count, frames)
        previous, again = tl.zeros([RECORDINGS], tl.int32), tl.zeros([RECORDINGS], tl.int32)
        for m in range(0, count, RECORDINGS):
            q = m + tl.arange(0, RECORDINGS)
            other = _start(STARTS, q, count, frames)[None, :]  # [RECORDINGS, RECORDINGS]
            previous = tl.maximum(previous, tl.max(tl.where(other < start[:, None], other, 0), axis=1))
            same = (other == start[:, None]) & (q[None, :] < r[:, None])
            again = tl.maximum(again, tl.max(same.to(tl.int32), axis=1))
        own = tl.where(
            again == 0, _count(start - previous, chunk, group), 0
        )  # of the recording that ends there
        begun = start[None, :] <= i[:, None]  # [BLOCK, RECORDINGS]
        begin = tl.maximum(begin, tl.max(tl.where(begun, start[None, :], 0), axis=1))
        end = tl.minimum(end, tl.min(tl.where(begun, frames, start[None, :]), axis=1))
        before += tl.sum(tl.where(begun, own[None, :], 0), axis=1)
        last, total = tl.maximum(last, tl.max(start)), total + tl.sum(own)
    place = (i - begin) % chunk
    number = before + _count(i - begin - place, chunk, group) + place // group
    first = (i < frames) & (place % group == 0)
    tl.store(OUT + number, i, mask=first)
    tl.store(OUT + groups + number, begin, mask=first)
    tl.store(OUT + 2 * groups + number, end, mask=first)
    none = (i >= total + _count(frames - last, chunk, group)) & (i < groups)
    for row in range(3):
        tl.store(OUT + row * groups + i, frames, mask=none)


def groups(starts: torch.Tensor, frames: int, chunk: int, group: int) -> torch.Tensor:
    """Returns int32 (3, groups): the first frame of each group and [begin, end) of its recording, and ``frames`` for
    groups that do not exist. Recordings lie between neighbouring starts, and before and behind all of them. Each is cut
    into chunks, and each chunk into groups of up to ``group`` frames.
    """
    whole, rest = frames * cdiv(chunk, group) * group, (len(starts) + 1) * (group - 1) * chunk
    most = (whole + rest) // (chunk * group)  # a recording's last group may be short of group - 1 frames

    def made() -> torch.Tensor:
        found = torch.empty(3, min(frames, most), dtype=torch.int32, device=starts.device)
        launch(groups_kernel, (cdiv(frames, TABLE["BLOCK"]),),
            starts, found, frames, len(starts), chunk, group, found.shape[1], **TABLE,
        )  # fmt: skip
        return found

    return table(starts, ("groups", frames, chunk, group), made)


@triton.jit
def group_at(GROUPS, groups, number, frames):
    """Returns the first frame and the recording of groups, see ``groups``."""
    there = number < groups
    t = tl.load(GROUPS + number, mask=there, other=frames)
    begin = tl.load(GROUPS + groups + number, mask=there, other=frames)
    return t, begin, tl.load(GROUPS + 2 * groups + number, mask=there, other=frames)


@triton.jit(do_not_specialize=["frames", "blocks", "left", "right", "size", "count"])
def pieces_kernel(
    BOUNDS, OUT, frames, blocks, left, right, size, count,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, MORE: tl.constexpr, MANY: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Writes four rows: the first key of each block of queries, the elements of one of its rows, and of all blocks
    before it; then the first block of each of ``count`` pieces, each of which begins behind ``size`` elements more.
    One program does it all."""
    p = tl.arange(0, COUNTED)
    firsts = tl.zeros([COUNTED], tl.int64)
    total = tl.zeros([1], tl.int64)
    for n in range(0, blocks, MANY):
        b = n + tl.arange(0, MANY)
        keep = b < blocks
        last = tl.minimum((b + 1) * BLOCK, frames) - 1
        begin = tl.maximum(tl.load(BOUNDS + b * BLOCK, mask=keep, other=0), b * BLOCK - left)
        end = tl.minimum(tl.load(BOUNDS + frames + last, mask=keep, other=0), last + 1 + right)
        whole = begin // COLUMNS * COLUMNS
        row = tl.where(begin < end, tl.cdiv(end - whole, COLUMNS) * COLUMNS, 0) + MORE
        elements = tl.where(keep, row, 0).to(tl.int64) * BLOCK
        before = total + tl.cumsum(elements, axis=0) - elements
        tl.store(OUT + b, whole, mask=keep)
        tl.store(OUT + blocks + b, row, mask=keep)
        tl.store(OUT + 2 * blocks + b, before, mask=keep)
        earlier = keep[None, :] & (before[None, :] < p[:, None] * size.to(tl.int64))  # [COUNTED, MANY]
        firsts += tl.sum(earlier.to(tl.int64), axis=1)
        total += tl.sum(elements, axis=0)
    firsts = tl.where(p < count, firsts, blocks)
    tl.store(OUT + 3 * blocks + p, firsts, mask=p <= count)


@triton.jit
def blocks_of(PIECES, piece, blocks):
    """Returns [first, end) of the blocks of queries of a piece, of ``blocks`` in all."""
    at = PIECES + 3 * blocks + piece
    return tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32)


@triton.jit
def rows_of(PIECES, block, first_block, blocks, COLUMNS: tl.constexpr):
    """Returns the first key that a block of queries meets, the elements of one of its rows, and the place of the first
    of them in a piece that begins with ``first_block``."""
    begin = tl.load(PIECES + block).to(tl.int32)
    row = tl.load(PIECES + blocks + block).to(tl.int32)
    place = tl.load(PIECES + 2 * blocks + block) - tl.load(PIECES + 2 * blocks + first_block)
    return tl.multiple_of(begin, COLUMNS), tl.multiple_of(row, COLUMNS), tl.multiple_of(place, COLUMNS)


def pieces(
    starts: torch.Tensor,
    bounds: torch.Tensor,
    left: int,
    right: int,
    block: int,
    columns: int,
    more: int,
    room: int,
) -> tuple[torch.Tensor, int, int]:
    """Returns the table that ``pieces_kernel`` writes, how many pieces there are, and the elements of one: about
    ``room``, but those of two blocks at least. ``bounds`` is that table of ``starts``. Queries see keys up to ``left``
    frames before and ``right`` behind them. A block of ``block`` queries meets tiles of ``columns`` keys, and its rows
    have ``more`` elements than these."""
    frames = bounds.shape[1]
    blocks = cdiv(frames, block)
    longest = (min(cdiv(left + right + block, columns) + 1, cdiv(frames, columns)) * columns + more) * block
    size = blocks * longest if blocks * longest <= room else max(longest, room - longest)
    count = cdiv(blocks * longest, size)

    def made() -> torch.Tensor:
        found = torch.empty(3 * blocks + count + 1, dtype=torch.int64, device=bounds.device)
        launch(pieces_kernel, (1,), bounds, found, frames, blocks, left, right, size, count,
            BLOCK=block, COLUMNS=columns, MORE=more, COUNTED=next_power_of_2(count + 1), **BLOCKS,
        )  # fmt: skip
        return found

    found = table(starts, ("pieces", frames, left, right, size, count, block, columns, more), made)
    return found, count, size if count == 1 else size + longest
