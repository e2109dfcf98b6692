# SPDX-License-Identifier: Apache-2.0
"""A residual, the LayerNorm of the sum over the last dimension (C channels), and the LayerNorm of this norm, one pass
over memory each way.

    s = x + scale update      t = n weight + bias, n = (s - mean s) / sqrt(var s + eps)
    y = m next_weight + next_bias, m = (t - mean t) / sqrt(var t + next_eps)
    With d = grad_y next_weight and e = g weight, per row:
    g = grad_t + (d - mean d - m mean(d m)) / sqrt(var t + next_eps)
    dx = (e - mean e - n mean(e n)) / sqrt(var s + eps)      dupdate = scale dx
    dweight = sum_rows g n, dbias = sum_rows g      dnext_weight = sum_rows grad_y m, dnext_bias = sum_rows grad_y

Bytes per element, x of 4 bytes and update of 2, as under autocast: forward 12, backward 18. Tiles are in
_layer_norm.py. The backward reads x and update again: neither s nor statistics are kept.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import cdiv, contiguous_like, generation, launch
from fastasr.kernels._layer_norm import (
    backward_parts,
    forward_tile,
    load_tile,
    means_with,
    norm,
    normalise,
    normed_with,
    through,
)
from fastasr.kernels._parts import add_pair, store_pair
from fastasr.kernels._vectors import neighbours

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _row(VECTOR, c, C):
    return tl.load(VECTOR + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    X, UPDATE, WEIGHT, BIAS, NEXT_WEIGHT, NEXT_BIAS, T, Y, rows, C, eps, next_eps, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = T.dtype.element_ty == tl.float32
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = neighbours(BLOCK_C, X, UPDATE)
    keep = (r < rows)[:, None] & (c < C)[None, :]
    x = load_tile(X, r, c, C, keep)  # [BLOCK_R, BLOCK_C]
    n, inverse = normalise(tl.fma(load_tile(UPDATE, r, c, C, keep), scale, x), keep, eps, C, PRECISE)
    t = tl.fma(n * inverse[:, None], _row(WEIGHT, c, C), _row(BIAS, c, C)).to(T.dtype.element_ty)
    offsets = r[:, None] * C + c[None, :]
    tl.store(T + offsets, t, mask=keep)
    m, inverse = normalise(t.to(tl.float32), keep, next_eps, C, PRECISE)
    y = tl.fma(m * inverse[:, None], _row(NEXT_WEIGHT, c, C), _row(NEXT_BIAS, c, C))
    tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def backward_kernel(
    GRAD_T, GRAD_Y, X, UPDATE, WEIGHT, BIAS, NEXT_WEIGHT, DX, DUPDATE, PARTS, rows, rows_per_part, C,
    eps, next_eps, scale, T_TYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = tl.float32 == T_TYPE
    part = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    w, b, next_w = _row(WEIGHT, c, C), _row(BIAS, c, C), _row(NEXT_WEIGHT, c, C)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dnext_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dnext_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    while first < end:
        r = first + tl.arange(0, BLOCK_R)
        keep = (r < end)[:, None] & (c < C)[None, :]
        s = tl.fma(load_tile(UPDATE, r, c, C, keep), scale, load_tile(X, r, c, C, keep))  # [BLOCK_R, BLOCK_C]
        n, inverse = norm(s, r < end, keep, eps, C, True, PRECISE)
        t = tl.fma(n, w, b).to(T_TYPE).to(tl.float32)
        grad = load_tile(GRAD_Y, r, c, C, keep)
        d = grad * next_w
        m, next_inverse, mean, along = normed_with(t, d, r < end, keep, next_eps, C, True, PRECISE)
        dnext_weight = tl.fma(grad, m, dnext_weight)
        dnext_bias += grad
        g = load_tile(GRAD_T, r, c, C, keep) + through(d, m, next_inverse, mean, along)
        dweight = tl.fma(g, n, dweight)
        dbias += g
        d = g * w
        mean, along = means_with(d, n, C, True, PRECISE)
        dx = through(d, n, inverse, mean, along)
        offsets = r[:, None] * C + c[None, :]
        tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=keep)
        tl.store(DUPDATE + offsets, (dx * scale).to(DUPDATE.dtype.element_ty), mask=keep)
        first += BLOCK_R
    store_pair(PARTS, c, C, dweight, dbias)
    store_pair(PARTS + 2 * tl.num_programs(0).to(tl.int64) * C, c, C, dnext_weight, dnext_bias)


def add_two_norms_forward(
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    next_weight: torch.Tensor,
    next_bias: torch.Tensor,
    eps: float,
    next_eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns t, in the promoted dtype of x and update, and y in update's. All tensors are contiguous, parameters each
    in its own dtype. Raises ``ValueError`` if C is more than ``_layer_norm.MAX_CHANNELS``.
    """
    channels = x.shape[-1]
    t, y = contiguous_like(x, _dtype(x, update)), contiguous_like(x, update.dtype)
    if x.numel():
        rows = x.numel() // channels
        tile = forward_tile(channels, generation(x), norms=2)
        launch(forward_kernel, (cdiv(rows, tile["BLOCK_R"]),),
            x, update, weight, bias, next_weight, next_bias, t, y, rows, channels, eps, next_eps, scale, **tile,
        )  # fmt: skip
    return t, y


def add_two_norms_backward(
    grad_t: torch.Tensor,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    next_weight: torch.Tensor,
    next_bias: torch.Tensor,
    eps: float,
    next_eps: float,
    scale: float,
    later=None,
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of all tensors but the results', each in its tensor's dtype. ``later`` are those of
    ``add_pair``."""
    channels = x.shape[-1]
    dx, dupdate = contiguous_like(x), contiguous_like(update)
    sums = tuple(map(torch.empty_like, (weight, bias, next_weight, next_bias)))
    if not x.numel():
        for gradient in sums:
            gradient.zero_()
        return dx, dupdate, *sums
    rows, dtype = x.numel() // channels, _dtype(x, update)
    table, rows_per_part, tile = backward_parts(x, dtype, gated=True, sums=4)
    launch(backward_kernel, (table.shape[1],),
        grad_t, grad_y, x, update, weight, bias, next_weight, dx, dupdate, table, rows, rows_per_part, channels,
        eps, next_eps, scale, T_TYPE=TYPES[dtype], **tile,
    )  # fmt: skip
    for i in (0, 2):
        add_pair(table[i : i + 2], *sums[i : i + 2], later=later and later[i : i + 2])
    return dx, dupdate, *sums


def _dtype(x: torch.Tensor, update: torch.Tensor) -> torch.dtype:
    """Returns the promoted dtype, without a call of torch."""
    return x.dtype if x.dtype is update.dtype else torch.float32
