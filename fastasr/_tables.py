# SPDX-License-Identifier: Apache-2.0
"""Tables that kernels make of a tensor, made once for all calls of a pass that read it.

A model that calls many kernels with one tensor, for example with where recordings begin, marks it by :func:`share`. It
makes the tensor anew in every pass and nothing writes to it, so a recorded pass makes the tables in each replay.
Tensors that a user gives have no mark: kernels make their tables in every call.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def share(*tensors: Tensor) -> None:
    """Has these tensors, which hold the same values, keep one set of tables for as long as one of them lives."""
    if not torch.compiler.is_compiling():
        tables: dict[Hashable, object] = {}
        for t in tensors:
            t._fastasr_tables = tables  # type: ignore[attr-defined]


def table(t: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """Returns ``make()``: if ``t`` is marked, what the first call with this key made."""
    tables = getattr(t, "_fastasr_tables", None)
    if tables is None:
        return make()
    if key not in tables:
        tables[key] = make()
    found: T = tables[key]
    return found
