# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights are packed for a native call that takes one step of a stream, and when the call serves.

The packed copy is made at a layer's first step, when its result is compared with that of the layer's own operations,
and made again when a parameter, a submodule or a forward has changed (:mod:`fastasr.models.common.module_state`).
"""

import abc
import weakref

import torch

from fastasr.models.common.inference import any_hooked, is_plain_inference
from fastasr.models.common.module_state import ModuleState
from fastasr.ops import _dispatch

# Of a layer's results, between the native call and the operations, by rms.
AGREEMENT = 1e-4

_WATCHED = "a submodule has hooks, or is in training mode"


def may_serve(layer, x, weight):
    """Whether this is a call in eval mode, without gradients, on a CPU with a native library, of a layer that does not
    decline with ``packed_streaming = False``. x: (frames, streams, channels), of the weight's dtype."""
    return (
        is_plain_inference(layer, x, weight, 3)
        and not torch.jit.is_tracing()
        and _dispatch.forced_backend() in ("auto", "cpu")
        and _dispatch.native_library() is not None
        and getattr(layer, "packed_streaming", True)
    )


class PackedLayer(abc.ABC):
    """The weights of a layer as the native call reads them, or the ``reason`` why there are none, "" otherwise.

    A subclass packs (``_pack``), says what only a change of the layer can change (``_why_never``, "" when it serves)
    and computes an example natively and by the layer's operations (``_example``).
    """

    METHODS = ("forward",)  # that a layer's parts may have bound to an instance
    OPERATIONS = "operations"  # what they are called in a reason

    def __init__(self, layer, by_operations):
        self._state = ModuleState(layer, methods=self.METHODS)
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
        """Whether the layer is what it was when this was made."""
        watched = self.reason == _WATCHED
        return self._state.watched() == watched and self._state.unchanged()

    @abc.abstractmethod
    def _why_never(self, layer): ...

    @abc.abstractmethod
    def _pack(self, layer): ...

    @abc.abstractmethod
    def _example(self, by_operations):
        """Two lists of tensors."""


class PackedLayers:
    """The packed copies of layers of one kind, a subclass of :class:`PackedLayer`, while the layers live."""

    def __init__(self, kind):
        self._kind, self._of = kind, weakref.WeakKeyDictionary()

    def of(self, layer, by_operations):
        """The layer's packed copy, made anew when the layer has changed."""
        packed = self._of.get(layer)
        if packed is None or not packed.fresh():
            packed = self._of[layer] = self._kind(layer, by_operations)
        return packed

    def why_not(self, layer):
        """Why the native call never serves this layer as it is; "" when it does, None before its first step."""
        packed = self._of.get(layer)
        return None if packed is None or not packed.fresh() else packed.reason

    def forget(self, layer):
        """Drop the packed weights; the next step packs anew."""
        self._of.pop(layer, None)


def _why_no_weights(layer):
    if any(type(p) not in _dispatch.PLAIN or not p.is_cpu for p in layer.parameters()):
        return "not all parameters are plain tensors on the CPU"
    if any(p.dtype is not torch.float32 for p in layer.parameters()):
        return "not all parameters are float32"
    return ""


def _error(got, expected):
    """The largest of the results' rms errors, relative to what is expected; infinite where one is NaN."""
    errors = [
        ((a - b).double().norm() / b.double().norm().clamp(min=1e-9)).item()
        for a, b in zip(got, expected, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")
