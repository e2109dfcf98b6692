# SPDX-License-Identifier: Apache-2.0
"""The small steps of a recorded training pass (fastasr/ops/_decided.py), each one launch.

A step reads from the device a decision that the host writes before a replay: a rate, or whether the step acts. Its
uniform random numbers come from torch and are drawn before. Tensors are seen as rows of channels, (frames, batch,
channels); row r belongs to sequence r % batch, or as a table says.

    kernel      reads                          writes              bytes per element of a float32 stream, bf16 branches
    plus        src, y, number per sequence    sum, sum in bf16    12
    gradients   up to 5 gradients of a tensor  their sum, that of y  8 for the sum of two, 2 for y
    mask        numbers                        mask
    scale       a parameter                    itself, or 0, for each sequence
    limit       gradient of each sequence      gradient of all
    either      weights                        weights or equal ones  4
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastasr.kernels import _jobs
from fastasr.kernels._jobs import number, pointer
from fastasr.kernels._launch import cdiv, launch, next_power_of_2
from fastasr.kernels._vectors import neighbours

ROWS, COLUMNS = 32, 64  # sizes of a tile: models have multiples of 64 channels
BLOCK = 1024
CHANNELS = 256  # of a limited parameter, in a program of a job
WARPS = 4


@triton.jit
def _tile(columns, rows, c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the first row of this program's tile, its offsets and those that exist; ``c`` counts its columns."""
    column_tiles = tl.cdiv(columns, BLOCK_C)
    first = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    c = tl.program_id(0) % column_tiles * BLOCK_C + c
    keep = (r < rows)[:, None] & (c < columns)[None, :]
    return first, r[:, None] * columns + c[None, :], keep  # [BLOCK_R, BLOCK_C]


@triton.jit
def _kept(DRAWN, RATE, OF, first, rows, batch, BLOCK_R: tl.constexpr):
    """Says which rows from ``first`` on belong to sequences that are kept."""
    r = tl.arange(0, BLOCK_R)
    # A remainder of 64 bits takes a hundred instructions.
    sequence = ((first % batch).to(tl.int32) + r) % batch
    if OF is not None:
        sequence = tl.load(OF + (first + r), mask=first + r < rows, other=0)
    return (tl.load(DRAWN + sequence).to(tl.float32) > tl.load(RATE).to(tl.float32))[:, None]  # [BLOCK_R, 1]


@triton.jit(do_not_specialize=["rows", "batch"], do_not_specialize_on_alignment=["DRAWN", "RATE"])
def plus_kernel(
    SRC, Y, DRAWN, RATE, OF, OUT, NARROW, rows, batch, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    first, at, keep = _tile(columns, rows, neighbours(BLOCK_C, SRC, Y), BLOCK_R, BLOCK_C)
    y = tl.load(Y + at, mask=keep, other=0.0).to(tl.float32)
    if DRAWN is not None:
        y *= _kept(DRAWN, RATE, OF, first, rows, batch, BLOCK_R).to(tl.float32)
    out = (tl.load(SRC + at, mask=keep, other=0.0).to(tl.float32) + y).to(OUT.dtype.element_ty)
    tl.store(OUT + at, out, mask=keep)
    if NARROW is not None:
        tl.store(NARROW + at, out.to(NARROW.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "batch"], do_not_specialize_on_alignment=["DRAWN", "RATE"])
def gradients_kernel(
    A,
    B,
    C,
    D,
    E,
    DRAWN,
    RATE,
    OF,
    TOTAL,
    DY,
    rows,
    batch,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds up to five gradients; DY is their sum where the sequence was kept."""
    first, at, keep = _tile(columns, rows, neighbours(BLOCK_C, A, B, C, D, E), BLOCK_R, BLOCK_C)
    total = tl.load(A + at, mask=keep, other=0.0).to(tl.float32)
    if B is not None:
        total += tl.load(B + at, mask=keep, other=0.0).to(tl.float32)
    if C is not None:
        total += tl.load(C + at, mask=keep, other=0.0).to(tl.float32)
    if D is not None:
        total += tl.load(D + at, mask=keep, other=0.0).to(tl.float32)
    if E is not None:
        total += tl.load(E + at, mask=keep, other=0.0).to(tl.float32)
    if TOTAL is not None:
        tl.store(TOTAL + at, total.to(TOTAL.dtype.element_ty), mask=keep)
    if DY is not None:
        if DRAWN is not None:
            total *= _kept(DRAWN, RATE, OF, first, rows, batch, BLOCK_R).to(tl.float32)
        tl.store(DY + at, total.to(DY.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize_on_alignment=["RATE", "SCALE"])
def mask_kernel(DRAWN, RATE, SCALE, MASK, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    drawn = tl.load(DRAWN + at, mask=at < count, other=0.0).to(tl.float32)
    kept = tl.where(drawn > tl.load(RATE).to(tl.float32), tl.load(SCALE).to(tl.float32), 0.0)
    tl.store(MASK + at, kept.to(MASK.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize_on_alignment=["DRAWN", "RATE"])
def scale_kernel(X, DRAWN, RATE, Y, columns, BLOCK: tl.constexpr):
    """Writes x, or zeros, as the row of a sequence."""
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + c, mask=c < columns, other=0.0)
    kept = tl.load(DRAWN + row).to(tl.float32) > tl.load(RATE).to(tl.float32)
    tl.store(Y + row * columns + c, tl.where(kept, x, 0.0).to(Y.dtype.element_ty), mask=c < columns)


@triton.jit(
    do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["GRAD", "X", "DRAWN", "RATE", "LIMITS", "Y"]
)  # fmt: skip
def limit_kernel(GRAD, X, DRAWN, RATE, LIMITS, Y, rows, columns, BLOCK: tl.constexpr):
    """Adds the rows of the kept sequences, and turns the sum's sign where it would push x out of its limits."""
    _limit(GRAD, X, DRAWN, RATE, LIMITS, Y, rows, columns, DRAWN is not None, BLOCK)


@triton.jit
def limit_of_jobs_kernel(
    JOBS, FIELDS: tl.constexpr, DTYPE: tl.constexpr, DRAWN: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Does that for each job."""
    # the fields: GRAD, X, DRAWN, RATE, LIMITS, Y, rows, columns
    job = JOBS + tl.program_id(1) * FIELDS
    columns = number(job, 7)
    if tl.program_id(0) * BLOCK < columns:
        grad, x, y = pointer(job, 0, DTYPE), pointer(job, 1, DTYPE), pointer(job, 5, DTYPE)
        drawn, rate, limits = pointer(job, 2, DRAWN), pointer(job, 3, tl.float32), pointer(job, 4, tl.float32)
        _limit(grad, x, drawn, rate, limits, y, number(job, 6), columns, MASKED, BLOCK)


@triton.jit
def _limit(GRAD, X, DRAWN, RATE, LIMITS, Y, rows, columns, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        part = tl.load(GRAD + row * columns + c, mask=c < columns, other=0.0).to(tl.float32)
        if MASKED:
            part = tl.where(tl.load(DRAWN + row).to(tl.float32) > tl.load(RATE).to(tl.float32), part, 0.0)
        grad += part
    x = tl.load(X + c, mask=c < columns, other=0.0).to(tl.float32)
    low, high = tl.load(LIMITS + 1), tl.load(LIMITS + 2)
    wrong = ((x < low) & (grad > 0.0)) | ((x > high) & (grad < 0.0))
    turned = tl.where(tl.load(LIMITS) != 0.0, -grad, grad)
    tl.store(Y + c, tl.where(wrong, turned, grad).to(Y.dtype.element_ty), mask=c < columns)


@triton.jit(do_not_specialize=["keys"], do_not_specialize_on_alignment=["ACT"])
def either_kernel(W, ACT, Y, keys, w_row, y_row, BLOCK: tl.constexpr):
    """Copies a row of weights, or writes equal weights on all keys whose weight is not 0."""
    W += tl.program_id(0).to(tl.int64) * w_row
    Y += tl.program_id(0).to(tl.int64) * y_row
    act = tl.load(ACT) != 0.0
    seen = tl.zeros([BLOCK], tl.float32)
    if act:
        for start in range(0, keys, BLOCK):
            j = start + tl.arange(0, BLOCK)
            w = tl.load(W + j, mask=j < keys, other=0.0).to(tl.float32)
            seen += tl.where(w > 0.0, 1.0, 0.0)
    # eager rounds the count and its reciprocal to the weights' dtype
    count = tl.sum(seen, axis=0).to(Y.dtype.element_ty).to(tl.float32)
    share = tl.div_rn(1.0, count)
    for start in range(0, y_row, BLOCK):  # also behind the last key, so that whole vectors are read
        j = start + tl.arange(0, BLOCK)
        w = tl.load(W + j, mask=j < y_row, other=0.0)
        equal = tl.where((w.to(tl.float32) > 0.0) & (j < keys), share, 0.0).to(Y.dtype.element_ty)
        tl.store(Y + j, tl.where(act, equal, w), mask=j < y_row)


# --------------------------------------------------------------------------- launchers
def _tiled(kernel, pointers, like: torch.Tensor) -> None:
    columns = like.shape[-1]
    rows = like.numel() // columns
    launch(kernel, (cdiv(rows, ROWS) * cdiv(columns, COLUMNS),),
        *pointers, rows, like.shape[-2], columns, BLOCK_R=ROWS, BLOCK_C=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def plus(src: torch.Tensor, y: torch.Tensor, drawn, rate, of, narrow: torch.dtype | None):
    """Returns src + y (contiguous), without y where a sequence is dropped, and that in ``narrow`` (None: itself)."""
    out = torch.empty_like(src, dtype=torch.promote_types(src.dtype, y.dtype))
    also = None if narrow is None else torch.empty_like(out, dtype=narrow)
    if out.numel():
        _tiled(plus_kernel, (src, y, drawn, rate, of, out, also), out)
    return out, out if narrow is None else also


def gradients(grads: list, drawn, rate, of, dtype: torch.dtype | None, narrow: torch.dtype | None):
    """Returns the sum of one to five contiguous gradients, and the same where a sequence is kept, each None if its
    dtype is.
    """
    total, dy = (None if d is None else torch.empty_like(grads[0], dtype=d) for d in (dtype, narrow))
    if grads[0].numel():
        given = [*grads, *[None] * (5 - len(grads))]
        _tiled(gradients_kernel, (*given, drawn, rate, of, total, dy), grads[0])
    return total, dy


def mask(drawn: torch.Tensor, rate: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns scale where contiguous drawn > rate, else 0, in the dtype of ``drawn``."""
    out = torch.empty_like(drawn)
    if out.numel():
        grid = (cdiv(out.numel(), BLOCK),)
        launch(mask_kernel, grid, drawn, rate, scale, out, out.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


def scaled(x: torch.Tensor, drawn: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Returns (batch, C): contiguous x (C,), or 0, for each sequence."""
    batch, columns = drawn.numel(), x.numel()
    out = x.new_empty(batch, columns)
    if out.numel():
        launch(scale_kernel, (cdiv(columns, BLOCK), batch),
            x, drawn, rate, out, columns, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def limited(
    grad: torch.Tensor, x: torch.Tensor, limits: torch.Tensor, drawn, rate, later=None
) -> torch.Tensor:
    """Returns the limited gradient of contiguous x; with ``drawn``, ``grad`` has a row for each sequence.
    ``later(out, do, work)`` says whether it will ``do`` this with that of others.
    """
    out = torch.empty_like(x)
    work = grad, x, drawn, rate, limits, out
    if out.numel() and not (later and _is_job(*work) and later(out, limited_of_jobs, work)):
        rows = 1 if drawn is None else drawn.numel()
        block = min(BLOCK, max(32, next_power_of_2(x.numel())))
        launch(limit_kernel, (cdiv(x.numel(), block),),
            grad, x, drawn, rate, limits, out, rows, x.numel(), BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return out


def _is_job(grad: torch.Tensor, x: torch.Tensor, *others) -> bool:
    tensors = [grad, x, *(t for t in others if t is not None)]
    return grad.dtype is x.dtype and not any(t.data_ptr() % 16 for t in tensors)


def limited_of_jobs(jobs: Sequence[tuple], bring: _jobs.Table) -> None:
    """Does what ``limited`` does for many (grad, x, drawn, rate, limits, out)."""
    kinds: dict[tuple, list[tuple]] = {}
    for job in jobs:
        kinds.setdefault((job[1].dtype, getattr(job[2], "dtype", None)), []).append(job)
    for (dtype, of_drawn), members in kinds.items():
        rows = [_jobs.row((*job, 1 if job[2] is None else job[2].numel(), job[1].numel())) for job in members]
        masked = of_drawn is not None
        constants = {"DTYPE": _jobs.TYPES[dtype], "DRAWN": _jobs.TYPES[of_drawn or dtype], "MASKED": masked}
        programs = max(cdiv(job[1].numel(), CHANNELS) for job in members)
        _jobs.run(limit_of_jobs_kernel, bring(rows), programs, **constants, BLOCK=CHANNELS, num_warps=WARPS)


def either(weights: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
    """Returns weights (1, batch, frames, keys), whose rows are evenly spaced, or equal ones if ``act`` is not 0. Rows
    of the result are as far apart.
    """
    _, batch, frames, keys = weights.shape
    row = weights.stride(2)
    out = weights.new_empty(batch * frames * row)  # changed in place so that it is no view
    out.as_strided_(weights.shape, (batch * frames * row, frames * row, row, 1))
    if out.numel():
        grid = (batch * frames,)
        launch(either_kernel, grid, weights, act, out, keys, row, row, BLOCK=BLOCK, num_warps=WARPS)
    return out
