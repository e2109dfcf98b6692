# SPDX-License-Identifier: Apache-2.0
"""Tables that kernels make of a tensor, made once for all calls of a pass that read it.

A model that calls many kernels with one tensor, for example with where recordings begin, marks it by :func:`share`. It
makes the tensor anew in every pass and nothing writes to it, so a recorded pass makes the tables in each replay.
Tensors that a user gives have no mark: kernels make their tables in every call.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

from fastasr._recording import is_traced

T = TypeVar("T")


def kept(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keeps the ``most`` last results of a function, which are tensors: those of calls that compute their values."""

    def decorated(make: Callable[..., T]) -> Callable[..., T]:
        cached = functools.lru_cache(most)(make)

        @functools.wraps(make)
        def found(*args: Any) -> T:
            return make(*args) if is_traced() else cached(*args)

        vars(found)["cache_clear"] = cached.cache_clear
        return found

    return decorated


def share(*tensors: Tensor) -> None:
    """Has these tensors, which hold the same values, keep one set of tables for as long as one of them lives."""
    if not is_traced():
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
    return tables[key]
