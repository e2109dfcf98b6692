# SPDX-License-Identifier: Apache-2.0
"""Code that ops with a linear layer share: the conditions of the product, and the gradient of the bias."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastasr._recording import recording
from fastasr.ops._dispatch import KernelFamily, Kernels

MANY_ROWS = 512  # torch adds up fewer rows, in one launch; the kernels take two.


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> bool:
    """Checks the conditions that the product itself does not."""
    if not (x.layout is weight.layout is torch.strided and weight.dim() == 2):
        return False
    return bias is None or (
        bias.layout is torch.strided and bias.dim() == 1 and bias.numel() == weight.shape[0]
    )


class LateFamily(KernelFamily):
    """Kernels whose gradients of parameters may come at the end of a recorded backward pass."""

    def kernels(self, x: Tensor, *others: Tensor | None) -> Kernels | None:
        found, recorded = super().kernels(x, *others), recording()
        if found is None or recorded is None or recorded.back is None or found.backend != "triton":
            return found
        return replace(found, later=recorded.back.later)


def late(kernels: Kernels, bias: Tensor | None, grad: Tensor) -> Callable[..., bool] | None:
    """Returns ``later(gradient, do, work)`` for the gradient of a bias, or None if it comes at once."""
    if kernels.later is None or bias is None or grad.dtype is not bias.dtype:
        return None
    return partial(kernels.later, bias)


def late_sums(kernels: Kernels, *parameters: Tensor | None) -> tuple[Callable[..., bool] | None, ...] | None:
    """Returns the same for the gradients of parameters, which have their dtypes, or None if all come at once."""
    if kernels.later is None:
        return None
    return tuple(None if p is None else partial(kernels.later, p) for p in parameters)


def bias_grad(grad: Tensor, backend: str = "cpu", later: Callable[..., bool] | None = None) -> Tensor:
    """Returns the sum over rows, a copy where there is one row (an op's output may not be its input). For 30,000 rows
    of 192 in bfloat16, torch's sum takes 57 us on an H200 and torch.compile's 11. ``later`` is what ``late`` returns.
    """
    if backend == "triton" and grad.is_contiguous() and grad.numel() > MANY_ROWS * grad.shape[-1]:
        return importlib.import_module("fastasr.kernels._sum_rows").sum_rows(grad, later)
    return grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad.clone()
