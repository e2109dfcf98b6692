# SPDX-License-Identifier: Apache-2.0
"""Packs the weights of layers for native calls that take one step of a stream, and decides when such a call is used.

A step has a few frames, so most of its time goes into reading the weights. They are packed once, in the order in which
a step reads them, into one block of memory on huge pages. **This doubles the memory of the layer's weights.** To
decline it, set ``layer.packed_streaming = False``; the layer's operations are then called one by one.

The weights are packed at a layer's first step, and the native result is then compared with that of the operations. They
are packed again when a parameter, a submodule or a forward has changed (:mod:`fastasr.models.common.module_state`).
:mod:`fastasr.ops._kept` tells which writes to a parameter may pass unnoticed; so does the assignment of a plain
attribute such as a norm's ``eps``. Call :func:`fastasr.refresh` after them.
"""

import abc
import weakref

import torch

from fastasr.models.common.inference import any_hooked, is_plain_inference
from fastasr.models.common.module_state import ModuleState
from fastasr.ops import _dispatch

# The native call is used if the relative rms difference of its results from those of the operations is below this.
AGREEMENT = 1e-4

_WATCHED = "a submodule has hooks, or is in training mode"


def may_serve(layer, x, weight):
    """Says whether a native call on packed weights may replace this one: as :func:`may_call`, and the layer does not
    decline with ``packed_streaming = False``.
    """
    return may_call(layer, x, weight) and getattr(layer, "packed_streaming", True)


def may_call(layer, x, weight):
    """Says whether a native call may replace this one: eval mode, no gradients, a CPU with a native library.
    x (frames, streams, channels) has the weight's dtype.
    """
    return (
        is_plain_inference(layer, x, weight, 3)
        and not torch.jit.is_tracing()
        and _dispatch.forced_backend() in ("auto", "cpu")
        and not _dispatch.native_reason()
    )


class PackedLayer(abc.ABC):
    """The weights of a layer in the order in which the native call reads them.

    ``reason`` says why the native call cannot be used; it is "" if it can. A subclass packs the weights (``_pack``),
    gives the reasons that hold until the layer changes (``_why_never``, "" for none) and computes an example both
    natively and by the layer's operations (``_example``).
    """

    METHODS = ("forward",)  # methods that may be bound to an instance of the layer's parts
    OPERATIONS = "operations"  # the name of the layer's own operations in a reason
    COPIES = True  # whether _pack copies the weights

    def __init__(self, layer, by_operations):
        self._state = ModuleState(layer, methods=self.METHODS, copies=self.COPIES)
        self.reason = _WATCHED if self._state.watched() else _why_no_weights(layer) or self._why_never(layer)
        if not self.reason and any_hooked(layer.modules()):
            self.reason = _WATCHED
        if not self.reason and not self._state.traceable():
            self.reason = "parameters were made in inference mode, where changes leave no trace"
        if self.reason:
            return
        try:
            with torch.no_grad():
                self._pack(layer)
                error = _error(*self._example(by_operations))
        except (AttributeError, RuntimeError, TypeError, ValueError) as failure:
            self.reason = f"its parts do not fit each other: {failure}"
        else:
            self.reason = "" if error <= AGREEMENT else f"its {self.OPERATIONS} compute something else"

    def fresh(self):
        """Says whether the layer has not changed since its weights were packed."""
        watched = self.reason == _WATCHED
        return self._state.watched() == watched and self._state.unchanged()

    @abc.abstractmethod
    def _why_never(self, layer): ...

    @abc.abstractmethod
    def _pack(self, layer): ...

    @abc.abstractmethod
    def _example(self, by_operations):
        """Returns two lists of tensors: the native results and those of the layer's operations."""


class PackedLayers:
    """Keeps the packed copies of layers as long as the layers live. ``kind``: a subclass of :class:`PackedLayer`."""

    def __init__(self, kind):
        self._kind, self._of = kind, weakref.WeakKeyDictionary()

    def of(self, layer, by_operations):
        """Returns the layer's packed copy, which is made again if the layer has changed."""
        packed = self._of.get(layer)
        if packed is None or not packed.fresh():
            packed = self._of[layer] = self._kind(layer, by_operations)
        return packed

    def why_not(self, layer):
        """Returns why the native call cannot be used for this layer: "" if it can, None before the first step."""
        packed = self._of.get(layer)
        return None if packed is None or not packed.fresh() else packed.reason


def _why_no_weights(layer):
    if any(type(p) not in _dispatch.PLAIN or not p.is_cpu for p in layer.parameters()):
        return "not all parameters are plain tensors on the CPU"
    if any(p.dtype is not torch.float32 for p in layer.parameters()):
        return "not all parameters are float32"
    return ""


def _error(got, expected):
    """Returns the largest rms error of the results relative to the expected ones; infinity if one is NaN."""
    errors = [
        ((a - b).double().norm() / b.double().norm().clamp(min=1e-9)).item()
        for a, b in zip(got, expected, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")
