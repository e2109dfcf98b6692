# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of values by attention weights that are in memory, one kernel each way.

    y[t,b,h] = sum_s W[h,b,t,s] V[s,b,h]      dV[s,b,h] = sum_t W[h,b,t,s] G[t,b,h]      dW[h,b,t,s] = G[t,b,h] V[s,b,h]

The weights are by far the largest operand: a kernel reads them once, and the backward writes dW, or adds to it, while
it has the weights. The heads of V, of 12 channels in Zipformers, lie side by side, and are neither copied nor padded.
Bytes per weight of e bytes: forward e, backward 2e, or 3e where dW is added.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._attention_tiles import load_rows
from fastasr.kernels._launch import cdiv, dot_options, launch, next_power_of_2, rounded

UNALIGNED = ["V", "Y", "G", "DV"]  # heads of 12 channels
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
def _inside(rows, columns, sources, WHOLE: tl.constexpr):
    """Returns which elements of a tile of weights there are. Vectors are read where all columns are."""
    if WHOLE:
        return rows[:, None] & (columns >= 0)[None, :]
    return rows[:, None] & (columns < sources)[None, :]


@triton.jit
def _add_sources(
    y, W, V, start, i, c, targets, sources, step, dim, w_row,
    WHOLE: tl.constexpr, PRECISE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    j = start + tl.arange(0, BLOCK_N)
    at = i.to(tl.int64)[:, None] * w_row + j[None, :]
    w = tl.load(W + at, mask=_inside(i < targets, j, sources, WHOLE), other=0.0)  # [BLOCK_M, BLOCK_N]
    v = load_rows(V, j, step, c, j < sources, dim)  # [BLOCK_N, BLOCK_V]
    return _plus(w, v, y, PRECISE)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED[:2])
def forward_kernel(
    W, V, Y, targets, sources, batch, blocks, heads, dim, w_head, w_batch, w_row,
    PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    head, sequence, block = _pair(batch, blocks)
    i, c = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    step = batch * heads * dim  # from one frame of V to the next
    first = (sequence * heads + head) * dim
    W += head * w_head + sequence * w_batch
    V += first
    y = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    whole = sources // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        y = _add_sources(y, W, V, start, i, c, targets, sources, step, dim, w_row, True, PRECISE, BLOCK_N)
    if whole < sources:
        y = _add_sources(y, W, V, whole, i, c, targets, sources, step, dim, w_row, False, PRECISE, BLOCK_N)
    out = Y + first + i.to(tl.int64)[:, None] * step + c[None, :]
    tl.store(out, y.to(Y.dtype.element_ty), mask=(i < targets)[:, None] & (c < dim)[None, :])


@triton.jit
def _of_sources(
    G, W, v, DW, j, c, targets, sources, step, dim, w_row, dw_row,
    WHOLE: tl.constexpr, ADD: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns dV of sources j, and writes their columns of dW."""
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, targets, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        keep, rows = _inside(i < targets, j, sources, WHOLE), i.to(tl.int64)[:, None]
        w = tl.load(W + rows * w_row + j[None, :], mask=keep, other=0.0)  # [BLOCK_M, BLOCK_N]
        g = load_rows(G, i, step, c, i < targets, dim)  # [BLOCK_M, BLOCK_V]
        dv = _plus(tl.trans(w), g, dv, PRECISE)
        dw = tl.dot(g, tl.trans(v))
        at = DW + rows * dw_row + j[None, :]
        if ADD:
            dw += tl.load(at, mask=keep, other=0.0).to(tl.float32)
        tl.store(at, dw.to(DW.dtype.element_ty), mask=keep)
    return dv


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def backward_kernel(
    G, W, V, DW, DV, targets, sources, batch, blocks, heads, dim, w_head, w_batch, w_row, dw_head, dw_batch, dw_row,
    ADD: tl.constexpr, PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """With ADD this gradient is added to the one that DW has."""
    head, sequence, block = _pair(batch, blocks)
    j, c = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    step = batch * heads * dim
    first = (sequence * heads + head) * dim
    W += head * w_head + sequence * w_batch
    DW += head * dw_head + sequence * dw_batch
    G += first
    v = load_rows(V + first, j, step, c, j < sources, dim)  # [BLOCK_N, BLOCK_V]
    if (block + 1) * BLOCK_N <= sources:
        dv = _of_sources(
            G, W, v, DW, j, c, targets, sources, step, dim, w_row, dw_row,
            True, ADD, PRECISE, BLOCK_M, BLOCK_N, BLOCK_V,
        )  # fmt: skip
    else:
        dv = _of_sources(
            G, W, v, DW, j, c, targets, sources, step, dim, w_row, dw_row,
            False, ADD, PRECISE, BLOCK_M, BLOCK_N, BLOCK_V,
        )  # fmt: skip
    out = DV + first + j.to(tl.int64)[:, None] * step + c[None, :]
    tl.store(out, dv.to(DV.dtype.element_ty), mask=(j < sources)[:, None] & (c < dim)[None, :])


def tiles(dim: int, dtype: torch.dtype) -> dict[str, dict]:
    """Returns tiles, warps and stages by kernel for heads of ``dim`` channels: the largest that do not spill
    (tests/kernels/budgets.toml)."""
    wide, columns = dtype is torch.float32, max(16, next_power_of_2(dim))
    block = 32 if wide else 64
    common = dot_options(dtype) | {"PRECISE": wide, "BLOCK_V": columns}
    common |= {"BLOCK_M": block, "BLOCK_N": block, "num_warps": 4, "num_stages": 2 if wide else 3}
    # Tensor cores have 16 columns of TF32 or of a narrow head for two warps; four would compute them twice.
    if wide:
        back = {"num_warps": 2 if rounded(dtype) else 8}
    else:
        back = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 2} if columns == 16 else {"BLOCK_M": 32}
    return {"forward": common, "backward": common | back}


def forward(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns y (T, B, H * dim) of weights (H, B, T, S), whose rows are dense, and contiguous values."""
    heads, batch, targets, sources = weights.shape
    dim = values.shape[2] // heads
    y = values.new_empty(targets, batch, heads * dim)
    if y.numel():
        tile = tiles(dim, weights.dtype)["forward"]
        blocks = cdiv(targets, tile["BLOCK_M"])
        launch(forward_kernel, (heads * batch * blocks,),
            weights, values, y, targets, sources, batch, blocks, heads, dim, *weights.stride()[:3], **tile,
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
        tile = tiles(dim, weights.dtype)["backward"]
        blocks = cdiv(sources, tile["BLOCK_N"])
        launch(backward_kernel, (heads * batch * blocks,),
            grad, weights, values, total, dvalues, targets, sources, batch, blocks, heads, dim,
            *weights.stride()[:3], *total.stride()[:3], ADD=add, **tile,
        )  # fmt: skip
    return total, dvalues
