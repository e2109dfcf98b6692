# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of values by attention weights that are in memory, one kernel each way.

    y[t,b,h] = sum_s W[h,b,t,s] V[s,b,h]      dV[s,b,h] = sum_t W[h,b,t,s] G[t,b,h]      dW[h,b,t,s] = G[t,b,h] V[s,b,h]

The weights are by far the largest operand: a kernel reads them once, and the backward writes dW, or adds to it, while
it has the weights. The heads of V, of 12 channels in Zipformers, lie side by side, and are neither copied nor padded.
Bytes per weight of e bytes: forward e, backward 2e, or 3e where dW is added.

VECTOR is how many numbers of a row one load may take. Where the end of a row divides such a vector, a kernel loads it
all, and stores its elements alone.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._attention_tiles import load_rows
from fastasr.kernels._launch import cdiv, dot_options, generation, launch, next_power_of_2, rounded
from fastasr.kernels._vectors import begun, vector

SIZES = ["targets", "sources", "batch", "blocks"]


@triton.jit
def _pair(batch, blocks):
    """Returns the head, the sequence and the block of this program."""
    pair = tl.program_id(0) // blocks
    return (pair // batch).to(tl.int64), (pair % batch).to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def _plus(a, b, total, PRECISE: tl.constexpr):
    """Returns total + a b. Of float32, one chain of additions would round more than eager's."""
    if PRECISE:
        return tl.fma(tl.dot(a, b), 1.0, total)
    return tl.dot(a, b, total)


@triton.jit
def _add_sources(
    y, W, V, j, c, rows, left, w_at, v_at,
    WHOLE: tl.constexpr, DIM: tl.constexpr, VECTOR: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Returns y + the sum over the next sources, of which ``left`` are left: all of the tile where WHOLE."""
    keep_w, keep_v = rows[:, None], (c < DIM)[None, :]
    if not WHOLE:
        keep_w, keep_v = keep_w & begun(j, left, VECTOR)[None, :], keep_v & (j < left)[:, None]
    w = tl.load(W + w_at, mask=keep_w, other=0.0)  # [BLOCK_M, BLOCK_N]
    if not WHOLE:
        w = tl.where((j < left)[None, :], w, 0.0)
    v = tl.load(V + v_at, mask=keep_v, other=0.0)  # [BLOCK_N, BLOCK_V]
    return _plus(w, v, y, PRECISE)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    W, V, Y, targets, sources, batch, blocks, heads, w_head, w_batch, w_row,
    VECTOR: tl.constexpr, DIM: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    head, sequence, block = _pair(batch, blocks)
    i, j, c = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    step, w_row = tl.cast(batch * heads * DIM, tl.int64), tl.cast(w_row, tl.int64)  # between frames
    first = (sequence * heads + head) * DIM
    W += head * w_head + sequence * w_batch
    V += first
    w_at, v_at = i[:, None] * w_row + j[None, :], j[:, None] * step + c[None, :]
    rows = i < targets
    y = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    whole = sources // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        v = V + start * step
        y = _add_sources(y, W + start, v, j, c, rows, BLOCK_N, w_at, v_at, True, DIM, VECTOR, PRECISE)
    if whole < sources:
        v, left = V + whole * step, sources - whole
        y = _add_sources(y, W + whole, v, j, c, rows, left, w_at, v_at, False, DIM, VECTOR, PRECISE)
    out = Y + first + i[:, None] * step + c[None, :]
    tl.store(out, y.to(Y.dtype.element_ty), mask=rows[:, None] & (c < DIM)[None, :])


@triton.jit
def _write_slopes(at, g, v, keep, ADD: tl.constexpr):
    """Writes G V, or adds it to what is there."""
    dw = tl.dot(g, tl.trans(v))
    if ADD:
        dw += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    tl.store(at, dw.to(at.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    G, W, V, DW, DV, targets, sources, batch, blocks, heads, w_head, w_batch, w_row, dw_head, dw_batch, dw_row,
    VECTOR: tl.constexpr, ADD: tl.constexpr, DIM: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """With ADD this gradient is added to the one that DW has."""
    head, sequence, block = _pair(batch, blocks)
    i, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.cast(batch * heads * DIM, tl.int64)
    w_row, dw_row = tl.cast(w_row, tl.int64), tl.cast(dw_row, tl.int64)
    first = (sequence * heads + head) * DIM
    W += head * w_head + sequence * w_batch
    DW += head * dw_head + sequence * dw_batch
    G, V = G + first, V + first
    w_at, dw_at, g_at = i[:, None] * w_row + j[None, :], i[:, None] * dw_row, i[:, None] * step + c[None, :]
    there = (c < DIM)[None, :]
    whole = sources // VECTOR * VECTOR  # where the last vector ends that is in a row
    if (whole < sources) & ((block + 1) * BLOCK_N >= sources):
        # The elements of dW in front of the end of a row that divides a vector. The tile is narrower than G's, because
        # Triton lets threads share out tiles of one shape alike.
        rest = whole + tl.arange(0, BLOCK_V // 2)
        v = load_rows(V, rest, step, c, rest < sources, DIM)  # [BLOCK_V / 2, BLOCK_V]
        for start in range(0, targets, BLOCK_M):
            rows = (i < targets - start)[:, None]
            g = tl.load(G + start * step + g_at, mask=rows & there, other=0.0)  # [BLOCK_M, BLOCK_V]
            keep = rows & (rest < sources)[None, :]
            _write_slopes(DW + start * dw_row + (dw_at + rest[None, :]), g, v, keep, ADD)
    dw_at += j[None, :]
    read, write = begun(j, sources, VECTOR)[None, :], (j < whole)[None, :]
    values = load_rows(V, j, step, c, j < sources, DIM)  # [BLOCK_N, BLOCK_V]
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, targets, BLOCK_M):
        rows = (i < targets - start)[:, None]
        w = tl.load(W + start * w_row + w_at, mask=rows & read, other=0.0)  # [BLOCK_M, BLOCK_N]
        g = tl.load(G + start * step + g_at, mask=rows & there, other=0.0)  # [BLOCK_M, BLOCK_V]
        dv = _plus(tl.trans(w), g, dv, PRECISE)
        # A mask of loads, which run ahead of the products, would be carried to the iteration that stores.
        rows = (start + i < targets)[:, None]
        _write_slopes(DW + start * dw_row + dw_at, g, values, rows & write, ADD)
    out = DV + first + j[:, None] * step + c[None, :]
    tl.store(out, dv.to(DV.dtype.element_ty), mask=(j < sources)[:, None] & there)


def tiles(dim: int, dtype: torch.dtype, generation: int) -> dict[str, dict]:
    """Returns tiles, warps and stages by kernel for heads of ``dim`` channels: the largest that do not spill
    (tests/kernels/budgets.toml)."""
    wide, columns = dtype is torch.float32, max(16, next_power_of_2(dim))
    common = dot_options(dtype) | {"PRECISE": wide, "DIM": dim, "BLOCK_V": columns}
    if wide:
        common |= {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
        back = {"num_warps": 2 if rounded(dtype) else 8}
    else:
        common |= {"BLOCK_M": 128 if columns == 16 else 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
        # Tensor cores that read shared memory take 64 rows of both products from there; others need registers for them.
        back = {"BLOCK_M": 64 if generation == 90 else 32}
        # They have 16 columns of a narrow head for two warps; four would compute them twice.
        if columns == 16 and generation != 90:
            back |= {"BLOCK_N": 32, "num_warps": 2}
    return {"forward": common, "backward": common | back}


def forward(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns y (T, B, H * dim) of weights (H, B, T, S), whose rows are dense, and contiguous values."""
    heads, batch, targets, sources = weights.shape
    dim = values.shape[2] // heads
    y = values.new_empty(targets, batch, heads * dim)
    if y.numel():
        tile = tiles(dim, weights.dtype, generation(weights))["forward"]
        blocks = cdiv(targets, tile["BLOCK_M"])
        launch(forward_kernel, (heads * batch * blocks,),
            weights, values, y, targets, sources, batch, blocks, heads, *weights.stride()[:3],
            VECTOR=vector(weights), **tile,
        )  # fmt: skip
    return y


def backward(
    grad: torch.Tensor,
    weights: torch.Tensor,
    values: torch.Tensor,
    total: torch.Tensor | None = None,
    add: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of the weights, in ``total``, whose rows are dense, and of the values. With ``add`` the
    weights' are added to what ``total`` has. ``grad`` and values are contiguous."""
    heads, batch, targets, sources = weights.shape
    dim = values.shape[2] // heads
    total = torch.empty_like(weights) if total is None else total
    dvalues = torch.empty_like(values)
    if dvalues.numel():
        tile = tiles(dim, weights.dtype, generation(weights))["backward"]
        blocks = cdiv(sources, tile["BLOCK_N"])
        launch(backward_kernel, (heads * batch * blocks,),
            grad, weights, values, total, dvalues, targets, sources, batch, blocks, heads,
            *weights.stride()[:3], *total.stride()[:3], VECTOR=vector(weights, total), ADD=add, **tile,
        )  # fmt: skip
    return total, dvalues
