# SPDX-License-Identifier: Apache-2.0
"""Work of a recorded backward pass that needs none of its gradients, done for many calls at its beginning."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fastasr.ops._dispatch import KernelFamily

Table = Callable[[Sequence[Sequence[int]]], Tensor]  # brings rows of integers to the device


class Call(Protocol):
    """What a call will get, except the gradient."""

    @property
    def x(self) -> Tensor: ...


C = TypeVar("C", bound=Call)


def done(
    family: KernelFamily, launcher: str, calls: Sequence[C], job: Callable[[C], tuple[Any, ...]], table: Table
) -> list[Any]:
    """Returns what ``launcher`` of the family's Triton kernels finds for the ``job`` of each call by few launches: None
    where it declines, or where other kernels serve x.
    """
    found: list[Any] = [None] * len(calls)
    served = []
    for i, call in enumerate(calls):
        kernels = family.kernels(call.x)
        if kernels is not None and kernels.backend == "triton" and call.x.numel():
            served.append(i)
    if served:
        launch = getattr(importlib.import_module(f"fastasr.kernels.{family.name}"), launcher)
        for i, of_job in zip(served, launch([job(calls[i]) for i in served], table), strict=True):
            found[i] = of_job
    return found
