# SPDX-License-Identifier: Apache-2.0
"""The products of a layer that a native call computes whole (csrc/bindings/layer_products.h): of its own weights, or of
their copies in fewer bits."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastasr.models.common.module_state import ModuleState
from fastasr.ops import _gemm, _reduced_weights

WAYS = {"torch": 0, "native": 1, "few rows": 2, "bf16": 3, "int8": 4}  # of csrc/bindings/layer_products.h
FEW_ROWS = 15  # of csrc/cpu/gemm/gemm.h


@dataclass
class Products:
    """Matrices or their copies in fewer bits, and the ways to multiply by them, in the order of the native call."""

    weights: list[Tensor] = field(default_factory=list)
    ways: list[int] = field(default_factory=list)
    copies: list[_reduced_weights.Copy] = field(default_factory=list)

    def watched(self) -> bool:
        """Says whether somebody asks for the inputs of a product."""
        return any(copy.watch is not None for copy in self.copies)


def key() -> tuple:
    """Returns what products depend on, besides the sizes of their inputs and the weights."""
    modes = torch.are_deterministic_algorithms_enabled(), _reduced_weights.is_suspended()
    return torch.get_num_threads(), *modes, _gemm.generation(), _reduced_weights.generation()


def of(
    state: ModuleState, factors: Iterable[tuple[Tensor, Tensor]], few_rows: bool = False
) -> Products | None:
    """Returns the products of ``factors``, inputs (..., K) with weights (N, K), or None before all have been measured.
    With ``few_rows`` the kernel for up to 15 rows serves them unmeasured. From then on ``state``, the layer's, compares
    values if there are copies."""
    found = Products()
    if _reduced_weights.copies:
        state.compare()
    for x, weight in factors:
        copy = _reduced_weights.of(x, weight) if _reduced_weights.copies else None
        rows = x.shape[:-1].numel()
        if copy is not None:
            way: str | None = copy.format
            found.copies.append(copy)
        elif few_rows and rows <= FEW_ROWS:
            way = "few rows"
        else:
            way = _gemm.chosen_product("forward", rows, *weight.shape)
        if way is None:
            return None
        found.weights.append(weight if copy is None else copy.packed)
        found.ways.append(WAYS[way])
    return found
