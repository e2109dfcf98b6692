# SPDX-License-Identifier: Apache-2.0
"""Checks of what transducer functions are given. Shapes and types always; values where they cost nothing.

Values (symbols in the vocabulary, boundaries and windows within the shapes) are checked on CPU tensors, and raise
``ValueError``. On a CUDA device they are asserted by the device itself, which waits for nothing: a bad value ends the
process's work on that device with "device-side assert triggered" and our message beside it. Under ``torch.compile`` and
``torch.export`` they are not checked.
"""

import torch
from torch import Tensor

from fastasr.ops import _check
from fastasr.ops._dispatch import PLAIN

RNNT_TYPES = ("regular", "modified", "constrained")
REDUCTIONS = ("none", "mean", "sum")


def floating(op: str, name: str, value: object, dims: str) -> Tensor:
    """A floating tensor with as many dimensions as ``dims``, "(B, T, C)", names."""
    _check.floating_tensor(op, name, value)
    _check.shape(op, name, value, dims, value.dim() == dims.count(",") + 1)
    return value


def integers(op: str, name: str, value: object, shape: tuple, like: Tensor, like_name: str) -> Tensor:
    """An integer tensor of that shape (None: any size) on like's device, as int64."""
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"fastasr.{op}: {name}: expected an integer tensor, got {got}")
    if value.dtype is torch.bool:
        raise TypeError(f"fastasr.{op}: {name}: expected an integer tensor, got torch.bool")
    if value.dim() != len(shape) or any(
        want is not None and size != want for size, want in zip(value.shape, shape, strict=True)
    ):
        spelled = ", ".join("any" if want is None else str(want) for want in shape)
        _check.shape(op, name, value, f"({spelled})", False)
    _check.same_device(op, name, value, like, like_name)
    return value.to(torch.int64)


def choice(op: str, name: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"fastasr.{op}: {name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def class_index(op: str, name: str, value: object, classes: int) -> int:
    _check.integer(op, name, value)
    if not 0 <= value < classes:
        raise ValueError(f"fastasr.{op}: {name}: expected a class in [0, {classes}), got {value}")
    return value


def has_values(value: Tensor) -> bool:
    """Whether there are values to check: not while a graph is traced."""
    return not torch.compiler.is_compiling() and type(value) in PLAIN and value.numel() > 0


def holds(op: str, name: str, condition: Tensor, expected: str, value: Tensor) -> None:
    """``condition.all()``: an error that names ``value``'s range on the CPU, an assertion on a CUDA device."""
    if condition.is_cuda:
        torch._assert_async(condition.all(), f"fastasr.{op}: {name}: expected {expected}")
    elif condition.is_cpu and not condition.all():
        _refuse(op, name, expected, value)


def _refuse(op: str, name: str, expected: str, value: Tensor) -> None:
    low, high = value.aminmax()
    raise ValueError(
        f"fastasr.{op}: {name}: expected {expected}, got values in [{int(low)}, {int(high)}]: "
        f"{value.tolist() if value.numel() <= 32 else 'of shape ' + str(tuple(value.shape))}"
    )


def symbols(
    op: str, value: object, length: int | None, classes: int, boundary: Tensor | None, like: Tensor
) -> Tensor:
    """(B, S) in [0, C) up to the boundary's end; what pads them may be anything and is returned within [0, C)."""
    value = integers(op, "symbols", value, (like.shape[0], length), like, "the scores")
    if has_values(value):
        right = (value >= 0) & (value < classes)
        if boundary is not None:
            s = torch.arange(value.shape[1], device=value.device)
            right |= (s < boundary[:, 0:1]) | (s >= boundary[:, 2:3])
        holds(op, "symbols", right, f"classes in [0, {classes})", value)
    return value.clamp(0, classes - 1)


def boundary(op: str, value: object, batch: int, length: int, frames: int, like: Tensor) -> Tensor | None:
    """(B, 4) [s_begin, t_begin, s_end, t_end] with 0 <= s_begin <= s_end <= S and 0 <= t_begin <= t_end <= T."""
    if value is None:
        return None
    value = integers(op, "boundary", value, (batch, 4), like, "the scores")
    if not has_values(value):
        return value
    expected = f"rows [s_begin, t_begin, s_end, t_end] within S = {length} and T = {frames}, begin <= end"
    if value.is_cpu:
        rows = value.tolist()  # Python is faster at so few
        if not all(0 <= s <= end <= length and 0 <= t <= stop <= frames for s, t, end, stop in rows):
            _refuse(op, "boundary", expected, value)
    else:
        s, t, end, stop = value.unbind(1)
        right = (s >= 0) & (s <= end) & (end <= length) & (t >= 0) & (t <= stop) & (stop <= frames)
        holds(op, "boundary", right, expected, value)
    return value


def ranges(op: str, value: object, batch: int, frames: int, length: int, like: Tensor) -> Tensor:
    """(B, T, R) windows of neighbouring positions in [0, S] that never go back; returns their starts (B, T)."""
    value = integers(op, "ranges", value, (batch, frames, None), like, "the scores")
    width = value.shape[2]
    _check.shape(
        op,
        "ranges",
        value,
        f"({batch}, {frames}, R) with 1 <= R <= S + 1 = {length + 1}",
        1 <= width <= length + 1,
    )
    starts = value[..., 0]
    if has_values(value):
        holds(op, "ranges", (value >= 0) & (value <= length), f"positions in [0, S] = [0, {length}]", value)
        holds(
            op,
            "ranges",
            value[..., 1:] == value[..., :-1] + 1,
            "neighbouring positions in each window",
            value,
        )
        holds(op, "ranges", starts[:, 1:] >= starts[:, :-1], "windows that never go back in time", value)
    return starts


def wide_enough(op: str, width: int, length: int, rnnt_type: str) -> None:
    """In a constrained lattice a symbol needs the blank of the next position on its frame: windows of two at least."""
    if rnnt_type == "constrained" and width < 2 <= length + 1:
        raise ValueError(
            f"fastasr.{op}: ranges: expected windows of at least 2 positions for a constrained lattice, got {width}: "
            f"no symbol can be emitted in windows of one"
        )
