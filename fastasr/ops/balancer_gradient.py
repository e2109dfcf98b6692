# SPDX-License-Identifier: Apache-2.0
r"""Gradient of a balancer, which keeps the mean and size of channels in a range (Zipformer; Yao et al., 2023, 3.5).

The balancer itself is the identity. Per channel of x, over its N elements that are not padding,

    u = mean(x²)   μ = mean(x)   s = √(u − μ²)   r = √u   m = μ / s
    loss = |m − clamp(m, m_min, m_max)| + |log(clamp(r, r_min, r_max) / r)|

and there the gradient g of x becomes g + |g| l, with l = d loss / dx scaled to root mean square ``grad_scale``. The
first term is active for m outside its range, with the sign e of the excess, the second for r outside its own, with
sign f:

    d loss / dx = e (1 − m (x − μ) / s) / (N s)  +  f x / (N r²)  =  p + q (x − μ)
    p = (e / s + f μ / r²) / N        q = (f / r² − e m / s²) / N        mean square = p² + q² s²

Upstream: ``BalancerFunction`` in ``zipformer.modules.scaling``, by a second autograd graph.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from fastasr.ops import _jobs
from fastasr.ops._dispatch import KernelFamily, Kernels, native_kernels, registered, triton_kernels
from fastasr.ops._layout import ChannelRows
from fastasr.ops._op import OPS, Arguments, Op, op

FLOOR = 1.0e-20  # least u − μ², u, and root mean square of d loss / dx


def _load() -> Kernels:
    return Kernels("cpu", registered("cpu", "balancer_gradient"), None)


_NATIVE = native_kernels("balancer_gradient", "balancer_gradient", _load)
FAMILY = KernelFamily("balancer_gradient", (), (_NATIVE, triton_kernels("balancer_gradient")))


def _check(op: Op, a: Arguments) -> None:
    numbers = a[2:7]
    if a.limits is None and None in numbers:
        op.fail("limits", "a tensor (5,), or five numbers", None)
    if a.limits is not None and any(n is not None for n in numbers):
        op.fail("limits", "either a tensor or five numbers", "both")
    if a.padding_mask is not None and a.padding_mask.shape != _without(a.x.shape, a.channel_dim):
        op.wrong_shape("padding_mask", a.padding_mask, str(tuple(_without(a.x.shape, a.channel_dim))))


def _without(shape: torch.Size, dim: int) -> torch.Size:
    """Returns a shape without the dimension of the channels."""
    dim %= len(shape)
    return shape[:dim] + shape[dim + 1 :]


# --------------------------------------------------------------------------- kernels
def _operands(
    grad: Tensor, x: Tensor, dim: int, mask: Tensor | None, dense: bool
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Returns grad, x and the padding mask as kernels see them, and a function that gives their result x's shape. Rows
    of grad may lie apart unless ``dense``.
    """
    if x.stride(dim) == 1 or x.shape[dim] == 1:
        seen = ChannelRows(x, dim)
        return seen.of(grad, dense), seen.rows, None if mask is None else seen.mask(mask), seen.back
    dim %= x.dim()
    shape = (x.shape[:dim].numel(), x.shape[dim], x.shape[dim + 1 :].numel())
    hidden = None if mask is None else mask.flatten().contiguous()
    return grad.contiguous().view(shape), x.contiguous().view(shape), hidden, lambda y: y.view(x.shape)


def _forward(kernels: Kernels, grad: Tensor, x: Tensor, *options: Any) -> Tensor:
    *numbers, dim, limits, act, mask = options
    native = kernels.backend == "cpu"
    grad, x, hidden, back = _operands(grad, x, dim, mask, dense=native)
    return back(kernels.forward(grad, x, *numbers, *(() if native else (limits, act, hidden))))


def _fast(kernels: Kernels, keep: bool, grad: Tensor, x: Tensor, *options: Any) -> Tensor:
    *numbers, dim, limits, act, padding_mask = options
    strided = x.layout is grad.layout is torch.strided and x.shape == grad.shape and x.numel() > 0
    fits = -x.dim() <= dim < x.dim() and limits is act is padding_mask is None and None not in numbers
    if not (strided and fits):
        raise NotImplementedError
    return _forward(kernels, grad, x, *options)


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Tensor:
    native = kernels.backend == "cpu"  # The C++ kernels read no number on the device and no mask.
    served = not native or (a.grad.dtype is a.x.dtype and a.limits is a.act is a.padding_mask is None)
    return _forward(kernels, *a) if served and a.x.numel() else op.definition(*a)


# --------------------------------------------------------------------------- the op
@op(FAMILY, check=_check, launch=_launch, fast=_fast)
def balancer_gradient(
    grad: Annotated[Tensor, "*S D"],
    x: Annotated[Tensor, "*S D"],
    min_mean: float | None = None,
    max_mean: float | None = None,
    min_rms: float | None = None,
    max_rms: float | None = None,
    grad_scale: float | None = None,
    channel_dim: Annotated[int, "dimension of x"] = -1,
    limits: Annotated[Tensor, "5"] | None = None,
    act: Annotated[Tensor, " | 1", "constant"] | None = None,
    padding_mask: Annotated[Tensor, "*M", bool] | None = None,
) -> Annotated[Tensor, "*S D", "grad", "constant"]:
    """The gradient of Zipformer's Balancer: that of x, changed so that its channels keep to the limits. Not
    differentiable.

    Args:
        grad, x: the same shape, with at least one dimension. float32, bfloat16, float16 or float64.
        min_mean, max_mean: limits of a channel's mean over its standard deviation.
        min_rms, max_rms: limits of its root mean square.
        grad_scale: root mean square of the change relative to ``grad``.
        channel_dim: the dimension of the channels.
        limits: the five numbers on the device of x, in place of the numbers above.
        act: one number on the device of x. If it is 0, the result is ``grad`` unchanged.
        padding_mask: x's shape without channel_dim, bool; True: the frame has no part in the statistics, and the
            result is ``grad`` there.
    Returns:
        A tensor of grad's shape and dtype, computed in float32 or better, rounded once.
    Raises:
        TypeError: grad or x is not a floating tensor.
        ValueError: shapes or devices do not match; channel_dim is no dimension of x; limits are missing or given twice.
    """
    numbers: Any = min_mean, max_mean, min_rms, max_rms, grad_scale
    low_mean, high_mean, low_rms, high_rms, size = numbers if limits is None else limits.unbind()
    compute = torch.promote_types(x.dtype, torch.float32)
    channel_dim = channel_dim % x.dim() + 1
    # x gets a first dimension, because a mean over no dimension would be one over all.
    grad = grad.detach()
    x, g = x.detach().to(compute)[None], grad.to(compute)[None]
    dims = [i for i in range(x.dim()) if i != channel_dim]
    hidden = None if padding_mask is None else padding_mask.unsqueeze(channel_dim - 1)[None]
    count: Any = max(1, x.numel() // max(1, x.shape[channel_dim]))
    if hidden is not None:
        count = (~hidden).sum().clamp(min=1)

    def mean(t: Tensor) -> Tensor:
        if hidden is None:
            return t.mean(dims, keepdim=True)
        return t.masked_fill(hidden, 0.0).sum(dims, keepdim=True) / count

    mu = mean(x)
    d = x - mu
    centred = mean(d * d)  # not u − μ², which cancels where |μ| is much larger than s
    square = centred + mu * mu
    variance, power = centred.clamp(min=FLOOR), square.clamp(min=FLOOR)
    s, r = variance.sqrt(), power.sqrt()
    m = mu / s

    e = (m - m.clamp(low_mean, high_mean)).sign()
    f = (r - r.clamp(low_rms, high_rms)).sign()
    # Below the floors the statistics are constants.
    e_slope, f = e * (centred >= FLOOR), f * (square >= FLOOR)
    p = e / s + f * mu / power
    q = f / power - e_slope * m / variance
    rms = (p * p + q * q * centred).sqrt() / count
    scale = size / rms.clamp(min=FLOOR) / count
    y = torch.addcmul(g, g.abs(), torch.addcmul(p * scale, q * scale, d))[0].to(grad.dtype)
    if hidden is not None:
        y = torch.where(hidden[0], grad, y)
    return y if act is None else torch.where(act != 0, y, grad)


class Balanced(NamedTuple):
    """What a call of ``balance_`` will get, except the gradient."""

    x: Tensor
    channel_dim: int
    act: Tensor
    hidden: Tensor | None


def sums_of(calls: Sequence[Balanced], table: _jobs.Table) -> list[Tensor | None]:
    """Returns what ``balance_`` takes as ``sums``, found for many calls by few launches."""

    def job(call: Balanced) -> tuple[Tensor, Tensor, Tensor | None]:
        _, x, hidden, _ = _operands(call.x, call.x, call.channel_dim, call.hidden, dense=False)
        return x, call.act, hidden

    return _jobs.done(FAMILY, "sums_of_jobs", calls, job, table)


def balance_(
    grad: Tensor,
    x: Tensor,
    channel_dim: int,
    limits: Tensor,
    act: Tensor | None = None,
    hidden: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Writes ``balancer_gradient`` over grad. On CUDA, where ``act`` is 0, its kernels return at once. ``hidden`` is
    padding_mask, and ``sums`` what ``sums_of`` has found.
    """
    kernels = FAMILY.kernels(x, grad)
    if kernels is not None and kernels.backend == "triton" and x.numel():
        seen, x_seen, frames, _ = _operands(grad, x, channel_dim, hidden, dense=False)
        if seen.data_ptr() == grad.data_ptr():  # no copy in x's order
            kernels.forward(seen, x_seen, *[None] * 5, limits, act, frames, True, sums)
            return
    public = OPS["balancer_gradient"].function
    grad.copy_(public(grad, x, channel_dim=channel_dim, limits=limits, act=act, padding_mask=hidden))
