# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of values, y[t,b,h] = Σ_s W[h,b,t,s] V[s,b,h], by one kernel each way on CUDA. Not public."""

import importlib
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import KernelFamily, Kernels, direct, triton_kernels
from fastasr.ops._register import autocast_dtype


def _load() -> Kernels:
    launchers: Any = importlib.import_module("fastasr.kernels._weighted_values")
    return Kernels("triton", launchers.forward, launchers.backward)


FAMILY = KernelFamily("weighted_values", (), (replace(triton_kernels("_weighted_values"), load=_load),))
MOST_CHANNELS = 32  # of a head: torch's products are better for more


def launchers(weights: Tensor, values: Tensor) -> Kernels | None:
    """Returns the kernels for weights (H, B, T, S) and values (S, B, H · dim), or None."""
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


def forward(weights: Tensor, values: Tensor) -> Tensor:
    """Returns y (T, B, H · dim) of weights (H, B, T, S) and values (S, B, H · dim) of one dtype."""
    kernels = launchers(weights, values)
    if kernels is not None:
        try:
            y: Tensor = kernels.forward(weights, values.contiguous())
            return y
        except Unlaunchable as error:
            FAMILY.give_up(error, weights)
    return (weights @ _by_head(values, weights)).permute(2, 1, 0, 3).flatten(2)


def backward(grad: Tensor, weights: Tensor, values: Tensor, total: Tensor, add: bool) -> Tensor:
    """Writes the gradient of the weights to ``total`` (H, B, T, S), whose rows are dense, or with ``add`` adds it.
    Returns that of the values."""
    kernels = launchers(weights, values)
    if kernels is not None:
        try:
            dvalues: Tensor = kernels.backward(grad.contiguous(), weights, values.contiguous(), total, add)
            return dvalues
        except Unlaunchable as error:
            FAMILY.give_up(error, weights)
    g, v = _by_head(grad, weights), _by_head(values, weights)
    dweights = g @ v.mT
    total.copy_(total + dweights if add else dweights)
    return (weights.mT @ g).permute(2, 1, 0, 3).flatten(2)


def _by_head(x: Tensor, weights: Tensor) -> Tensor:
    """Returns x (T, B, H · dim) as (H, B, T, dim)."""
    return x.unflatten(2, (len(weights), -1)).permute(2, 1, 0, 3)
