# SPDX-License-Identifier: Apache-2.0
"""Attention with the relative positions of Transformer-XL; neither weights nor scores reach memory.

    s[i, j] = ((q[i] + u) . k[j] + (q[i] + w) . R[T - 1 + j - i]) / sqrt(d), W = softmax_j(s), y = W v
    Under dropout y = (W m) v, see _weights_dropout.py; below, W in dv and dW have the factor m as well
    Where R ends before and behind the query, further keys have its first or last row
    s may have the parts g[i] b[T - 1 + j - i] and c[j] more, and no part of R. Under a soft cap a it is a tanh(s / a),
    and dS has the factor 1 - (s / a)^2
    With G = dy: dv = W^T G, dW = G v^T, delta = sum_j W dW, dS = W (dW - delta) / sqrt(d), and by offset dS'[i, r] =
    dS[i, i - (T - 1) + r]: dq = dS k + dS' R, dk = dS^T (q + u), dR = dS'^T (q + w), du = sum of dS k, dw = of dS' R,
    db = sqrt(d) sum of g dS', dg = sqrt(d) sum_j b dS, dc = sqrt(d) sum_i dS

Per score, with d channels of q and e of v:

    kernel      program                           FLOPs
    forward     BLOCK queries x columns of v      2 (2 d + columns), a running maximum
    delta       BLOCK rows of y, 16 bits          3 e / keys; see below
    statistics  BLOCK queries, float32            2 (2 d + e)
    queries     BLOCK queries x channels of q     2 (2 d + e) + 2 channels
    keys        BLOCK keys x channels of k, v     2 (3 d + e + channels + columns); dc of each head and sequence
    edges       BLOCK queries                     -; products of q + w with R's first and last row, if R ends
    offsets     BLOCK queries x channels          2 channels; of a piece of dS, which ``queries`` left by offset
    positions   offsets x channels                2 channels; of the same, for a group of sequences; db
    add_parts   1024 numbers                      -; dR and db over the groups, dc over heads or sequences
    biases      channels                          -; sums of the parts of du and dw that ``queries`` left

Scores by offset are products of tensor cores with a band of R; in registers a rotation of rows makes them scores by key
(_relative_shift.py). A walk along the keys is one along the band: each tile needs one new piece of it; ``keys`` meets
other queries in each tile and multiplies two, or three of 64 queries and 32 keys. Few tiles are masked: those that
reach beyond the last key or a query's context, and those with padding. Weights are e^(s - lse), lse the log-sum-exp
that the forward pass kept. In 16 bits the forward pass also keeps what rounding takes from y: delta is G . (y + this
remainder), which costs no sweep over the keys. float32 keeps more digits than y holds: there weights are divided by
their sum, which rounding of lse moves from 1, so that rows of dS add up to zero; ``statistics`` finds this sum and
delta. (One kernel with ``queries`` would keep the registers of both sweeps alive, and spill.) Rows are worked on in
pieces of PIECE_BYTES of dS, as in zipformer_attention.py: memory is O(T), and dR is summed in their order. What a
program does depends on the shape and the generation of the GPU alone: results repeat bit for bit, without atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._attention_tiles import (
    NONE,
    PIECE_BYTES,
    load_rows_from,
    mask_stride,
    running,
    running_in_bits,
    store_with_remainder,
    sums,
)
from fastasr.kernels._launch import (
    as_bytes,
    cdiv,
    chosen,
    dot_options,
    generation,
    launch,
    next_power_of_2,
    rounded,
)
from fastasr.kernels._parts import add_tables
from fastasr.kernels._recordings import bounds, pieces
from fastasr.kernels._rel_attention_backward import (
    biases_kernel,
    delta_kernel,
    edges_kernel,
    keys_kernel,
    offsets_kernel,
    positions_kernel,
    queries_kernel,
    statistics_kernel,
)
from fastasr.kernels._rel_attention_scores import (
    SIZES,
    UNALIGNED,
    band,
    bits_of,
    context,
    keys_of_all,
    keys_seen,
    of_head,
    queries,
    scores_of,
)
from fastasr.kernels._rel_position_tiles import dealt, head_block
from fastasr.kernels._relative_shift import ready
from fastasr.kernels._weights_dropout import constants as dropout_constants
from fastasr.kernels._weights_dropout import dropped, row_words

LN_2 = tl.constexpr(0.6931471805599453)


# --------------------------------------------------------------------------- forward
@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    Q, K, V, POS, EDGES, U, W, BIAS, GATE, KEY_BIAS, PADDING, MASK, BOUNDS, SEED, Y, LSE, REMAINDER,
    frames, keys, chunk, left, right, batch, blocks, heads, q_time, v_time, q_batch, k_batch, v_batch,
    g_batch, mask_batch, c_batch, c_head, side, r_time, r_head, before, behind, threshold, scale, factor, cap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BRANCHES: tl.constexpr,
):  # fmt: skip
    """Writes y of a block of queries and of columns, what rounding takes from it where REMAINDER is not None, and the
    queries' lse, which is inf without a key."""
    PRECISE: tl.constexpr = Q.dtype.element_ty == tl.float32
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    sizes = frames, keys, chunk, left, right, BOUNDS
    head, sequence, block = dealt(tl.program_id(0), blocks, batch, BOUNDS, frames, BLOCK_M)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    keep_i = i < frames
    Q, K, V = of_head(Q, K, V, head, sequence, q_batch, k_batch, v_batch, DIM, VALUE_DIM)
    span = (EDGES, (sequence * heads + head) * frames, side, r_time, r_head, before, behind)
    tensors = (Q, K, V, POS, U, W, head, span)
    masks = (PADDING, MASK, sequence, mask_batch)
    masks += context(i, sizes, WINDOW)
    seen_from, seen_to = keys_of_all(block * BLOCK_M, (block + 1) * BLOCK_M - 1, sizes, WINDOW)
    biases = (BIAS, GATE, KEY_BIAS, head, sequence * frames, heads, c_batch, c_head)
    content, position = queries(tensors, block * BLOCK_M, q_time, keep_i, DIM, BLOCK_M, BLOCK_D)
    base = frames - (block + 1) * BLOCK_M  # row of R of the last query and key 0
    begin, end = keys_seen(block * BLOCK_M, (block + 1) * BLOCK_M - 1, sizes, BLOCK_N, WINDOW)
    last = band(position, tensors, i, q_time, keep_i, base + begin, sizes, DIM, BLOCK_M, BLOCK_N, BLOCK_D)
    first = last
    if BLOCK_M > BLOCK_N:
        after = base + begin + BLOCK_N
        last = band(position, tensors, i, q_time, keep_i, after, sizes, DIM, BLOCK_M, BLOCK_N, BLOCK_D)
    first = ready(first, last, BLOCK_M, BLOCK_N)
    row = (sequence * heads + head) * frames + i
    words = row_words(SEED, row)
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], SUM)
    y = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    bits = bits_of(biases, scale, cap)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        piece = band(
            position, tensors, i, q_time, keep_i, base + start + BLOCK_M, sizes, DIM, BLOCK_M, BLOCK_N, BLOCK_D
        )  # fmt: skip
        second = ready(last, piece, BLOCK_M, BLOCK_N)
        key = load_rows_from(
            tensors[1], start, q_time, tl.arange(0, BLOCK_D), j < keys, DIM
        )  # [BLOCK_N, BLOCK_D]
        partial = (start < seen_from) | (start + BLOCK_N > seen_to)
        scores = scores_of(
            first, second, content, key, tensors, biases, masks, i, q_time, keep_i, start, partial, sizes,
            scale, cap, DIM, BLOCK_M, BLOCK_N, BLOCK_D, WINDOW, BRANCHES,
        )  # fmt: skip
        first, last = second, piece
        if PRECISE:
            maximum, shrunk, e = running(maximum, scores, True)
        else:
            maximum, shrunk, e = running_in_bits(maximum, scores, bits)
        total = total * shrunk + sums(e, 1, PRECISE)
        e = dropped(e, SEED, words, j, threshold, factor)
        value = load_rows_from(tensors[2], start, v_time, c, j < keys, VALUE_DIM)  # [BLOCK_N, BLOCK_V]
        y = tl.dot(e.to(value.dtype), value, y * shrunk[:, None])
    total = total.to(tl.float32)
    none = total == 0.0
    y = y * tl.div_rn(1.0, tl.where(none, 1.0, total))[:, None]
    at = sequence * g_batch + head * VALUE_DIM + i.to(tl.int64)[:, None] * v_time + c[None, :]
    store_with_remainder(Y, REMAINDER, at, y, keep_i[:, None] & (c < VALUE_DIM)[None, :])
    if PRECISE:
        lse = maximum + tl.log(total)
    else:
        lse = (maximum + tl.log2(total)) * LN_2
    lse = tl.where(none, float("inf"), lse)
    once = keep_i & (tl.program_id(1) == 0)
    tl.store(LSE + row, lse, mask=once)


# --------------------------------------------------------------------------- launchers
def tiles(
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    generation: int,
    hiding: bool,
    dropping: bool,
    limited: bool,
    recordings: bool = False,
) -> dict[str, dict]:
    """Returns tile shapes, warps and stages by kernel; ``hiding`` says whether there is a mask of pairs, ``dropping``
    whether there is dropout, ``limited`` whether the context is, ``recordings`` whether there are several in a row.

    The tiles are the largest that do not spill (tests/kernels/budgets.toml). Products of float32 run without tensor
    cores unless TF32 is allowed, and need small tiles. The backward kernels of heads of 65 to 128 channels spill a few
    registers: blocks of 64 channels would fit, but they compute the scores for each, from operands that each loads.
    """
    wide = dtype == torch.float32
    block = 16 if wide else 32
    columns = min(32 if wide else 128, max(16, next_power_of_2(value_dim)))
    common = {"BLOCK_D": head_block(dim, dtype), "num_warps": 4} | dot_options(dtype)
    square = common | {"BLOCK": block, "BLOCK_V": columns, "num_stages": 2 if wide else 3}
    halves = {"BLOCK_D": 64} if dim > 64 and not wide else {}
    broad = 64 < dim <= 128 and not wide
    # without wgmma, a branch between two products would cost the layout that shifts in registers
    wgmma, widest = generation in (90, 100), max(dim, value_dim)
    forward = common | {
        "BLOCK_M": block,
        "BLOCK_N": block,
        "BLOCK_V": columns,
        "num_stages": 2,
        "BRANCHES": wgmma or hiding,
    }
    whole = generation == 90 or (wgmma and not (dropping or limited))
    if not (wide or hiding) and (dim <= 128 if whole else widest <= 64):
        forward["BLOCK_M"] = 64
        if generation == 90 and widest <= 64 and not (dropping and limited):
            forward["maxnreg"] = 168  # three programs on a multiprocessor instead of two
    else:
        forward |= halves
    inner = square | ({"num_warps": 8} if wide or dim > 64 else {})
    if broad:
        inner["num_stages"] = 1 if hiding else 2
    tall = {"BLOCK_M": 64} if generation == 90 and widest <= 64 and not (wide or hiding) else {}
    of_queries = {"BLOCK_M": 64, "num_warps": 4} if broad and generation == 90 and not hiding else tall
    products = common | {"BLOCK": 32, "num_stages": 3}  # blocks of dS as ``queries`` stores them
    crowding = hiding or (recordings and dim > 64)
    crowded = {"num_stages": 1} if crowding and dropping else {}  # loads ahead would spill
    roomy = generation == 120 and widest <= 64  # there the forward kernel spills without them
    # two warps have 8 columns each of 16 x 16; four compute all of them twice
    two = {"num_warps": 2} if rounded(dtype) else {}
    return {
        "forward": forward | ({} if roomy or forward["BLOCK_M"] == 64 else crowded) | two,
        "edges": {"BLOCK": 32, "BLOCK_D": common["BLOCK_D"], "num_warps": 4},
        "delta": {"BLOCK": 32, "BLOCK_V": columns, "num_warps": 4},
        "statistics": square | two,  # those of ``queries`` to the last bit, so that rows of dS add up to zero
        "queries": {"BLOCK_M": 32} | inner | {"BLOCK": 32} | of_queries,
        "keys": {"BLOCK_M": block} | tall | (square | {"num_stages": 1} | two if wide else inner | crowded),
        "offsets": products,
        "positions": products | {"WIDE": 1 if wide else 2},
    }


PROGRAMS = 1024  # for ``positions_kernel``
BIASES = {"BLOCK_P": 64, "BLOCK_C": 16, "num_warps": 4}


def rel_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pos: torch.Tensor | None,
    bias_u: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    offset_bias: torch.Tensor | None,
    offset_gate: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    left: int,
    right: int,
    chunk_size: int,
    soft_cap: float,
    before: int,
    behind: int,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (y (B, T, H, e), lse (B, H, T) in float32, inf where a query sees no key, and in 16 bits, if it is to
    ``keep`` it, what rounding takes from y, of y's shape, else no elements). All tensors are contiguous.
    """
    batch, frames, heads, dim = q.shape
    y = v.new_empty(batch, frames, heads, v.shape[3])
    lse = q.new_empty(batch, heads, frames, dtype=torch.float32)
    remainder = torch.empty_like(y) if keep and q.dtype != torch.float32 else y.new_empty(0)
    if not lse.numel():
        return y, lse, remainder
    sizes, window = _sizes(frames, k.shape[1], left, right, chunk_size, starts)
    table = None if starts is None else bounds(starts, frames)
    shapes = _tiles(q, v, attn_mask, dropout_p, window, starts is not None)
    tile, span = shapes["forward"], _span(q, k, pos, before, behind)
    edges = _edges(q, pos, bias_v, span, sizes, starts is not None, shapes["edges"])
    blocks = cdiv(frames, tile["BLOCK_M"])
    launch(forward_kernel, (heads * batch * blocks, cdiv(v.shape[3], tile["BLOCK_V"])),
        q, k, v, pos, edges, bias_u, bias_v, _by_head(offset_bias), offset_gate, key_bias,
        as_bytes(key_padding_mask), as_bytes(attn_mask), table, dropout_seed if dropout_p else None, y, lse,
        remainder if remainder.numel() else None,
        *sizes, batch, blocks, heads, *_strides(q, k, v, y), mask_stride(attn_mask), *_shared(key_bias), *span,
        *_last(dim, dropout_p, soft_cap),
        DIM=dim, VALUE_DIM=v.shape[3], WINDOW=window, **tile,
    )  # fmt: skip
    return y, lse, remainder


def _by_head(offset_bias: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a copy of the bias by offset in which the offsets of a head are neighbours."""
    return None if offset_bias is None else offset_bias.t().contiguous()


def _shared(key_bias: torch.Tensor | None) -> tuple[int, int]:
    """Returns the elements from one sequence, and from one head, of a bias by key to the next: 0 where all share it."""
    if key_bias is None:
        return 0, 0
    batch, heads, _ = key_bias.shape
    return key_bias.stride(0) * (batch > 1), key_bias.stride(1) * (heads > 1)


def _span(
    q: torch.Tensor, k: torch.Tensor, pos: torch.Tensor | None, before: int, behind: int
) -> tuple[int, int, int, int, int]:
    """Returns the kernels' (side, r_time, r_head, before, behind), see ``scores_of``."""
    batch, frames, heads, _ = q.shape
    if pos is None:
        return 0, 0, 0, 0, 0
    if before < 0:
        before, behind = k.shape[1] - 1, frames - 1
    return batch * heads * frames, pos.stride(0), pos.stride(1) * (pos.shape[1] > 1), before, behind


def _edges(
    q: torch.Tensor,
    pos: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    span: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int],
    recordings: bool,
    tile: dict[str, int],
) -> torch.Tensor | None:
    """Returns the products (2, B, H, T) with the first and the last row of R, None where every key that a query sees
    has a row."""
    batch, frames, heads, dim = q.shape
    _, keys, _, left, right = sizes
    *_, before, behind = span
    every = (before, behind) == (keys - 1, frames - 1)
    if pos is None or every or (recordings and 0 <= left <= before and 0 <= right <= behind):
        return None
    edges = q.new_empty(2, batch, heads, frames, dtype=torch.float32)
    blocks = cdiv(frames, tile["BLOCK"])
    launch(edges_kernel, (heads * batch * blocks,),
        q, pos, bias_v, edges, frames, batch, blocks, heads, q.stride(1), q.stride(0), *span, DIM=dim, **tile,
    )  # fmt: skip
    return edges


def _last(dim: int, dropout_p: float, soft_cap: float) -> tuple[int, float, float, float | None]:
    """Returns the kernels' last numbers: threshold, scale, factor and cap."""
    threshold, factor = dropout_constants(dropout_p)
    return threshold, dim**-0.5, factor, soft_cap or None


def _tiles(
    q: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    limited: bool,
    recordings: bool,
) -> dict[str, dict]:
    hiding, dropping = attn_mask is not None, dropout_p > 0
    options = q.dtype, generation(q), hiding, dropping, limited, recordings
    return chosen(tiles, rounded(q.dtype), q.shape[3], v.shape[3], *options)


def _strides(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor) -> tuple[int, ...]:
    return q.stride(1), v.stride(1), q.stride(0), k.stride(0), v.stride(0), y.stride(0)


def _sizes(
    frames: int, keys: int, left: int, right: int, chunk_size: int, starts: torch.Tensor | None
) -> tuple[tuple[int, int, int, int, int], bool]:
    """Returns the kernels' sizes, and whether any context is limited. No sum of them overflows."""
    limits = (min(n, keys) for n in (chunk_size, left, right))
    return (frames, keys, *limits), max(left, right) >= 0 or starts is not None


def _met(sizes: tuple[int, int, int, int, int], block: int) -> tuple[int, int, int]:
    """Returns (number, lowest, highest): a block of queries meets at most that many blocks of keys, and its rows of dS
    by offset lie in the blocks ``lowest`` to ``highest`` of offsets that ``positions_kernel`` counts.
    """
    frames, keys, chunk, left, right = sizes
    blocks, cached = cdiv(keys, block), keys - frames
    lowest, highest = -cdiv(frames, block), blocks - 1
    if left >= 0:
        lowest = max(lowest, (cached - chunk + 1 - left) // block - 1)
    if right >= 0:
        highest = min(highest, cdiv(block - 1 + cached + chunk + right, block) - 1)
    return min(blocks, highest - lowest), lowest, highest


def _each(units: int, programs: int) -> int:
    """Returns the units, sequences or blocks of queries, of a program of ``positions_kernel``, of which each unit takes
    ``programs``: so many that about PROGRAMS are left, as each group of units has a table of dR.
    """
    return cdiv(units, min(units, cdiv(PROGRAMS, programs)))


def rel_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pos: torch.Tensor | None,
    bias_u: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    offset_bias: torch.Tensor | None,
    offset_gate: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    remainder: torch.Tensor,
    dropout_p: float,
    left: int,
    right: int,
    chunk_size: int,
    soft_cap: float,
    before: int,
    behind: int,
) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of the nine tensors, None for those that are None. All tensors are contiguous."""
    batch, frames, heads, dim = q.shape
    given = q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias
    if not lse.numel():
        return tuple(None if t is None else torch.zeros_like(t) for t in given)
    dq, dk, dv, dpos, du, dw, dbias, dgate, dkey_bias = (
        None if t is None else torch.empty_like(t) for t in given
    )
    width, pairs, scale = heads * dim, heads * batch, dim**-0.5
    sizes, window = _sizes(frames, k.shape[1], left, right, chunk_size, starts)
    table = None if starts is None else bounds(starts, frames)
    shares = torch.float64 if q.dtype == torch.float32 else torch.float32
    shapes = _tiles(q, v, attn_mask, dropout_p, window, starts is not None)
    constants = {"DIM": dim, "VALUE_DIM": v.shape[3], "WINDOW": window}
    span = _span(q, k, pos, before, behind)
    strides = *_strides(q, k, v, grad), mask_stride(attn_mask), *_shared(key_bias), *span
    last = _last(dim, dropout_p, soft_cap)
    edges = _edges(q, pos, bias_v, span, sizes, starts is not None, shapes["edges"])
    operands = (
        grad, q, k, v, pos, edges, bias_u, bias_v, _by_head(offset_bias), offset_gate, key_bias,
        as_bytes(key_padding_mask), as_bytes(attn_mask), table, dropout_seed if dropout_p else None, lse,
    )  # fmt: skip
    inverse, delta = None, torch.empty_like(lse)
    if q.dtype == torch.float32:
        blocks = cdiv(frames, shapes["statistics"]["BLOCK"])
        inverse = torch.empty_like(lse)
        launch(statistics_kernel, (pairs * blocks,),
            *operands, inverse, delta, *sizes, batch, blocks, heads, *strides, *last,
            **constants, **shapes["statistics"],
        )  # fmt: skip
    else:
        launch(delta_kernel, (cdiv(lse.numel(), shapes["delta"]["BLOCK"]),),
            grad, out, remainder, delta, lse.numel(), frames, heads, VALUE_DIM=v.shape[3], **shapes["delta"],
        )  # fmt: skip
    operands = *operands, inverse, delta
    content = dq if pos is None else torch.empty_like(q, dtype=torch.float32)
    by_offset = pos is not None or offset_bias is not None

    tile = shapes["queries"]
    block = tile["BLOCK"]
    blocks = cdiv(frames, block)
    met, lowest, highest = _met(sizes, block)
    joined = {"EACH": tile["BLOCK_M"] // block}  # blocks of queries that are one in ``queries``
    row = (min(met + joined["EACH"] - 1, cdiv(k.shape[1], block)) + 1) * block  # a row of dS by offset
    room = PIECE_BYTES // (pairs * q.element_size())
    step = max(1, room // row // tile["BLOCK_M"]) * joined["EACH"] if by_offset else blocks
    of_program = shapes["positions"]["WIDE"]  # blocks of offsets of a program
    programs = heads * cdiv(highest - lowest + 1, of_program)
    each = 1 if q.dtype == torch.float32 else _each(batch, programs)
    groups, keys = cdiv(batch, each), k.shape[1]
    held = [
        (n // step, n, min(step, blocks - n)) for n in range(0, blocks, step)
    ]  # piece, first block, blocks
    size, of_blocks = cdiv(min(step, blocks), joined["EACH"]) * tile["BLOCK_M"] * row, None
    if table is not None and by_offset:
        reach = (frames if n < 0 else n for n in sizes[3:])
        of_blocks, count, size = pieces(starts, table, *reach, tile["BLOCK_M"], block, block, room)
        row, held = size, [(n, 0, blocks) for n in range(count)]
        groups = batch * cdiv(blocks, _each(blocks, programs * batch))
    ds = q.new_empty(pairs * size) if by_offset else None
    low, high = max(frames + lowest * block, 0), min(frames + (highest + 1) * block, frames + keys - 1)
    first_row, last_row = low, high  # the offsets of dR's rows that ``positions`` adds up
    *_, before, behind = span
    if pos is not None:  # with edges those between the first row and the last one
        first_row = max(low, keys - 1 - before + (edges is not None))
        last_row = max(first_row, min(high, keys + behind - (edges is not None)))
    parts, bias_parts = None, None
    adds = table is not None or len(held) > 1  # else a launch of ``positions`` meets all queries
    made = torch.zeros if adds else torch.empty
    if pos is not None:
        parts = made(groups, last_row - first_row, width, dtype=shares, device=q.device)
    if (
        offset_bias is not None
    ):  # a table of each piece: adding to numbers that several threads read would be a race
        shape = len(held), groups, high - low, heads
        bias_parts = made(shape, dtype=shares, device=q.device)
    tables = [(parts, bias_parts, low, high)]
    if (first_row, last_row) != (low, high):
        tables = [(parts, None, first_row, last_row), (None, bias_parts, low, high)]
    shared = (
        pos is not None and pos.shape[1] < heads
    )  # then heads come before rows, as groups do: all are added
    order = (dim, (last_row - first_row) * dim) if shared else (width, dim)
    sums_of = torch.empty(2, batch * blocks, width, dtype=shares, device=q.device)
    edge_sums = None if edges is None else torch.empty_like(sums_of)
    columns, of_products = (cdiv(dim, shapes[name]["BLOCK_D"]) for name in ("queries", "offsets"))
    for piece, first, count in held:
        rows = min(count * block, frames - first * block)
        of_queries = cdiv(count, joined["EACH"])
        launch(queries_kernel, (pairs * of_queries, columns),
            *operands, content, ds, None if bias_u is None else sums_of[0], dgate, of_blocks,
            *sizes, first * block, rows, piece, batch, of_queries, blocks, heads, *strides, row, *last,
            **constants, **tile,
        )  # fmt: skip
        if pos is not None:
            launch(offsets_kernel, (pairs * count, of_products),
                ds, q, pos, edges, bias_v, content, dq, None if bias_v is None else sums_of[1], edge_sums, table,
                of_blocks, *sizes, first, piece, batch, count, blocks, heads,
                q.stride(1), q.stride(0), *span, row, scale, DIM=dim, WINDOW=window, **joined, **shapes["offsets"],
            )  # fmt: skip
        for found, biases, begin, end in tables:
            here = max((begin - frames) // block, -first - count)  # offsets of the piece, in blocks
            tall = cdiv(
                min((end - 1 - frames) // block, cdiv(keys, block) - 1 - first) - here + 1, of_program
            )
            if tall > 0 and (found is not None or biases is not None):
                launch(positions_kernel, (heads * groups * tall, 1 if found is None else of_products),
                    ds, q, bias_v, offset_gate, found, None if biases is None else biases[piece], table, of_blocks,
                    *sizes, first, count, piece, here, begin, end, each, groups, batch, tall, heads,
                    q.stride(1), q.stride(0), *order, row, scale,
                    DIM=dim, WINDOW=window, ADDS=adds, **joined, **shapes["positions"],
                )  # fmt: skip
    if dpos is not None:
        at = first_row - (keys - 1) + before
        inner = dpos[at : at + last_row - first_row]
        if len(inner) + (0 if edges is None else 2) < len(dpos):  # the other offsets have no pair
            dpos.zero_()
        if inner.numel():
            add_tables(parts, inner, parts.numel() // inner.numel())
    if dbias is not None:
        if window:
            dbias.zero_()
        add_tables(bias_parts, dbias[low:high], bias_parts.shape[:2].numel())
    if edge_sums is not None:
        ends = [dpos[0], dpos[-1]][: dpos.shape[0]]  # one row is both
        columns_of = ends[0].numel()
        launch(biases_kernel, (cdiv(columns_of, BIASES["BLOCK_C"]), len(ends)),
            edge_sums, ends[0], ends[-1], edge_sums.numel() // columns_of // len(ends), columns_of, **BIASES,
        )  # fmt: skip
    if bias_u is not None or bias_v is not None:
        launch(biases_kernel, (cdiv(width, BIASES["BLOCK_C"]), 1 if bias_v is None else 2),
            sums_of, du, dw, batch * blocks, width, **BIASES,
        )  # fmt: skip

    tile = shapes["keys"]
    blocks = cdiv(k.shape[1], tile["BLOCK"])
    columns = max(cdiv(dim, tile["BLOCK_D"]), cdiv(v.shape[3], tile["BLOCK_V"]))
    of_pairs, s_batch, s_head = None, 0, 0
    if dkey_bias is not None:
        # heads before sequences where heads share the bias: a sum over the first axes is then a sum of tables
        by_head = dkey_bias.shape[1] == 1
        s_batch, s_head = (keys, batch * keys) if by_head else (heads * keys, keys)
        of_pairs = torch.empty(pairs * keys, dtype=shares, device=q.device)
    launch(keys_kernel, (pairs * blocks, columns),
        *operands, dk, dv, of_pairs, *sizes, batch, blocks, heads, *strides, s_batch, s_head, *last,
        **constants, **tile,
    )  # fmt: skip
    if dkey_bias is not None:
        add_tables(of_pairs, dkey_bias, of_pairs.numel() // dkey_bias.numel())
    return dq, dk, dv, dpos, du, dw, dbias, dgate, dkey_bias
