# SPDX-License-Identifier: Apache-2.0
r"""The two log-probabilities that a lattice reads from each row of logits: its symbol's and blank's.

With L = log Σ_c e^l_c: px = l_y − L, py = l_blank − L. HAT (Variani et al., "Hybrid autoregressive transducer", 2020):
py = log σ(l_blank), and with L over the other classes px = l_y − L + log σ(−l_blank).

Backward, with p = e^(l − L): dl = gx e_y + gy e_blank − (gx + gy) p. HAT: dl_c = gx ([c = y] − p_c) for c ≠ blank, and
dl_blank = gy σ(−l_blank) − gx σ(l_blank). The forward pass reads the logits once; the backward pass reads them once and
writes their gradient. On a CPU these are kernels (csrc/cpu/rnnt/rnnt_joiner.h); elsewhere both work on slices of rows,
so that nothing else has the size of the logits.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._dispatch import PLAIN, forced_backend, why_not_cpu
from fastasr.ops._register import register

_SLICE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}


def slices(rows: int, classes: int, dtype: torch.dtype, device: str) -> list[slice]:
    step = max(1, _SLICE_BYTES.get(device, 1 << 26) // max(1, classes * dtype.itemsize))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@cache
def _native() -> list[Callable]:
    names = "rnnt_row_logprobs_forward", "rnnt_row_logprobs_backward"
    return [] if why_not_cpu(*names) else [getattr(torch.ops.fastasr_cpu, name).default for name in names]


def _kernels(logits: Tensor) -> list[Callable]:
    """Returns the kernels of both directions if they serve these logits."""
    serve = logits.is_cpu and logits.dim() == 4 and logits.stride(3) == 1 and type(logits) in PLAIN
    return _native() if serve and forced_backend() in ("auto", "cpu") else []


def forward(logits: Tensor, symbols: Tensor, blank: int, hat: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (px, py, L), each of symbols' shape."""
    if kernels := _kernels(logits):
        return kernels[0](logits, symbols, blank, hat)
    dtype, classes = _wide(logits.dtype), logits.shape[-1]
    flat, index = logits.reshape(-1, classes), symbols.reshape(-1, 1)
    normaliser = flat.new_empty(flat.shape[0], dtype=dtype)
    for part in slices(flat.shape[0], classes, dtype, flat.device.type):
        rows = flat[part].to(dtype)
        if hat:
            rows = rows.clone() if rows.dtype is flat.dtype else rows
            rows[:, blank] = -math.inf
        normaliser[part] = torch.logsumexp(rows, 1)
    px = flat.gather(1, index).squeeze(1).to(dtype) - normaliser
    py = flat[:, blank].to(dtype)
    if hat:
        px, py = px + F.logsigmoid(-py), F.logsigmoid(py)
    else:
        py = py - normaliser
    return px.view(symbols.shape), py.view(symbols.shape), normaliser.view(symbols.shape)


def backward(
    grad_px: Tensor,
    grad_py: Tensor,
    logits: Tensor,
    symbols: Tensor,
    normaliser: Tensor,
    blank: int,
    hat: bool,
    in_place: bool = False,
) -> Tensor:
    """Returns dlogits, with ``in_place`` in the memory of the logits, which are lost."""
    dtype, classes = normaliser.dtype, logits.shape[-1]
    if kernels := _kernels(logits):
        gradients = grad_px.to(dtype), grad_py.to(dtype)
        found = kernels[1](*gradients, logits, symbols, normaliser, blank, hat, in_place)
        return logits if in_place else found
    flat, index, normaliser = logits.reshape(-1, classes), symbols.reshape(-1, 1), normaliser.reshape(-1, 1)
    gx, gy = grad_px.reshape(-1, 1).to(dtype), grad_py.reshape(-1, 1).to(dtype)
    grad = flat if in_place else torch.empty_like(flat, memory_format=torch.contiguous_format)
    outputs = torch.arange(classes, device=flat.device, dtype=torch.int64)
    for part in slices(flat.shape[0], classes, dtype, flat.device.type):
        x, y = gx[part], gy[part]
        d = torch.sub(flat[part].to(dtype), normaliser[part]).exp_()
        if hat:
            z = flat[part, blank : blank + 1].to(dtype)
            d.mul_(-x)
            d[:, blank : blank + 1] = y * torch.sigmoid(-z) - x * torch.sigmoid(z)
        else:
            d.mul_(-(x + y))
            d[:, blank : blank + 1] += y
        if d.is_cuda:  # torch refuses scatter_add_ there when deterministic algorithms are requested
            d.add_((outputs == index[part]) * x)
        else:
            d.scatter_add_(1, index[part], x)
        grad[part] = d.masked_fill_((x == 0) & (y == 0), 0.0)  # rows without a part in the loss may hold NaN
    return grad.view(logits.shape)


def _fake_forward(logits: Tensor, symbols: Tensor, blank: int, hat: bool) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(symbols.shape, dtype=_wide(logits.dtype)) for _ in range(3))


BACKWARD_OP = register(
    "rnnt_row_logprobs_backward(Tensor grad_px, Tensor grad_py, Tensor logits, Tensor symbols, Tensor normaliser, "
    "int blank, bool hat) -> Tensor",
    backward,
    lambda grad_px, grad_py, logits, symbols, normaliser, blank, hat: logits.new_empty(logits.shape),
    autocast=lambda dtype, *arguments: arguments,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, symbols, *ctx.rest = inputs
    ctx.save_for_backward(logits, symbols, output[2])
    ctx.mark_non_differentiable(output[2])


OP = register(
    "rnnt_row_logprobs(Tensor logits, Tensor symbols, int blank, bool hat) -> (Tensor, Tensor, Tensor)",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=lambda ctx, gx, gy, _: (BACKWARD_OP(gx, gy, *ctx.saved_tensors, *ctx.rest), None, None, None),
    autocast=lambda dtype, *arguments: arguments,
    transformed=lambda *arguments: _formula(*arguments),
)


def row_logprobs(logits: Tensor, symbols: Tensor, blank: int, hat: bool = False) -> tuple[Tensor, Tensor]:
    """Returns (px, py) of symbols' shape, for logits (..., C) and symbols (...): float32, or float64
    where logits are. Under the forced backend "eager" their gradients have gradients.
    """
    if forced_backend() == "eager":
        return _formula(logits, symbols, blank, hat)[:2]
    px, py, _ = OP(logits, symbols, blank, hat)
    return px, py


def _formula(logits: Tensor, symbols: Tensor, blank: int, hat: bool) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(_wide(logits.dtype))
    px, py = logits.gather(-1, symbols.unsqueeze(-1)).squeeze(-1), logits[..., blank]
    if not hat:
        normaliser = logits.logsumexp(-1)
        return px - normaliser, py - normaliser, normaliser
    others = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.int64) != blank
    normaliser = logits.where(others, -math.inf).logsumexp(-1)
    return px - normaliser + F.logsigmoid(-py), F.logsigmoid(py), normaliser
