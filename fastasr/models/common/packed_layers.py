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
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastasr import _left
from fastasr._recording import is_traced
from fastasr.models.common.inference import is_plain_inference
from fastasr.models.common.module_state import ModuleState
from fastasr.models.common.plain import first_watched, has_known_forward, is_of_framework
from fastasr.ops import _dispatch

# The native call is used if the relative rms difference of its results from those of the operations is below this.
AGREEMENT = 1e-4

L = TypeVar("L", bound=torch.nn.Module)
P = TypeVar("P", bound="Packed")

_WATCHED = "a submodule has hooks, or is in training mode"
_FOREIGN = "runs code that is neither torch's, fastasr's nor its framework's"


def may_serve(layer: torch.nn.Module, x: Tensor, weight: object) -> bool:
    """Says whether a native call on packed weights may replace this one: as :func:`may_call`, and the layer does not
    decline with ``packed_streaming = False``.
    """
    return may_call(layer, x, weight) and getattr(layer, "packed_streaming", True)


def may_call(layer: torch.nn.Module, x: Tensor, weight: object) -> bool:
    """Says whether a native call may replace this one: eval mode, no gradients, a CPU with a native library.
    x (frames, streams, channels) has the weight's dtype.
    """
    return (
        is_plain_inference(layer, x, weight, 3)
        and not torch.jit.is_tracing()
        and _dispatch.forced_backend() in ("auto", "cpu")
        and not _dispatch.why_not_native()
    )


def note_declined(layer: torch.nn.Module, x: Tensor, weight: object, method: str) -> None:
    """Notes why ``may_serve`` declined this call, unless no native call is meant for it: in training, on a GPU, and
    while the call is compiled or traced, other paths are the fast ones."""
    if is_traced() or torch.jit.is_tracing() or layer.training:
        return
    if not (x.is_cpu and isinstance(weight, Tensor) and weight.is_cpu and x.ndim == 3 and x.numel()):
        return
    forced = _dispatch.forced_backend()
    if torch.is_autocast_enabled("cpu"):
        _left.note(layer, "autocast is on", method)
    elif _dispatch.why_not_native():
        _left.note(layer, _dispatch.why_not_native(), method)
    elif forced not in ("auto", "cpu"):
        _left.note(layer, f"backend {forced!r} is forced", method, logging.INFO)
    elif is_plain_inference(layer, x, weight, 3):
        _left.note(layer, "packed_streaming is False", method, logging.INFO)
    else:
        _left.note(layer, "gradients are on", method, logging.INFO)


class Packed(Generic[L]):
    """What a native call reads of a module's weights, or why it cannot be used: ``reason``, "" if it can. It serves
    until the module changes.
    """

    METHODS: tuple[str, ...] = ("forward",)  # methods that may be bound to an instance of the module's parts
    COPIES = True  # whether the weights are copied

    def __init__(self, module: L) -> None:
        self._state = ModuleState(module, self.drops, self.METHODS, self.COPIES)
        self.reason = _WATCHED if self._state.watched() else ""

    @staticmethod
    def drops(part: torch.nn.Module) -> bool:
        """Says whether ``part`` must not be in training mode."""
        return True

    def fresh(self) -> bool:
        """Says whether the module has not changed since its weights were packed."""
        watched = self.reason == _WATCHED
        return self._state.watched() == watched and self._state.unchanged()

    def why(self, module: L) -> str:
        """Returns ``reason``, in which the submodule that is watched has its name."""
        return (self.reason == _WATCHED and first_watched(module, self.drops)) or self.reason


class PackedLayer(Packed[L], abc.ABC):
    """The weights of a layer in the order in which the native call reads them.

    A subclass packs the weights (``_pack``), gives the reasons that hold until the layer changes (``_why_not_ever``, ""
    for none) and computes an example both natively and by the layer's operations (``_example``).
    """

    OPERATIONS = "operations"  # the name of the layer's own operations in a reason

    def __init__(self, layer: L, by_operations: Callable[..., Any]) -> None:
        super().__init__(layer)
        self.reason = self.reason or _why_no_weights(layer) or self._why_not_ever(layer)
        if not self.reason:  # The example would call the part that has a reason.
            foreign = (n for n, part in layer.named_modules() if n and _runs_foreign_code(part, type(layer)))
            self.reason = next((f"{name} {_FOREIGN}" for name in foreign), "")
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

    @abc.abstractmethod
    def _why_not_ever(self, layer: L) -> str: ...

    @abc.abstractmethod
    def _pack(self, layer: L) -> None: ...

    @abc.abstractmethod
    def _example(self, by_operations: Callable[..., Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Returns two lists of tensors: the native results and those of the layer's operations."""


class PackedLayers(Generic[P]):
    """Keeps the packed copies of layers as long as the layers live. ``kind``: a subclass of :class:`Packed`."""

    def __init__(self, kind: type[P]) -> None:
        self._kind = kind
        self._of: weakref.WeakKeyDictionary[torch.nn.Module, P] = weakref.WeakKeyDictionary()

    def of(self, layer: torch.nn.Module, *arguments: Any) -> P:
        """Returns the layer's packed copy, which is made, with these arguments, again if the layer has changed."""
        packed = self._of.get(layer)
        if packed is None or not packed.fresh():
            packed = self._of[layer] = self._kind(layer, *arguments)
        return packed

    def why_not(self, layer: torch.nn.Module) -> str | None:
        """Returns why the native call cannot be used for this layer: "" if it can, None before the first step."""
        packed = self._of.get(layer)
        return None if packed is None or not packed.fresh() else packed.why(layer)

    def release(self, layer: torch.nn.Module) -> None:
        """Frees the layer's packed copy; the next step packs it again."""
        self._of.pop(layer, None)


def _runs_foreign_code(module: torch.nn.Module, owner: type) -> bool:
    """Says whether the module's forward is the user's: on the instance, of a class from elsewhere, or scripted."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted or not is_of_framework(type(module), owner) or not has_known_forward(module)


def _why_no_weights(layer: torch.nn.Module) -> str:
    if any(type(p) not in _dispatch.PLAIN or not p.is_cpu for p in layer.parameters()):
        return "not all parameters are plain tensors on the CPU"
    if any(p.dtype is not torch.float32 for p in layer.parameters()):
        return "not all parameters are float32"
    return ""


def _error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest rms error of the results relative to the expected ones; infinity if one is NaN."""
    errors = [
        ((a - b).double().norm() / b.double().norm().clamp(min=1e-9)).item()
        for a, b in zip(got, expected, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")
