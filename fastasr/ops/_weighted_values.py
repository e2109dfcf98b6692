# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of values, y[t,b,h] = Σ_s W[h,b,t,s] V[s,b,h], by one kernel each way on CUDA. Not public."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import KernelFamily, Kernels, direct, triton_kernels
from fastasr.ops._register import autocast_dtype


def _load() -> Kernels:
    kernels: Any = importlib.import_module("fastasr.kernels._weighted_values")
    return Kernels(
        "triton", _or_by_torch(kernels.forward, _forward), _or_by_torch(kernels.backward, _backward)
    )


def _or_by_torch(kernel: Callable[..., Any], by_torch: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls the kernel, or ``by_torch`` once the device could not launch one."""

    def run(*arguments: Any) -> Any:
        if FAMILY.kernels(arguments[0]) is not None:
            try:
                return kernel(*arguments)
            except Unlaunchable as error:
                FAMILY.give_up(error, arguments[0])
        return by_torch(*arguments)

    return run


FAMILY = KernelFamily("weighted_values", (), (replace(triton_kernels("_weighted_values"), load=_load),))
MOST_CHANNELS = 32  # of a head: a BLAS is faster for more, on the CPU too


def launchers(weights: Tensor, values: Tensor) -> Kernels | None:
    """Returns the kernels for weights (H, B, T, S) and values (S, B, H · dim), or None. See ``products``."""
    dtype = weights.dtype
    channels = len(weights) and values.shape[2] / len(weights)
    if (
        not direct(weights, values)
        or values.dtype is not dtype
        or autocast_dtype(weights) not in (None, dtype)
        or weights.stride(-1) != 1
        or 0 in weights.stride()  # repeated weights, whose gradients are not
        or channels not in range(1, MOST_CHANNELS + 1)
    ):
        return None
    return FAMILY.kernels(weights)


def products(weights: Tensor, values: Tensor) -> Kernels:
    """Returns what computes y (T, B, H · dim) = ``forward(weights, values)`` of weights (H, B, T, S) and contiguous
    values (S, B, H · dim) of one dtype, and the gradients of both, ``backward(grad, weights, values, total, add)``. The
    weights' are in ``total`` (H, B, T, S), whose rows are dense; with ``add`` they are added to what it has."""
    return launchers(weights, values) or _BY_TORCH


def _forward(weights: Tensor, values: Tensor) -> Tensor:
    return (weights @ _by_head(values, weights)).permute(2, 1, 0, 3).flatten(2)


def _backward(
    grad: Tensor, weights: Tensor, values: Tensor, total: Tensor | None = None, add: bool = False
) -> tuple[Tensor, Tensor]:
    g, v = _by_head(grad, weights), _by_head(values, weights)
    dweights = g @ v.mT
    if total is not None:
        dweights = total.copy_(total + dweights if add else dweights)
    return dweights, (weights.mT @ g).permute(2, 1, 0, 3).flatten(2)


_BY_TORCH = Kernels("eager", _forward, _backward)


def _by_head(x: Tensor, weights: Tensor) -> Tensor:
    """Returns x (T, B, H · dim) as (H, B, T, dim)."""
    return x.unflatten(2, (len(weights), -1)).permute(2, 1, 0, 3)
