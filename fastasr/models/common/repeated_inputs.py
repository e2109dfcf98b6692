# SPDX-License-Identifier: Apache-2.0
"""Results of linear layers that get the same input again: an encoder's frames, which the decoders of some frameworks
project to keys and values anew at every step of a search, and for every beam."""

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastasr._recording import is_traced, recording
from fastasr._transforms import is_transformed
from fastasr.ops import _dispatch, _kept, _reduced_weights
from fastasr.ops._register import autocast_dtype


class _Thread(threading.local):
    def __init__(self) -> None:
        self.layers: tuple = ()


thread = _Thread()
# Layer -> (what the result depends on, the record of the input and the parameters, the input's owner, the result)
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
    """Returns ``find(layer, x)`` for x (B, T, width), or what is kept of it.

    The input is known by its address, torch's counter of writes and a sample of its values, and while its owner exists
    no other tensor has the address. Views of a tensor are one input. Equal rows, as of the beams of a recording, are
    computed once.
    """
    known = any(layer is one for one in thread.layers) and x.dim() == 3 and len(x) > 0
    if not known or torch.is_grad_enabled() or _is_observed(x):
        return find(layer, x)
    expanded = x.stride(0) == 0
    rows = x[:1] if expanded else x
    tensors = rows, *filter(torch.is_tensor, (layer.weight, layer.bias))
    if not (x.is_cpu or _kept.are_counted(tensors)):
        return find(layer, x)
    copy = _reduced_weights.of(x, layer.weight)
    form = rows.shape, rows.stride()[1:], x.dtype, layer.weight.dtype, _dispatch.forced_backend(), copy
    owner = x if x._base is None else x._base
    found = _results.get(layer)
    if found is None or found[0] != form or found[2]() is not owner or not found[1].unchanged(tensors):
        n = equal_rows(rows)
        y = find(layer, rows[::n])
        place = weakref.ref(layer)
        gone = weakref.ref(owner, lambda _: _forget(place))
        found = form, _kept.Originals(tensors), gone, y if n == 1 else y.repeat_interleave(n, 0)
        _results[layer] = found
    y = found[3]
    return y.expand(len(x), -1, -1) if expanded else y


def _is_observed(x: Tensor) -> bool:
    """Says whether a result would depend on more than x and the parameters, or must be found by the call itself."""
    return bool(is_traced() or is_transformed() or recording() is not None or autocast_dtype(x) is not None)


def _forget(place: Any) -> None:
    layer = place()
    if layer is not None:
        _results.pop(layer, None)


def equal_rows(x: Tensor) -> int:
    """Returns the largest n so that the rows of x (R, T, width) are groups of n equal ones."""
    likely = (x[1:, :1] == x[:-1, :1]).flatten(1).all(1)
    if not likely.any():
        return 1
    equal = (x[1:] == x[:-1]).flatten(1).all(1).tolist()
    return math.gcd(*(i for i, same in enumerate(equal, 1) if not same), len(x))
