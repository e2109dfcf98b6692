# SPDX-License-Identifier: Apache-2.0
"""Results of linear layers that get the same input again: an encoder's frames, which the decoders of some frameworks
project to keys and values anew at every step of a search."""

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastasr._recording import is_traced, recording
from fastasr._transforms import is_transformed
from fastasr.models.common.plain import is_plain
from fastasr.ops import _dispatch, _gemm, _kept, _reduced_weights
from fastasr.ops._register import autocast_dtype

T = TypeVar("T")


class _Thread(threading.local):
    def __init__(self) -> None:
        self.layers: tuple = ()


thread = _Thread()
# Module -> (what the result depends on, the record of the input and the parameters, the input's owner, the result)
_results: weakref.WeakKeyDictionary[torch.nn.Module, tuple] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def kept(*layers: Any) -> Iterator[None]:
    """Inside the block the result of each of these linear layers stays as long as its input exists, and serves later
    calls on this input. Whoever gets it must not write to it."""
    before, thread.layers = thread.layers, layers
    try:
        yield
    finally:
        thread.layers = before


def result(layer: Any, x: Tensor, find: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Returns ``find(layer, x)`` for x (B, T, width), or what is kept of it."""
    if not any(layer is one for one in thread.layers) or not is_plain(layer, torch.nn.Linear):
        return find(layer, x)
    parameters = [*filter(torch.is_tensor, (layer.weight, layer.bias))]
    form = layer.weight.dtype, _dispatch.forced_backend(), _reduced_weights.of(x, layer.weight)
    return of(layer, x, parameters, form, partial(find, layer))


def without_copies(module: torch.nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Returns the largest n so that the rows of x (R, T, width) are groups of n equal ones, and the first row of each
    group; 1 and x where rows are not to be compared. Both stay with the module as long as x exists."""
    if x.dim() != 3 or len(x) < 2 or torch.is_grad_enabled():
        return 1, x
    if x.stride(0) == 0:
        return len(x), x[:1]
    n, rows = of(module, x, [], (), _first_rows, otherwise=lambda _: (1, None))
    return n, x if rows is None else rows


def _first_rows(x: Tensor) -> tuple[int, Tensor | None]:
    n = equal_rows(x)
    # A view would keep x. In inference mode views do not know whose they are, so that of a recording stays the same.
    return n, None if n == 1 else _gemm.owned(x[::n])


def of(
    place: torch.nn.Module,
    x: Tensor,
    parameters: list[Tensor],
    form: tuple,
    find: Callable[[Tensor], T],
    otherwise: Callable[[Tensor], T] | None = None,
) -> T:
    """Returns ``find(x)``, or what is kept of it; ``otherwise(x)`` where nothing is kept.

    The input is known by its address, torch's counter of writes and a sample of its values, and while its owner exists
    no other tensor has the address. Views of a tensor are one input.
    """
    tensors = x, *parameters
    uncounted = not (x.is_cpu or _kept.are_counted(tensors))
    if x.dim() != 3 or torch.is_grad_enabled() or uncounted or _is_observed(x):
        return (otherwise or find)(x)
    form = x.shape, x.stride()[len(x) == 1 :], x.dtype, *form
    owner = x if x._base is None else x._base
    found = _results.get(place)
    if found is None or found[0] != form or found[2]() is not owner or not found[1].unchanged(tensors):
        gone = weakref.ref(owner, partial(_forget, weakref.ref(place)))
        found = _results[place] = form, _kept.Originals(tensors), gone, find(x)
    kept: T = found[3]
    return kept


def _is_observed(x: Tensor) -> bool:
    """Says whether a result would depend on more than x and the parameters, or must be found by the call itself."""
    return bool(is_traced() or is_transformed() or recording() is not None or autocast_dtype(x) is not None)


def _forget(place: Any, _: Any) -> None:
    module = place()
    if module is not None:
        _results.pop(module, None)


def equal_rows(x: Tensor) -> int:
    """Returns the largest n so that the rows of x (R, T, width) are groups of n equal ones."""
    likely = (x[1:, :1] == x[:-1, :1]).flatten(1).all(1)
    if not likely.any():
        return 1
    equal = (x[1:] == x[:-1]).flatten(1).all(1).tolist()
    return math.gcd(*(i for i, same in enumerate(equal, 1) if not same), len(x))
