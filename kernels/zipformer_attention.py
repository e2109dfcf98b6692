# SPDX-License-Identifier: Apache-2.0
"""Values weighted by attention with relative positions; neither weights nor scores reach memory.

    s[i, j] = q[i] . k[j] + p[i] . R[T - 1 - i + j], masked scores -1000, W = softmax_j(s), y = W v
    With G = dy: dv = W^T G, dW = G v^T, delta = sum_j W dW, dS = W (dW - delta), 0 where masked; then dq, dk, dp and dR
    as in zipformer_attention_weights.py

Where a number on the device says so, W is [W > 0] / n, n being the number of W > 0 in a row: forward sweeps the keys
once more, and dW is 0. The penalty on large scores joins dS; masked scores have it too, so no key is skipped then.

Per score, with d channels of q, P of p, V of v:

    kernel      program                               FLOPs
    forward     BLOCK_M queries x columns of v        2 (d + P + columns), a running maximum
    queries     BLOCK_M queries x channels of q       2 (d + P + V + channels + P); float32 2 (d + P + V) more
    keys        BLOCK_N keys x channels of k and v    2 (d + P + V + channels + columns)
    positions   a tile of offsets                     2 P; sums of the diagonals of a piece of dS

The forward pass keeps the maximum and 1 / sum of each row, and 1 / n where W may be equal. In 16 bits it also keeps
what rounding takes from y: delta is G . (y + this remainder), which costs no sweep over the keys. In float32 the
additions in y round too early: there ``queries`` sweeps the keys once more. ``queries`` leaves delta for ``keys``. It
works on pieces of the rows, each followed by its diagonals: dS of a piece fits PIECE_BYTES (or is one block of
queries), so memory is O(T), and dR is summed in the order of the pieces. Keys outside the chunk window of a block are
skipped, unless a row sees nothing above -896, where the masked keys would weigh more than 0. What a program does
depends on the shape and on the device's number of multiprocessors: on one kind of device results repeat bit for bit,
without atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._activation import exp_difference
from fastasr.kernels._attention_tiles import (
    NONE,
    PIECE_BYTES,
    load_rows,
    mask_stride,
    running,
    store_with_remainder,
    sums,
)
from fastasr.kernels._launch import (
    as_bytes,
    cdiv,
    dot_options,
    generation,
    launch,
    next_power_of_2,
    processors,
    rounded,
)
from fastasr.kernels._parts import add_tables
from fastasr.kernels._recordings import pieces
from fastasr.kernels._rel_position_tiles import (
    any_alone,
    dealt,
    head_block,
    keys_reached,
    keys_seen,
    load_positions,
    operands,
    positions_of,
    scores_of,
    settled,
    window,
)
from fastasr.kernels._zipformer_attention import (
    SIZES,
    UNALIGNED,
    offsets_of,
    position_tile,
    positions_kernel,
    row_size,
)
from fastasr.kernels._zipformer_attention_backward import has_weight, keys_kernel, queries_kernel


# --------------------------------------------------------------------------- forward
@triton.jit
def _weighted(
    query, Q, P, K, R, masks, V, top, p0, p1, p2, p3, begin, end, c, frames, keys, offsets, q_time, k_time, v_time,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Returns (maximum, sum of exponentials, their products with v) of the keys [begin, end)."""
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], SUM)
    y = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        scores = scores_of(
            query, Q, P, K, R, masks, top, start, p0, p1, p2, p3, frames, keys, offsets, q_time, k_time,
            DIM, POS_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        maximum, factor, e = running(maximum, scores, PRECISE)
        total = total * factor + sums(e, 1, PRECISE)
        value = load_rows(V, j, v_time, c, j < keys, VALUE_DIM)  # [BLOCK_N, BLOCK_V]
        if PRECISE:  # one chain of additions through all keys would round more than torch does
            y = tl.fma(y, tl.broadcast_to(factor[:, None], y.shape), tl.dot(e, value))
        else:
            y = tl.dot(e.to(value.dtype), value, y * factor[:, None])
    return maximum, total, y


@triton.jit
def _equally_weighted(
    query, Q, P, K, R, masks, V, top, p0, p1, p2, p3, begin, end, c, frames, keys, offsets, q_time, k_time, v_time,
    maximum, inverse,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Returns (1 / number of the keys [begin, end) that have weight, or 1; sum of their v)."""
    number = tl.zeros([BLOCK_M], tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        scores = scores_of(
            query, Q, P, K, R, masks, top, start, p0, p1, p2, p3, frames, keys, offsets, q_time, k_time,
            DIM, POS_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        w = exp_difference(scores, maximum[:, None], PRECISE) * inverse[:, None]
        one = has_weight(w, V.dtype.element_ty).to(tl.float32)
        number += tl.sum(one, axis=1)
        value = load_rows(V, j, v_time, c, j < keys, VALUE_DIM)  # [BLOCK_N, BLOCK_V]
        if PRECISE:  # see ``_weighted``
            y = tl.fma(tl.dot(one, value), 1.0, y)
        else:
            y = tl.dot(one.to(value.dtype), value, y)
    return tl.div_rn(1.0, tl.maximum(number, 1.0)), y


@triton.jit(
    do_not_specialize=SIZES, do_not_specialize_on_alignment=[*UNALIGNED, "EQUAL", "INVERSE", "WEIGHT"]
)
def forward_kernel(
    X, K, R, PADDING, MASK, BOUNDS, EQUAL, V, Y, MAXIMUM, INVERSE, WEIGHT, REMAINDER,
    frames, keys, left, batch, blocks, heads, offsets, chunk, left_chunks,
    x_time, x_batch, k_time, k_batch, v_time, v_batch, r_batch, mask_batch,
    DIM: tl.constexpr, POS_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes y of a block of queries and of columns, and what rounding takes from it where REMAINDER is not None.
    Programs of the first block of columns also store maximum and 1 / sum of the queries, where these are not None, and
    with EQUAL the weight of the keys if they weigh the same."""
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK_M)
    top = block * BLOCK_M
    i = top + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    keep_i = i < frames
    Q = X + sequence * x_batch + head * DIM
    P = X + sequence * x_batch + 2 * heads * DIM + head * POS_DIM + i.to(tl.int64) * x_time
    K += sequence * k_batch + head * DIM
    V += sequence * v_batch + head * VALUE_DIM
    R = positions_of(R, sequence, r_batch, head, offsets, POS_DIM, PACKED)
    if PADDING is not None:
        PADDING += sequence * keys
    if MASK is not None:
        MASK += sequence * mask_batch
    query = tl.zeros([BLOCK_M, BLOCK_D], X.dtype.element_ty)
    if DIM <= BLOCK_D:
        query = load_rows(Q, i, x_time, tl.arange(0, BLOCK_D), keep_i, DIM)
    p0, p1, p2, p3 = load_positions(P, keep_i, PACKED)
    masks = (PADDING, MASK, BOUNDS)
    masks += window(i, frames, left, keys, offsets, chunk, left_chunks, BOUNDS, WINDOW)
    begin, end = keys_seen(masks, keys, BLOCK_N, WINDOW)
    maximum, total, y = _weighted(
        query, Q, P, K, R, masks, V, top, p0, p1, p2, p3, begin, end, c, frames, keys, offsets, x_time, k_time, v_time,
        DIM, POS_DIM, VALUE_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISE,
    )  # fmt: skip
    if WINDOW:  # noqa: SIM102, the inner condition is known on the device alone
        if any_alone(maximum, keep_i, masks):  # masked keys weigh something, so all are needed
            begin, end = keys_reached(masks, keys, BLOCK_N)
            maximum, total, y = _weighted(
                query, Q, P, K, R, masks, V, top, p0, p1, p2, p3, begin, end, c,
                frames, keys, offsets, x_time, k_time, v_time,
                DIM, POS_DIM, VALUE_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISE,
            )  # fmt: skip
    maximum, total = settled(maximum, total, masks)
    inverse = tl.div_rn(1.0, total.to(tl.float32))
    once = keep_i & (tl.program_id(1) == 0)
    row = (head * batch + sequence) * frames + i
    if MAXIMUM is not None:
        tl.store(MAXIMUM + row, maximum, mask=once)
        tl.store(INVERSE + row, inverse, mask=once)
    if EQUAL is not None:
        if tl.load(EQUAL) != 0:
            inverse, y = _equally_weighted(
                query, Q, P, K, R, masks, V, top, p0, p1, p2, p3, begin, end, c,
                frames, keys, offsets, x_time, k_time, v_time, maximum, inverse,
                DIM, POS_DIM, VALUE_DIM, PACKED, WINDOW, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISE,
            )  # fmt: skip
        if WEIGHT is not None:
            tl.store(WEIGHT + row, inverse, mask=once)
    y = y * inverse[:, None]
    at = sequence * v_batch + head * VALUE_DIM + i.to(tl.int64)[:, None] * v_time + c[None, :]
    keep = keep_i[:, None] & (c < VALUE_DIM)[None, :]
    store_with_remainder(Y, REMAINDER, at, y, keep)


# --------------------------------------------------------------------------- launchers
def blocks_of_piece(blocks: int, pairs: int, most: int, places: int) -> int:
    """Returns the blocks of queries of a piece, at most ``most``: those for which ``queries``, of which ``places``
    programs run at once, takes the fewest turns, and of these the most.
    """

    def turns(each: int) -> int:
        whole, rest = divmod(blocks, each)
        return whole * cdiv(pairs * each, places) + cdiv(pairs * rest, places)

    return min(range(max(1, min(most, blocks)), 0, -1), key=turns)


PROGRAMS = 1024  # for ``positions_kernel`` with recordings in a row


def tiles(
    dim: int,
    pos_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    generation: int,
    hiding: bool = False,
    recordings: bool = False,
    penalty: bool = False,
    equal: bool = False,
) -> dict[str, dict]:
    """Returns tile shapes, warps and stages by kernel; ``hiding`` says whether there is a chunk window or a mask of
    pairs, ``recordings`` whether there are several in a row, ``penalty`` whether large scores have one,
    ``equal`` whether weights may be equal.

    The tiles are the largest that do not spill (tests/kernels/budgets.toml). Products of float32 run without tensor
    cores unless TF32 is allowed, and need small tiles. In 16 bits each of four warps computes 16 of 64 rows of a
    product; Triton would let more warps compute the same rows again, with their exponentials.
    """
    wide = dtype == torch.float32
    block_p = max(16, next_power_of_2(max(1, pos_dim)))
    rows = 16 if wide else 64
    block_d = head_block(dim, dtype)
    common = {"BLOCK_M": rows, "BLOCK_N": 64, "BLOCK_D": block_d, "num_stages": 2}
    common["num_warps"] = 8 if wide else 4
    common |= dot_options(dtype)
    if dim > block_d or (not wide and pos_dim not in (0, 4)):  # loops over channels inside the tile
        common["BLOCK_N"] = 32
    narrow = {"BLOCK_N": 32} if hiding and not wide else {}
    columns = max(16, next_power_of_2(max(1, value_dim)))
    inner = common | {"BLOCK_V": min(32 if wide else 64, columns)}
    forward = common | narrow | {"BLOCK_V": min(32 if wide else 128, columns)}
    queries = inner | {"BLOCK_P": block_p, "BLOCK_N": 32}
    # 64 keys at a time took less time than 32 in a trial on an H200, with Triton 3.6. With masks of pairs or more
    # values they would spill. On other generations they were not timed.
    many = generation == 90 and not hiding and value_dim <= 64
    keys = inner | ({} if wide or many else {"BLOCK_N": 32})
    if rounded(dtype):
        forward |= {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4}
        queries["num_warps"] = 4
        # eight warps on 16 queries compute products up to eight times
        if generation in (80, 120) or dim > block_d:
            keys |= {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4}
    elif not wide and generation == 100:  # its products do not repeat rows, and four warps spill
        queries["num_warps"] = 8
        keys |= {"BLOCK_N": 64, "num_warps": 8}
    elif not wide and generation in (80, 120):
        queries["BLOCK_V"] = min(32, columns)
    if not wide and generation == 80 and columns > 128:
        forward["BLOCK_N"] = 32
    if equal and wide and not rounded(dtype):  # more would spill, here and below
        keys["BLOCK_N"] = 64 if generation == 100 else 32
    elif equal and generation != 90:
        forward["BLOCK_N"] = 32
        if generation == 100:
            forward["BLOCK_V"] = min(64, columns)
        elif generation == 120:
            keys["BLOCK_V"] = min(32, columns)
    tight = recordings and (generation != 90 or penalty or equal)
    if not wide and (tight or ((penalty or hiding) and generation == 100)):
        queries["BLOCK_N"] = 16
    return {
        "forward": forward,
        "queries": queries,
        "keys": keys,
        "positions": dot_options(dtype)
        | position_tile(pos_dim, dtype, queries["BLOCK_M"] if recordings else 32 if wide else 64),
    }


def number(t: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a bool, float32 or other number as kernels read it."""
    return as_bytes(t) if t is not None and t.dtype is torch.bool else t


def zipformer_attention_forward(
    x: torch.Tensor,
    pos: torch.Tensor | None,
    value: torch.Tensor,
    cached_key: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    heads: int,
    dim: int,
    value_heads: int,
    chunk: int,
    left_chunks: int,
    equal: torch.Tensor | None = None,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y (frames, batch, value_heads * dv) and, if it is to ``keep`` them, what the backward pass reads: in
    float32 maximum, 1 / sum and, with ``equal``, 1 / n of each row (2 or 3, value_heads, batch, frames), and in 16 bits
    what rounding takes from y, of y's shape. Without elements otherwise. All tensors are contiguous.

    equal: one number; if it is not 0, the weights are equal.
    """
    frames, batch, _ = x.shape
    y = x.new_empty(frames, batch, value.shape[2])
    sizes = (2 if equal is None else 3, value_heads, batch, frames) if keep else (0,)
    statistics = x.new_empty(sizes, dtype=torch.float32)
    remainder = torch.empty_like(y) if keep and x.dtype != torch.float32 else x.new_empty(0)
    if not y.numel():
        return y, statistics.zero_(), remainder
    o = operands(x, pos, cached_key, starts, heads, dim, chunk, left_chunks)
    value_dim = value.shape[2] // value_heads
    sizes = dim, o.pos_dim, value_dim, x.dtype, generation(x)
    tile = tiles(*sizes, chunk > 0 or attn_mask is not None, equal=equal is not None)["forward"]
    blocks = cdiv(frames, tile["BLOCK_M"])
    launch(forward_kernel, (value_heads * batch * blocks, cdiv(value_dim, tile["BLOCK_V"])),
        x, o.key, o.r, as_bytes(key_padding_mask), as_bytes(attn_mask), o.bounds, number(equal), value, y,
        *_apart(statistics), remainder if remainder.numel() else None,
        frames, o.keys, o.left, batch, blocks, heads, o.offsets, o.chunk, o.left_chunks,
        x.stride(0), x.stride(1), o.key.stride(0), o.key.stride(1), value.stride(0), value.stride(1), o.r_batch,
        mask_stride(attn_mask), **o.constants, VALUE_DIM=value_dim, **tile,
    )  # fmt: skip
    return y, statistics, remainder


def _apart(statistics: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Returns the kept maximum, 1 / sum and 1 / n, None for those that are not kept."""
    return (*(statistics.unbind() if statistics.numel() else ()), None, None, None)[:3]


class PositionSums:
    """Sums of the gradients of one tensor of positions: ``parts`` (tables, batch, offsets, heads * pos_dim), or None
    before the first call."""

    parts: torch.Tensor | None = None

    def total(self, pos: torch.Tensor) -> torch.Tensor:
        """Returns their sum, in the dtype and shape of the positions (1 or batch, offsets, heads * pos_dim)."""
        dpos = torch.empty_like(pos)
        add_tables(self.parts, dpos, self.parts.numel() // dpos.numel())
        return dpos


def zipformer_attention_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    statistics: torch.Tensor,
    remainder: torch.Tensor,
    x: torch.Tensor,
    pos: torch.Tensor | None,
    value: torch.Tensor,
    cached_key: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    heads: int,
    dim: int,
    value_heads: int,
    chunk: int,
    left_chunks: int,
    equal: torch.Tensor | None = None,
    penalty: float = 0.0,
    limit: float = 0.0,
    act: torch.Tensor | None = None,
    sums: PositionSums | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dpos, dvalue, dcached_key), without elements where the argument is None. All tensors
    are contiguous; three of them are what the forward pass returned.

    act: one number; if it is 0, there is no penalty.
    sums: what calls with ``starts``, and all but the values the same, add dpos to. They return none.
    """
    frames, batch, width = x.shape
    none = x.new_empty(0)
    if not grad.numel():
        zeros = (none if t is None else torch.zeros_like(t) for t in (x, pos, value, cached_key))
        return tuple(zeros)
    o = operands(x, pos, cached_key, starts, heads, dim, chunk, left_chunks)
    own_pos, value_dim = width // heads - 2 * dim, value.shape[2] // value_heads
    hiding = chunk > 0 or attn_mask is not None
    shapes = tiles(
        dim,
        own_pos,
        value_dim,
        x.dtype,
        generation(x),
        hiding,
        starts is not None,
        bool(penalty),
        equal is not None,
    )
    dx = torch.empty_like(x)
    dvalue = torch.empty_like(value)
    pairs = value_heads * batch
    kept, delta = _apart(statistics), x.new_empty(pairs * frames, dtype=torch.float32)
    strides = (
        x.stride(0), x.stride(1), o.key.stride(0), o.key.stride(1), value.stride(0), value.stride(1), o.r_batch,
        mask_stride(attn_mask),
    )  # fmt: skip
    masks = as_bytes(key_padding_mask), as_bytes(attn_mask), o.bounds
    numbers = (number(act) if penalty else None), number(equal)
    large = (float(penalty), float(limit)) if penalty else (None, None)
    constants = o.constants | {"VALUE_DIM": value_dim}

    tile = shapes["queries"]
    columns = cdiv(dim, tile["BLOCK_D"])
    diagonals = _Diagonals(x, o, starts, pairs, shapes, sums) if o.pos_dim else None
    rows = diagonals.rows if diagonals else frames
    for piece, first in diagonals.turns if diagonals else [(None, 0)]:
        count = min(rows, frames - first)
        blocks = cdiv(count, tile["BLOCK_M"])
        launch(queries_kernel, (pairs * blocks, columns),
            grad, y, remainder if remainder.numel() else None, x, o.key, o.r, *masks,
            diagonals and diagonals.pieces, *numbers, value, dx, diagonals and diagonals.ds, *kept, delta,
            frames, o.keys, o.left, first, count, piece, batch, blocks, heads, o.offsets, o.chunk, o.left_chunks,
            *strides, diagonals.row if diagonals else 0, *large, **constants, WIDE_POS=own_pos,
            OTHERS=value_heads < heads, **tile,
        )  # fmt: skip
        if diagonals:
            diagonals.add(piece, first, count)

    tile = shapes["keys"]
    dkey = dx[..., heads * dim : 2 * heads * dim]
    if o.left:
        dkey = torch.empty_like(o.key) if value_heads == heads else torch.zeros_like(o.key)
    blocks = cdiv(o.keys, tile["BLOCK_N"])
    columns = max(columns, cdiv(value_dim, tile["BLOCK_V"]))
    launch(keys_kernel, (pairs * blocks, columns),
        grad, x, o.key, o.r, *masks, *numbers, value, *kept[:2], delta, dkey, dvalue,
        frames, o.keys, o.left, batch, blocks, heads, o.offsets, o.chunk, o.left_chunks,
        *strides, *large, **constants, **tile,
    )  # fmt: skip
    dcached = none if cached_key is None else torch.empty_like(cached_key)
    if o.left:
        dcached.copy_(dkey[: o.left])
        dx[..., heads * dim : 2 * heads * dim].copy_(dkey[o.left :])
    if sums is not None or pos is None:
        dpos = none
    elif diagonals is None:
        dpos = torch.zeros_like(pos)
    else:
        dpos = diagonals.sums.total(pos)
    return dx, dpos, dvalue, dcached


class _Diagonals:
    """Computes dR from dS, one piece of its rows after the other. ``turns`` has (None, the first of a piece's ``rows``)
    or, with recordings in a row, (the number of a piece of _recordings.py, 0).
    """

    def __init__(
        self, x: torch.Tensor, o, starts: torch.Tensor | None, pairs: int, shapes: dict[str, dict], sums
    ):
        self.sums = PositionSums() if sums is None else sums
        self.x, self.o, self.pairs, self.tile = x, o, pairs, shapes["positions"]
        self.block, self.columns = shapes["queries"]["BLOCK_M"], shapes["queries"]["BLOCK_N"]
        self.blocks, self.shares, self.pieces, self.several = cdiv(o.frames, self.block), 1, None, True
        room = PIECE_BYTES // (pairs * x.element_size())
        if starts is None:
            self.row = row_size(o.keys)
            # a multiprocessor holds two programs of 16 bits, one of float32 (tests/kernels/budgets.toml: registers)
            places = processors(x) * (2 if x.dtype.itemsize == 2 else 1)
            most = room // (self.row * self.block)
            self.rows = min(o.frames, self.block * blocks_of_piece(self.blocks, pairs, most, places))
            self.turns = [(None, first) for first in range(0, o.frames, self.rows)]
            size = self.rows * self.row
        else:
            reach = o.offsets // 2
            self.pieces, count, size = pieces(
                starts, o.bounds, reach, reach, self.block, self.columns, 0, room
            )
            self.row, self.rows, self.turns = size, o.frames, [(piece, 0) for piece in range(count)]
            programs = (pairs if sums is None else o.batch) * cdiv(o.offsets, offsets_of(self.tile))
            self.shares = min(self.blocks, cdiv(PROGRAMS, programs))
            first = self.sums.parts is None
            self.several = count > 1 or pairs < o.pairs or not first  # else the shares write whole tables
        self.ds = x.new_empty(pairs * size)
        if self.sums.parts is None:
            dtype = torch.float64 if x.dtype == torch.float32 else torch.float32
            shape = self.shares, o.batch, o.offsets, o.heads * o.pos_dim
            new = torch.zeros if self.several else torch.empty
            self.sums.parts = new(shape, dtype=dtype, device=x.device)

    def add(self, piece: int | None, first: int, rows: int) -> None:
        o, x = self.o, self.x
        base, end = 0, o.offsets
        if self.several:  # offsets that meet these rows
            base, end = max(0, o.center + 1 - first - rows), min(o.offsets, o.center - first + o.keys)
        blocks = cdiv(end - base, offsets_of(self.tile))
        own = (None,) * 3 if piece is None else (piece, self.blocks, self.shares)
        launch(positions_kernel, (self.pairs * self.shares * blocks,),
            self.ds, x, self.pieces, self.sums.parts, o.center, o.keys, first, rows, base, *own,
            o.batch, blocks, o.heads, o.offsets, self.row, x.stride(0), x.stride(1),
            DIM=o.dim, POS_DIM=o.pos_dim, ADD=self.several, COLUMNS=self.columns, **self.tile,
        )  # fmt: skip
