# SPDX-License-Identifier: Apache-2.0
"""Numbers that the host draws or reads in a call: at once, or, while the call is recorded, before each replay.

Each function below draws the same random numbers in the same order either way.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._recording import Job, recording
from fastasr._transforms import Function
from fastasr.models.zipformer.schedules import FloatLike


class Numbers(Protocol):
    """Numbers of the host in a recorded call, ``values`` (count,) on the device."""

    values: Tensor


def rate(x: FloatLike) -> Tensor | float:
    """Returns float(x) of a number or schedule. While a call is recorded it returns the number on the device that this
    will be in each replay, or 0.0 if it is 0 now; the recording then holds while it is 0.
    """
    recorded = recording()
    if recorded is None or isinstance(x, (int, float)):
        return float(x)
    return _scheduled(recorded, x, lambda: [float(x)], 1)


def keep_rates(x: FloatLike) -> tuple[Tensor | float, Tensor | float]:
    """Returns (p, 1 / (1 - p)) of a rate of dropout, as ``rate`` does; 0.0 and 1.0 for a rate of 0."""
    recorded = recording()
    if recorded is None or isinstance(x, (int, float)):
        p = float(x)
        return p, 1.0 / (1.0 - p)

    def both() -> list[float]:
        p = float(x)
        return [p, 1.0 / (1.0 - p)]

    found = _scheduled(recorded, x, both, 2)
    if isinstance(found, float):
        return 0.0, 1.0
    share, scale = found.unbind()
    return share, scale


def _scheduled(recorded: Any, x: FloatLike, plan: Callable[[], list[float]], count: int) -> Tensor | float:
    if recorded.phase(x):
        recorded.numbers(lambda: (plan(), [])[1], 0)  # the reading still draws
        return 0.0
    values = recorded.numbers(plan, count).values
    return values[0] if count == 1 else values


def is_zero(number: Tensor | float) -> bool:
    return not isinstance(number, Tensor) and number == 0.0


# --------------------------------------------------------------------------- where gradients are changed
@contextlib.contextmanager
def owning(owned: bool = True) -> Iterator[None]:
    """Has Balancers and Whitens of a recorded call change gradients in place inside the block: the node behind each of
    them gives its gradient to nobody else.
    """
    with _setting("owned", owned):
        yield


def on_columns(module: torch.nn.Module, x: Tensor, begin: int, end: int) -> Tensor:
    """Returns x after ``module``, a Balancer or Whiten, has watched columns of it. The call is being recorded, and one
    node changes these columns of the gradient of x.
    """
    with _setting("columns", (begin, end)):
        return module(x)


@contextlib.contextmanager
def _setting(name: str, value: tuple[int, int] | bool) -> Iterator[None]:
    recorded = recording()
    if recorded is None:
        yield
        return
    before = getattr(recorded, name)
    setattr(recorded, name, value)
    try:
        yield
    finally:
        setattr(recorded, name, before)


def changing(
    x: Tensor,
    change: Callable[[Tensor, Tensor, Any], None],
    do: Callable[..., list[Any]],
    call: Callable[[Tensor], Any],
) -> Tensor:
    """Returns x, whose gradient ``change(grad, x, found)`` edits in place when a recorded call runs backward. It gets
    a copy in the order of x, or inside ``owning`` the gradient itself; inside ``on_columns`` these columns of both.
    ``found`` is what ``do(calls, table)`` found for ``call(x)`` when the backward pass began.
    """
    recorded: Any = recording()
    job = recorded.back.job(do, call(_columns(x.detach(), recorded.columns)))
    return _Changing.apply(x, change, job, recorded.owned, recorded.columns)


def _columns(x: Tensor, columns: tuple[int, int] | None) -> Tensor:
    return x if columns is None else x[..., slice(*columns)]


class _Changing(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        change: Callable[[Tensor, Tensor, Any], None],
        job: Job,
        owned: bool,
        columns: tuple[int, int] | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.change, ctx.job, ctx.owned, ctx.columns = change, job, owned, columns
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if not ctx.owned:
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        ctx.change(_columns(grad, ctx.columns), _columns(x, ctx.columns), ctx.job.take())
        return grad, None, None, None, None
