# SPDX-License-Identifier: Apache-2.0
r"""Gradient of a whitening, which keeps the covariance of channels near a multiple of the identity (Zipformer; Yao et
al., 2023).

The whitening itself is the identity. Over the N frames of x that are not padding, with the channels in G groups of c,
each centred,

    S_g = x_gᵀ x_g    d = mean of the diagonals    w = Σ_g |S_g|² / (G c) / d²

w is 1 if every S_g is the same multiple of the identity, and larger otherwise. Where it reaches ``limit``, the gradient
g of x becomes g + grad_scale |g| v / |v|, with

    v_g = dw / dx_g = 4 / (G c d²) x_g (S_g − w d I)

Upstream: ``WhiteningPenaltyFunction`` in ``zipformer.modules.scaling``, by a second autograd graph.
"""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from fastasr.ops import _gemm, _jobs
from fastasr.ops._dispatch import KernelFamily, Kernels, native_kernels, registered, triton_kernels
from fastasr.ops._layout import ChannelRows
from fastasr.ops._op import OPS, Arguments, Op, op
from fastasr.ops._register import without_autocast

EPS = 1.0e-20  # added to d² and |v|
SHORT = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> Kernels:
    return Kernels("cpu", registered("cpu", "whitening_covariance"), registered("cpu", "whitening_change"))


_NATIVE = native_kernels("whitening_gradient", "whitening_covariance", _load, SHORT)
FAMILY = KernelFamily("whitening_gradient", (), (_NATIVE, triton_kernels("whitening_gradient")))


def _check(op: Op, a: Arguments) -> None:
    if not a.x.shape[-1]:
        op.fail("x", "at least one channel", tuple(a.x.shape))
    if a.x.shape[-1] % a.num_groups:
        op.fail("num_groups", f"a divisor of x's {a.x.shape[-1]} channels", a.num_groups)
    numbers = (a.limit, a.grad_scale)
    if a.limits is None and None in numbers:
        op.fail("limits", "a tensor (2,), or two numbers", None)
    if a.limits is not None and any(n is not None for n in numbers):
        op.fail("limits", "either a tensor or two numbers", "both")


# --------------------------------------------------------------------------- kernels
def _operands(grad: Tensor, x: Tensor, dense: bool) -> tuple[Tensor, Tensor, ChannelRows]:
    """Returns grad and x as rows, and the ChannelRows of x. Rows of grad may lie apart unless ``dense``."""
    seen = ChannelRows(x, -1)
    rows = seen.rows if seen.rows.stride(1) == 1 or seen.rows.shape[1] == 1 else seen.rows.contiguous()
    return seen.of(grad, dense), rows, seen


def _hidden(seen: ChannelRows, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else seen.mask(mask)


def _native(kernels: Kernels, a: Arguments) -> tuple[Tensor, Tensor]:
    """Computes two thirds of the covariance, which is symmetric, and no more if x is white."""
    grad, rows, seen = _operands(a.grad.to(torch.float32), a.x.to(torch.float32), True)
    frames, covariance, found = kernels.forward(rows, a.num_groups)
    metric, d = found.tolist()
    if metric < a.limit:
        return a.grad.clone(), torch.ones((), dtype=torch.bool, device=a.x.device)
    y = seen.back(kernels.backward(grad, frames, covariance, metric, d, a.grad_scale))
    return y.to(a.grad.dtype), torch.zeros((), dtype=torch.bool, device=a.x.device)


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    if a.x.numel() and kernels.backend == "triton":
        grad, rows, seen = _operands(a.grad, a.x, False)
        y, white = kernels.forward(grad, rows, *a[2:-1], _hidden(seen, a.padding_mask))
        return seen.back(y), white
    # The native kernels read no number from a tensor, and no mask.
    if a.x.numel() and a.limits is a.act is a.padding_mask is None:
        return _native(kernels, a)
    return op.definition(*a)


# --------------------------------------------------------------------------- the op
@op(
    FAMILY,
    check=_check,
    launch=_launch,
    fast=False,  # nothing here checks the operands
)
def whitening_gradient(
    grad: Annotated[Tensor, "*S D"],
    x: Annotated[Tensor, "*S D"],
    num_groups: Annotated[int, ">= 1"],
    limit: float | None = None,
    grad_scale: float | None = None,
    limits: Annotated[Tensor, "2"] | None = None,
    act: Annotated[Tensor, " | 1", "constant"] | None = None,
    padding_mask: Annotated[Tensor, "*S", bool] | None = None,
) -> tuple[
    Annotated[Tensor, "y: *S D", "grad", "constant"], Annotated[Tensor, "white: ", torch.bool, "constant"]
]:
    """The gradient of Zipformer's Whiten: that of x, changed if the metric w of x reaches the limit; and whether w is
    below. Not differentiable.

    Args:
        grad, x: the same shape, with at least one dimension, channels last. float32, bfloat16, float16 or float64.
        num_groups: groups of channels, G.
        limit: the value of w from which on the gradient is changed.
        grad_scale: the size of the change relative to ``grad``.
        limits: the two numbers on the device of x, in place of the numbers above.
        act: one number on the device of x. If it is 0, the results are ``grad`` unchanged and False.
        padding_mask: x's shape without channels, bool; True: the frame has no part in w and |g|, and y is ``grad``
            there.
    Returns:
        A tensor of grad's shape and dtype, computed in float32 or better, rounded once; and a bool tensor without
        dimensions. No kernel for CUDA waits for the device.
    Raises:
        TypeError: grad or x is not a floating tensor.
        ValueError: shapes or devices do not match; num_groups does not divide the channels, or there are none; limits
            are missing or given twice.
    """
    numbers: Any = (limit, grad_scale)
    least, size = numbers if limits is None else limits.unbind()
    compute = torch.promote_types(x.dtype, torch.float32)
    grad = grad.detach()
    hidden = None if padding_mask is None else padding_mask.reshape(-1, 1)
    with without_autocast(x):
        frames = _grouped(x.detach().to(compute), num_groups, hidden)
        metric, covariance, d = _metric(frames)
        white = metric < least
        covariance.diagonal(dim1=1, dim2=2).sub_(metric * d)
        covariance *= 4.0 / (covariance.shape[0] * covariance.shape[1]) / (d * d + EPS)
        v = _gemm.batched(frames, covariance)
    v -= _mean(v, hidden)  # 0 but for rounding, which the gradient of a bias would add up
    v = v.transpose(0, 1).reshape(x.shape)
    seen, same = grad, white
    if padding_mask is not None:
        hidden = padding_mask.unsqueeze(-1)
        v, seen, same = v.masked_fill(hidden, 0.0), grad.masked_fill(hidden, 0.0), white | hidden
    scale = size * (_norm(seen, compute) / (_norm(v, compute) + EPS))
    y = torch.addcmul(grad.to(compute), v, scale).to(grad.dtype)
    if act is None:
        return torch.where(same, grad, y), white
    act = act.reshape(()) != 0
    return torch.where(same | ~act, grad, y), white & act


def whitening_metric(x: Tensor, num_groups: int) -> Tensor:
    """Returns w of x (..., channels), a scalar tensor of x's dtype."""
    with without_autocast(x):
        return _metric(_grouped(x, num_groups))[0]


class Whitened(NamedTuple):
    """What a call of ``whiten_`` will get, except the gradient."""

    x: Tensor
    num_groups: int
    act: Tensor
    hidden: Tensor | None


def moments_of(calls: Sequence[Whitened], table: _jobs.Table) -> list[Any]:
    """Returns what ``whiten_`` takes as ``moments``, found for many calls by few launches."""

    def job(call: Whitened) -> tuple[Tensor, int, Tensor, Tensor | None]:
        _, x, order = _operands(call.x, call.x, False)
        return x, call.num_groups, call.act, _hidden(order, call.hidden)

    return _jobs.done(FAMILY, "moments_of_jobs", calls, job, table)


def whiten_(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    limits: Tensor,
    act: Tensor | None,
    white: Tensor,
    hidden: Tensor | None = None,
    moments: Any = None,
) -> None:
    """Writes ``whitening_gradient`` over grad, and to ``white``, bool (), whether w is below the limit. On CUDA, where
    ``act`` is 0, its kernels return at once. ``hidden`` is padding_mask, and ``moments`` what ``moments_of`` has found.
    """
    kernels = FAMILY.kernels(x, grad)
    if kernels is not None and kernels.backend == "triton" and x.numel():
        seen, rows, order = _operands(grad, x, False)
        if seen.data_ptr() == grad.data_ptr():  # no copy in x's order
            flat = _hidden(order, hidden)
            kernels.forward(seen, rows, num_groups, None, None, limits, act, flat, white, moments)
            return
    y, found = OPS["whitening_gradient"].function(
        grad, x, num_groups, limits=limits, act=act, padding_mask=hidden
    )
    grad.copy_(y)
    white.copy_(found)


def _grouped(x: Tensor, num_groups: int, hidden: Tensor | None = None) -> Tensor:
    """Returns the groups of the frames (groups, N, c) minus their means, and 0 where ``hidden`` (N, 1)."""
    frames = x.reshape(-1, num_groups, x.shape[-1] // num_groups).transpose(0, 1)
    frames = frames - _mean(frames, hidden)
    return frames if hidden is None else frames.masked_fill_(hidden, 0.0)


def _mean(frames: Tensor, hidden: Tensor | None) -> Tensor:
    if hidden is None:
        return frames.mean(dim=1, keepdim=True)
    return frames.masked_fill(hidden, 0.0).sum(dim=1, keepdim=True) / (~hidden).sum().clamp(min=1)


def _metric(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns w, the covariances and d."""
    covariance = _gemm.batched(frames.transpose(1, 2), frames)  # [G, c, c]
    d = covariance.diagonal(dim1=1, dim2=2).mean()
    size = covariance.shape[0] * covariance.shape[1]
    return covariance.square().sum() / size / (d * d + EPS), covariance, d


def _norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=dtype)
