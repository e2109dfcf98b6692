# SPDX-License-Identifier: Apache-2.0
"""The passes around the products of nonlin_attention, by kernels or in eager."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastasr.ops import _dispatch
from fastasr.ops._dispatch import KernelFamily, Kernels, native_kernels, triton_kernels


@dataclass(frozen=True)
class Passes(Kernels):
    """``forward`` is the gate, ``projected -> x``; ``backward`` the pass before the products of the backward one,
    ``(grad, projected) -> (x, u)``."""

    product: Callable  # (projected, o) -> y
    gradient: Callable  # (dx, grad, projected, o) -> dprojected


def _load(backend: str) -> Passes:
    names = [f"nonlin_attention_{name}" for name in ("gate", "operands", "product", "gradient")]
    if backend == "cpu":
        return Passes(backend, *(_dispatch.registered(backend, name) for name in names))
    module = importlib.import_module("fastasr.kernels.nonlin_attention")
    return Passes(backend, *(getattr(module, name) for name in names))


_NATIVE = native_kernels("nonlin_attention", "nonlin_attention_gate", partial(_load, "cpu"))
_TRITON = replace(triton_kernels("nonlin_attention"), load=partial(_load, "triton"))
FAMILY = KernelFamily("nonlin_attention", (), (_NATIVE, _TRITON))


def passes(weights: Tensor, projected: Tensor) -> Passes:
    """Returns the passes around the products, for a caller who computes these. ``forward`` and ``backward`` also take a
    number of rows, to which they fill up x with zeros; ``backward`` then takes a number on the device too, and x is 0
    where it is not 0.
    """
    found = FAMILY.kernels(projected, weights)
    return found if isinstance(found, Passes) and found.backend == "triton" else _EAGER


def _gate(projected: Tensor, rows: int) -> Tensor:
    s, v, _ = projected.chunk(3, dim=-1)
    x = v * torch.tanh(s)
    return x if rows == len(x) else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, rows - len(x)))


def _operands(grad: Tensor, projected: Tensor, rows: int, constant: Tensor | None) -> tuple[Tensor, Tensor]:
    x = _gate(projected, rows)
    x = x if constant is None else torch.where(constant == 0, x, 0)
    return x, grad * projected.chunk(3, dim=-1)[2]


def _slopes(dx: Tensor, grad: Tensor, projected: Tensor, o: Tensor) -> Tensor:
    s, v, _ = projected.chunk(3, dim=-1)
    dx, y = dx.transpose(0, 1), torch.tanh(s)
    return torch.cat([dx * v * (1 - y * y), dx * y, grad * o.transpose(0, 1)], -1)


_EAGER = Passes(
    "eager", _gate, _operands, lambda projected, o: o.transpose(0, 1) * projected.chunk(3, dim=-1)[2], _slopes
)
