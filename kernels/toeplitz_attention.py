# SPDX-License-Identifier: Apache-2.0
"""Gated attention of one head with a bias of the distance; tensors of length x length reach memory in pieces.

    q = act(x) w0 + b0, k = act(x) w1 + b1, S_ij = q_i k_j / sqrt(d) + bias[j - i], s = softmax_j(S), h = (s M) v,
    y = h act(gate)
    With g = dy act(gate): dgate = dy h act'(gate), dv = (s M)^T g, dA = (g v^T) M, D = sum_j s dA, dS = s (dA - D),
    dq = dS k / sqrt(d), dk = dS^T q / sqrt(d), dbias[t] = sum over j - i = t of dS, and from dq, dk those of x, w, b.

A unit is a chunk of a sequence. Its N = L B frames have d channels of queries and V of values, of e bytes:

    kernel       program                       products per pair    reads and writes, in elements per frame
    prepare      4 frames                      -                    x, q, k; v twice if activated; backward dy, gate, h,
                                                                    g, dgate
    forward      queries x columns of v        d + columns          q, k, v, gate; y, h
    slopes       queries                       -                    two elements per pair, twice
    diagonals    rows x distances              -                    an element per pair
    values       a frame                       -                    v, dv twice
    parameters   frames                        -                    x, dq, dk; dx

The forward pass sweeps the keys once with a running maximum; the scores of a tile serve all columns that fit registers:
up to 512 of 16 bits. The backward pass works on whole units, or on queries of one unit, of which a tensor of pairs fits
PIECE_BYTES: torch multiplies q k / sqrt(d) and g v^T; ``slopes`` turns them into s M and dS in place; torch multiplies
these with g, k and q. No product is computed twice, and memory stays O(L). Where a unit takes several pieces, dk and
dv are added up in float32. D is the sum over the row of dA that was read, so rows of dS add up to zero as nearly as
their elements can, which the sums over them rely on.

A program of ``diagonals`` sums a block of distances over a part of the rows. Parts are added in float64, as are those
of the parameters. What a program does depends on the shape and on the generation and the multiprocessors of the GPU: on
one kind of device results repeat bit for bit, without atomics.
"""

import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastasr.kernels._activation import activate_with_slope
from fastasr.kernels._attention_tiles import (
    NONE,
    dropped,
    load_rows,
    load_rows_from,
    products,
    running,
    span,
    sums,
)
from fastasr.kernels._launch import (
    cdiv,
    dot_options,
    generation,
    launch,
    next_power_of_2,
    processors,
    rounded,
)
from fastasr.kernels._parts import add_parts
from fastasr.kernels._toeplitz_attention_backward import (
    MARGIN,
    biases,
    diagonals_kernel,
    parameters_kernel,
    sees,
    slopes_kernel,
    values_kernel,
)
from fastasr.kernels._vectors import load

MAX_PARTS = 512
PIECE_BYTES = (
    16 << 20
)  # A tensor of pairs has at most this many: both stay in the second-level cache of most GPUs.


# --------------------------------------------------------------------------- elementwise, per frame
@triton.jit
def _floats(X, r, stride, c, keep, width):
    """Loads [rows, columns] of X in float32, with zeros outside."""
    return load((X + r.to(tl.int64) * stride)[:, None] + c[None, :], keep[:, None] & (c < width)[None, :])


@triton.jit(do_not_specialize=["entries", "length", "size", "count", "blocks"])
def prepare_kernel(
    X, WEIGHT, SHIFT, BIAS, PADDING, VALUE, GATE, GRAD, MIXED, QUERY, KEY, TABLE, HIDDEN, ACTIVE, G, DGATE,
    entries, length, size, count, blocks, D, V, x_time, x_batch, value_time, value_batch, gate_time, gate_batch,
    grad_time, grad_batch, out_time,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes q, k, the bias of the distance in float32 between MARGIN zeros, the keys that are hidden and act(value);
    in the backward also g and dgate. Tables hold ``size`` frames of every unit.
    """
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    unit, batch, first, n, block = span(tl.program_id(0), blocks, length, size, count)
    i = block * BLOCK_T + tl.arange(0, BLOCK_T)
    keep = i < n
    row = unit * size
    padded = entries + 2 * MARGIN
    for start in range(tl.program_id(0) * BLOCK_C, padded, tl.num_programs(0) * BLOCK_C):
        t = start + tl.arange(0, BLOCK_C)
        entry = tl.load(BIAS + t - MARGIN, mask=(t >= MARGIN) & (t < entries + MARGIN), other=0.0)
        tl.store(TABLE + t, entry.to(tl.float32), mask=t < padded)
    if HIDDEN is not None:
        visible = 0
        for start in range(0, n, BLOCK_C):
            j = start + tl.arange(0, BLOCK_C)
            visible += tl.sum(
                (tl.load(PADDING + batch * length + first + j, mask=j < n, other=1) == 0).to(tl.int32)
            )
        padding = tl.load(PADDING + batch * length + first + i, mask=keep, other=0).to(tl.int32)
        tl.store(HIDDEN + row + i, ((padding != 0) & (visible > 0)).to(tl.int8), mask=keep)
    for start in range(0, WIDTH, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = _floats(X + batch * x_batch + first * x_time, i, x_time, c, keep, D)
        z, slope = activate_with_slope(x, ACTIVATION, PRECISE)
        in_row = c < D
        w = tl.load(WEIGHT + c, mask=in_row, other=0.0).to(tl.float32)
        b = tl.load(SHIFT + c, mask=in_row, other=0.0).to(tl.float32)
        q = tl.fma(z, w[None, :], b[None, :])
        w = tl.load(WEIGHT + D + c, mask=in_row, other=0.0).to(tl.float32)
        b = tl.load(SHIFT + D + c, mask=in_row, other=0.0).to(tl.float32)
        k = tl.fma(z, w[None, :], b[None, :])
        offsets = (row + i)[:, None] * WIDTH + c[None, :]
        whole = (i < size)[:, None] & (c < WIDTH)[None, :]
        tl.store(QUERY + offsets, q.to(QUERY.dtype.element_ty), mask=whole)
        tl.store(KEY + offsets, k.to(KEY.dtype.element_ty), mask=whole)
    if (ACTIVE is not None) or (G is not None):
        for start in range(0, V, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            whole = (i < size)[:, None] & (c < V)[None, :]
            offsets = (row + i)[:, None] * V + c[None, :]
            if ACTIVE is not None:
                base = VALUE + batch * value_batch + first * value_time
                v, slope = activate_with_slope(_floats(base, i, value_time, c, keep, V), ACTIVATION, PRECISE)
                tl.store(ACTIVE + offsets, v.to(ACTIVE.dtype.element_ty), mask=whole)
            if G is not None:
                gate = _floats(GATE + batch * gate_batch + first * gate_time, i, gate_time, c, keep, V)
                dy = _floats(GRAD + batch * grad_batch + first * grad_time, i, grad_time, c, keep, V)
                act, slope = activate_with_slope(gate, ACTIVATION, PRECISE)
                tl.store(G + offsets, (dy * act).to(G.dtype.element_ty), mask=whole)
                out = (first + i)[:, None] * out_time + batch * V + c[None, :]
                whole = keep[:, None] & (c < V)[None, :]
                h = load(MIXED + out, whole)
                tl.store(DGATE + out, (dy * h * slope).to(DGATE.dtype.element_ty), mask=whole)


# --------------------------------------------------------------------------- forward
@triton.jit(do_not_specialize=["length", "size", "count", "blocks"], do_not_specialize_on_alignment=["TABLE"])
def forward_kernel(
    QUERY, KEY, VALUE, GATE, TABLE, HIDDEN, DROPOUT, Y, MIXED,
    length, size, count, blocks, V, value_time, value_batch, gate_time, gate_batch, out_time, scale,
    CAUSAL: tl.constexpr, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes y and h of a block of queries and of columns. TABLE points at distance 0."""
    PRECISE: tl.constexpr = QUERY.dtype.element_ty == tl.float32
    unit, batch, first, n, block = span(tl.program_id(0), blocks, length, size, count)
    block = blocks - 1 - block  # the longest first
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_i = i < n
    QUERY += unit * size * WIDTH
    KEY += unit * size * WIDTH
    VALUE += batch * value_batch + first * value_time
    if HIDDEN is not None:
        HIDDEN += unit * size
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    if WIDTH == BLOCK_D:
        query = load_rows(QUERY, i, WIDTH, tl.arange(0, BLOCK_D), keep_i, WIDTH)  # [BLOCK_M, WIDTH]
    maximum = tl.full([BLOCK_M], NONE, tl.float32)
    # a mask of rows and 512 columns leave no registers for sums of threads and for offsets that do not change
    ROOM: tl.constexpr = HIDDEN is None or BLOCK_V <= 256
    # in 16 bits a thread adds up its own keys: sums across warps would cost three barriers per tile
    OWN: tl.constexpr = not PRECISE and ROOM and DROPOUT is None  # whose tiles have rows in one warp
    total = tl.zeros([BLOCK_M, BLOCK_N] if OWN else [BLOCK_M], tl.float64 if PRECISE else tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    end = n
    if CAUSAL:
        end = tl.minimum(n, (block + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keep_j = j < n
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if WIDTH == BLOCK_D:
            key = load_rows_from(KEY, start, WIDTH, tl.arange(0, BLOCK_D), keep_j, WIDTH)  # [BLOCK_N, WIDTH]
            scores = tl.dot(query, tl.trans(key), scores)
        else:
            scores = products(scores, QUERY, i, WIDTH, keep_i, KEY, j, WIDTH, keep_j, WIDTH, BLOCK_D)
        bias = biases(TABLE, block * BLOCK_M, start, BLOCK_M, BLOCK_N)
        if HIDDEN is not None:  # a hidden frame's value does not matter
            keep_j = keep_j & (tl.load(HIDDEN + j, mask=keep_j, other=1) == 0)
        seen = sees(i, j, keep_j, n, HIDDEN is not None, CAUSAL)
        scores = tl.where(seen, tl.fma(scores, scale, bias), NONE)
        maximum, factor, e = running(maximum, scores, PRECISE)
        if OWN:
            total = tl.fma(total, factor[:, None], e)
        else:
            total = total * factor + sums(e, 1, PRECISE)
        e = dropped(e, DROPOUT, unit, i[:, None], j[None, :], n, size)
        if ROOM:
            value = load_rows_from(VALUE, start, value_time, c, keep_j, V)  # [BLOCK_N, BLOCK_V]
        else:
            value = load_rows(VALUE, j, value_time, c, keep_j, V)
        mixed = tl.dot(e.to(value.dtype), value, mixed * factor[:, None])
    if OWN:
        total = tl.sum(total, axis=1)
    mixed = mixed * tl.div_rn(1.0, total.to(tl.float32))[:, None]
    gate = load_rows(GATE + batch * gate_batch + first * gate_time, i, gate_time, c, keep_i, V).to(tl.float32)
    act, _ = activate_with_slope(gate, ACTIVATION, PRECISE)
    out = (first + i) * out_time + batch * V
    whole = keep_i[:, None] & (c < V)[None, :]
    tl.store((Y + out)[:, None] + c[None, :], (mixed * act).to(Y.dtype.element_ty), mask=whole)
    if MIXED is not None:
        tl.store((MIXED + out)[:, None] + c[None, :], mixed.to(MIXED.dtype.element_ty), mask=whole)


# --------------------------------------------------------------------------- launchers
class _Plan:
    """The sizes that the launches of one call share."""

    def __init__(
        self, query_key, value, position_bias, dropout, causal, chunk_size, activation, activate_value
    ):
        self.length, self.batch, self.d = query_key.shape
        self.v = value.shape[2]
        self.size = max(1, min(chunk_size, self.length) if chunk_size > 0 else self.length)
        self.count = cdiv(self.length, self.size)
        self.units = self.batch * self.count
        self.padded = self.count * self.size  # frames of a sequence with those behind the last
        self.reach = position_bias.shape[0] // 2
        self.causal, self.activation, self.activate_value = causal, activation, activate_value
        self.dtype, self.device = query_key.dtype, query_key.device
        self.scale = self.d**-0.5
        # says whether programs with half as many columns would only take turns
        full = self.programs(32) * cdiv(self.v, 512) >= processors(query_key)
        self.width, self.blocks = tiles(
            self.d, self.v, self.dtype, generation(query_key), dropout is not None, full
        )

    def frames(self, block: int) -> tuple[int, int, int, int]:
        """Returns (length, size, count, blocks per unit) for blocks of that many frames."""
        return self.length, self.size, self.count, cdiv(self.size, block)

    def programs(self, block: int) -> int:
        return self.units * cdiv(self.size, block)

    def piece(self, stride: int) -> tuple[int, int]:
        """Returns (units, queries of each) whose rows of ``stride`` pairs fit PIECE_BYTES: units or part of one."""
        rows = max(1, PIECE_BYTES // (stride * self.dtype.itemsize))
        return (
            (min(rows // self.size, self.units), self.size) if rows >= self.size else (1, cdiv(rows, 16) * 16)
        )

    def by_unit(self, t: torch.Tensor) -> torch.Tensor:
        """Returns (frames, batch, channels) as (units, frames of a unit, channels), zeros behind the last frame."""
        if len(t) < self.padded:
            t = F.pad(t, (0, 0, 0, 0, 0, self.padded - len(t)))
        return t.transpose(0, 1).reshape(self.units, self.size, self.v)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


def tiles(
    d: int, v: int, dtype: torch.dtype, generation: int, dropout: bool, full: bool
) -> tuple[int, dict[str, dict[str, int]]]:
    """Returns (channels of a row of q and k, tile shapes, warps and stages by kernel). ``full`` says whether programs
    of 32 rows and 512 columns fill the device.

    The tiles are the largest that do not spill (tests/kernels/budgets.toml). Products of float32 run without tensor
    cores unless TF32 is allowed. In 16 bits and without dropout 32 rows have up to 512 columns of v where operands come
    from shared memory, 256 elsewhere. Their scores are then computed twice or four times at V = 1024 instead of eight
    times.
    """
    wide = dtype == torch.float32
    from_shared = generation in (90, 100) and not wide  # operands of products, which leaves more registers
    block_d = min(32 if wide else 128, max(16, next_power_of_2(d)))
    columns = max(16, next_power_of_2(v))
    own = {"BLOCK_D": block_d, "BLOCK_V": min(64 if wide else 128, columns), "num_warps": 8, "num_stages": 2}
    own |= dot_options(dtype)
    inner = own | {"BLOCK_V": min(32 if wide else 64, columns)}
    four = own if wide or from_shared else inner | {"num_warps": 4}
    shapes = {
        "forward": {"BLOCK_M": 64, "BLOCK_N": 64 if wide or (from_shared and d <= 128) else 32, **four},
        "slopes": {"BLOCK_M": 4, "BLOCK_N": 128, "num_warps": 4},
        "diagonals": {"BLOCK_R": 32, "BLOCK_T": 64, "num_warps": 4},
    }
    if wide and not rounded(dtype) and generation in (80, 90, 100):
        # left alone, the assembler spills for two programs on a multiprocessor
        shapes["forward"]["maxnreg"] = 160
    if not wide and not dropout and d <= block_d:
        columns = min(512 if from_shared and full else 256, columns)
        shapes["forward"] |= {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_V": columns, "num_warps": 8}
    return cdiv(d, block_d) * block_d, shapes


def _strides(t: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


PREPARE = {"BLOCK_T": 4, "BLOCK_C": 256, "num_warps": 4}
VALUES = {"BLOCK_C": 1024, "num_warps": 4}
PARAMETERS = {"BLOCK_R": 8, "BLOCK_C": 128, "num_warps": 4}


def _prepared(
    p: _Plan, query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask, grad=None, mixed=None
):
    """Returns (q, k, the bias in float32 from distance 0 on, keys that are hidden, value activated, g, dgate), the last
    two for a backward alone. Kernels read the bias beyond its ends too, where margins lie, instead of masking each
    element; and from float32, as 2 bytes cannot be fetched ahead.
    """
    rows = p.units * p.size
    query, key = p.empty(rows, p.width), p.empty(rows, p.width)
    entries = len(position_bias)
    table = p.empty(entries + 2 * MARGIN.value, dtype=torch.float32)
    hidden = None if padding_mask is None else p.empty(rows, dtype=torch.int8)
    active = p.empty(p.batch, p.padded, p.v).transpose(0, 1) if p.activate_value else None
    g = dgate = None
    if grad is not None:
        g, dgate = p.empty(rows, p.v), p.empty(*gate.shape)
    launch(prepare_kernel, (p.programs(PREPARE["BLOCK_T"]),),
        query_key, qk_weight, qk_bias, position_bias,
        None if hidden is None else padding_mask.view(torch.int8),
        value if p.activate_value else None, None if g is None else gate, grad, mixed,
        query, key, table, hidden, active, g, dgate,
        entries, *p.frames(PREPARE["BLOCK_T"]), p.d, p.v, *_strides(query_key), *_strides(value), *_strides(gate),
        *_strides(grad), p.batch * p.v, ACTIVATION=p.activation, WIDTH=p.width, **PREPARE,
    )  # fmt: skip
    at_zero = table[MARGIN.value + p.reach :]
    return query, key, at_zero, hidden, active if p.activate_value else value, g, dgate


def toeplitz_attention_forward(
    query_key: torch.Tensor,
    gate: torch.Tensor,
    value: torch.Tensor,
    qk_weight: torch.Tensor,
    qk_bias: torch.Tensor,
    position_bias: torch.Tensor,
    padding_mask: torch.Tensor | None,
    dropout: torch.Tensor | None,
    causal: bool,
    chunk_size: int,
    activation: int,
    activate_value: bool,
    need_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (y, h), contiguous; h has no elements unless needed. The channels of the first three are dense; the
    parameters are contiguous, of any dtype, dropout is contiguous float32, padding_mask is contiguous.
    """
    p = _Plan(query_key, value, position_bias, dropout, causal, chunk_size, activation, activate_value)
    y = p.empty(*gate.shape)
    mixed = p.empty(*gate.shape) if need_gradients else p.empty(0)
    if not y.numel():
        return y, mixed
    query, key, bias, hidden, value, *_ = _prepared(
        p, query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask
    )
    tile = p.blocks["forward"]
    launch(forward_kernel, (p.programs(tile["BLOCK_M"]), cdiv(p.v, tile["BLOCK_V"])),
        query, key, value, gate, bias, hidden, dropout, y, mixed if need_gradients else None,
        *p.frames(tile["BLOCK_M"]), p.v, *_strides(value), *_strides(gate), p.batch * p.v, p.scale,
        CAUSAL=causal, ACTIVATION=activation, WIDTH=p.width, **tile,
    )  # fmt: skip
    return y, mixed


def toeplitz_attention_backward(
    grad: torch.Tensor,
    query_key: torch.Tensor,
    gate: torch.Tensor,
    value: torch.Tensor,
    qk_weight: torch.Tensor,
    qk_bias: torch.Tensor,
    position_bias: torch.Tensor,
    padding_mask: torch.Tensor | None,
    dropout: torch.Tensor | None,
    mixed: torch.Tensor,
    causal: bool,
    chunk_size: int,
    activation: int,
    activate_value: bool,
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of the six tensors, those of qk_weight and qk_bias in one dtype. ``grad`` has dense
    channels, h is contiguous.
    """
    p = _Plan(query_key, value, position_bias, dropout, causal, chunk_size, activation, activate_value)
    tensors = query_key, gate, value, qk_weight, qk_bias, position_bias
    if not gate.numel():
        return tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
    dquery_key, dvalue = p.empty(*query_key.shape), p.empty(*value.shape)
    of_pair = torch.promote_types(qk_weight.dtype, qk_bias.dtype)
    parameters, dposition_bias = p.empty(4, p.d, dtype=of_pair), torch.empty_like(position_bias)
    query, key, bias, hidden, active, g, dgate = _prepared(
        p, query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask, grad, mixed
    )
    query, key, g = (t.view(p.units, p.size, -1) for t in (query, key, g))
    active = p.by_unit(active)
    shares = torch.float64 if p.dtype == torch.float32 else torch.float32
    stride = cdiv(p.size, 16) * 16  # rows of pairs are aligned
    each, step = p.piece(stride)
    weights, slopes = p.empty(each * step * stride), p.empty(each * step * stride)
    dquery = torch.empty_like(query)
    if step == p.size:
        dkey, dv, product = torch.empty_like(key), torch.empty_like(g), _put
    else:
        dkey, dv, product = *(torch.zeros_like(t, dtype=torch.float32) for t in (key, g)), _add
    tile, diagonal = p.blocks["slopes"], p.blocks["diagonals"]
    entries = position_bias.shape[0]
    reaches = cdiv(entries, diagonal["BLOCK_T"])
    diagonals = p.empty(max(1, MAX_PARTS // reaches), entries, dtype=shares)
    with torch.autocast(p.device.type, enabled=False):  # autocast would take products of float32 in 16 bits
        for unit, first in itertools.product(range(0, p.units, each), range(0, p.size, step)):
            units, rows = min(each, p.units - unit), min(step, p.size - first)
            keys = first + rows if causal else p.size
            q, gs = (t[unit : unit + units, first : first + rows] for t in (query, g))
            k, v, dk, dvs = (t[unit : unit + units, :keys] for t in (key, active, dkey, dv))
            w, ds = (
                t[: units * rows * stride].view(units, rows, stride)[..., :keys] for t in (weights, slopes)
            )
            torch.baddbmm(w, q, k.mT, beta=0, alpha=p.scale, out=w)
            torch.bmm(gs, v.mT, out=ds)
            blocks = cdiv(rows, tile["BLOCK_M"])
            launch(slopes_kernel, (units * blocks,),
                w, ds, bias, hidden, dropout,
                p.length, p.size, p.count, unit, first, rows, blocks, keys, stride, CAUSAL=causal, **tile,
            )  # fmt: skip
            launch(diagonals_kernel, (reaches, len(diagonals)),
                ds, diagonals, units, first, rows, keys, p.reach, int(unit + first == 0), stride, **diagonal,
            )  # fmt: skip
            torch.bmm(ds, k, out=dquery[unit : unit + units, first : first + rows])
            product(dk, ds.mT, q)
            product(dvs, w.mT, gs)
    add_parts(diagonals, dposition_bias)

    launch(values_kernel, (p.batch * p.length, cdiv(p.v, VALUES["BLOCK_C"])),
        dv, value if activate_value else None, dvalue, p.length, p.padded, p.v, *_strides(value), p.batch * p.v,
        ACTIVATION=activation, **VALUES,
    )  # fmt: skip

    rows = p.length * p.batch
    rows_per_part = cdiv(cdiv(rows, MAX_PARTS), PARAMETERS["BLOCK_R"]) * PARAMETERS["BLOCK_R"]
    parts = cdiv(rows, rows_per_part)
    table = p.empty(4, parts, p.d, dtype=shares)
    launch(parameters_kernel, (parts, cdiv(p.d, PARAMETERS["BLOCK_C"])),
        query_key, qk_weight, dquery, dkey, dquery_key, table, rows, p.length, p.padded, rows_per_part, p.d, p.scale,
        *_strides(query_key), p.batch * p.d, ACTIVATION=activation, WIDTH=p.width, **PARAMETERS,
    )  # fmt: skip
    add_parts(table, parameters)
    return dquery_key, dgate, dvalue, parameters[:2], parameters[2:], dposition_bias


def _put(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.bmm(a, b, out=out)


def _add(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    out += torch.bmm(a, b)
