# SPDX-License-Identifier: Apache-2.0
"""The small steps of a recorded training pass, whose decisions are numbers on the device, as one kernel each on CUDA.

Not public: rates and flags are tensors of one element that the host writes before each replay. The caller draws the
random numbers, so a recorded pass has the same ones as an unrecorded one. A sequence is kept where its number exceeds
the rate. Off CUDA, each function below runs its eager formula.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr.ops._dispatch import KernelFamily, triton_launchers

FAMILY = KernelFamily("decided", (), (triton_launchers("_decided"),))


def _kernels(x: Tensor, *others: Tensor | None) -> Any:
    found = FAMILY.kernels(x, *others) if x.dim() else None
    return None if found is None else found.forward


class Drawn(NamedTuple):
    """A uniform number for each sequence, (batch, 1), and the rate on the device. ``of`` (N,) has the sequence of each
    frame where x (N, 1, C) holds those of all sequences."""

    numbers: Tensor
    rate: Tensor
    of: Tensor | None = None

    def mask(self, dtype: torch.dtype) -> Tensor:
        kept = (self.numbers > self.rate).to(dtype)
        return kept if self.of is None else kept.index_select(0, self.of).unsqueeze(1)


NOT_DRAWN = None, None, None


def plus(src: Tensor, y: Tensor, drawn: Drawn | None, narrow: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Returns src + y (T, B, C), without y in dropped sequences, and this sum in ``narrow`` (None: the sum itself)."""
    kernels = _kernels(src, y)
    if kernels is not None:
        return kernels.plus(src.contiguous(), y.contiguous(), *(drawn or NOT_DRAWN), narrow)
    out = src + y if drawn is None else torch.addcmul(src, y, drawn.mask(y.dtype))
    return out, out if narrow is None else out.to(narrow)


def gradients(
    grads: list[Tensor], drawn: Drawn | None, dtype: torch.dtype | None, narrow: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the sum of one to five gradients (T, B, C), the widest first, in ``dtype``, and in ``narrow`` for the
    kept sequences; None for a dtype of None. Both are new tensors.
    """
    kernels = _kernels(*grads)
    if kernels is not None:
        return kernels.gradients([g.contiguous() for g in grads], *(drawn or NOT_DRAWN), dtype, narrow)
    total = grads[0]
    for g in grads[1:]:
        total = total + g
    dy = None
    if narrow is not None:
        dy = (total if drawn is None else total * drawn.mask(total.dtype)).to(narrow)
        dy = dy.clone() if dy is total else dy
    return None if dtype is None else total.clone() if total is grads[0] else total.to(dtype), dy


def mask(drawn: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
    """Returns scale where drawn > rate, else 0, in the dtype of ``drawn``."""
    kernels = _kernels(drawn)
    if kernels is not None:
        return kernels.mask(drawn, rate, scale)
    return (drawn > rate).to(drawn.dtype) * scale.to(drawn.dtype)


def scaled(x: Tensor, drawn: Drawn) -> Tensor:
    """Returns (B, C): x (C,) for the kept sequences, 0 for the others."""
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.scaled(x.contiguous(), drawn.numbers, drawn.rate)
    return x * (drawn.numbers > drawn.rate)


def limited(
    grad: Tensor,
    x: Tensor,
    limits: Tensor,
    drawn: Drawn | None = None,
    later: Callable[..., bool] | None = None,
) -> Tensor:
    """Returns the gradient of x, turned where it would push x further out of its limits. ``limits`` holds whether
    they apply, the least and the greatest x. With ``drawn``, ``grad`` is the gradient of :func:`scaled`. ``later``
    says whether the kernels' work is done at the end of a recorded pass (``ops._linear.late``).
    """
    kernels = _kernels(x[None], grad)
    if kernels is not None:
        return kernels.limited(grad.contiguous(), x.contiguous(), limits, *(drawn or NOT_DRAWN)[:2], later)
    if drawn is not None:
        grad = (grad * (drawn.numbers > drawn.rate)).sum(0)
    apply, low, high = limits.unbind()
    wrong = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
    return torch.where(wrong & (apply != 0), -grad, grad)


def either(weights: Tensor, act: Tensor) -> Tensor:
    """Returns a copy of the weights (1, B, T, S), or, where ``act`` is not 0, equal weights on all sources whose weight
    is not 0.
    """
    kernels = _kernels(weights)
    if kernels is not None:
        return kernels.either(weights, act)
    seen = (weights > 0.0).to(weights.dtype)
    return torch.where(act != 0, seen * (1.0 / seen.sum(dim=-1, keepdim=True)), weights)


def pads(x: Tensor) -> bool:
    """Says whether kernels serve x; they pad the operands of products with zeros."""
    return _kernels(x) is not None
