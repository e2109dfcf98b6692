# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of transducer functions. Shapes and types are always checked, values where that is cheap.

On CPU tensors a bad value (a symbol outside the vocabulary, a boundary or window outside the shapes) raises
``ValueError``. On a CUDA device the device itself asserts the values, so that the host does not wait: a bad value ends
the process's work on that device with "device-side assert triggered" and our message beside it. Under
``torch.compile`` and ``torch.export`` values are not checked.
"""

from typing import Any, overload

import torch
from torch import Tensor

from fastasr._recording import is_traced
from fastasr._transforms import transforms_active
from fastasr.ops._dispatch import PLAIN
from fastasr.rnnt import _check

RNNT_TYPES = ("regular", "modified", "constrained")
REDUCTIONS = ("none", "mean", "sum")


def floating(op: str, name: str, value: Any, dims: str) -> Tensor:
    """Checks for a floating tensor with as many dimensions as ``dims``, e.g. "(B, T, C)", names."""
    _check.floating_tensor(op, name, value)
    _check.shape(op, name, value, dims, value.dim() == dims.count(",") + 1)
    return value


def integers(op: str, name: str, value: object, shape: tuple, like: Tensor, like_name: str) -> Tensor:
    """Does the same as ``checked_integers`` and returns int64."""
    return checked_integers(op, name, value, shape, like, like_name).to(torch.int64)


def checked_integers(op: str, name: str, value: object, shape: tuple, like: Tensor, like_name: str) -> Tensor:
    """Checks for an integer tensor of that shape (None: any size) on like's device."""
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
    return value


def arcs(op: str, px_name: str, px: Tensor, py_name: str, py: Tensor) -> None:
    """Checks px (B, S, T + 1) or (B, S, T) of the symbol arcs with py (B, S + 1, T) of the blank arcs."""
    floating(op, px_name, px, "(B, S, T + 1)")
    floating(op, py_name, py, "(B, S + 1, T)")
    (batch, length, width), frames = px.shape, py.shape[2]
    _check.shape(op, py_name, py, f"({batch}, {length + 1}, T)", py.shape[:2] == (batch, length + 1))
    _check.shape(op, px_name, px, f"(B, S, {frames + 1}) or (B, S, {frames})", width in (frames, frames + 1))


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"fastasr.{op}: {name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def class_index(op: str, name: str, value: Any, classes: int) -> int:
    _check.integer(op, name, value)
    if not 0 <= value < classes:
        raise ValueError(f"fastasr.{op}: {name}: expected a class in [0, {classes}), got {value}")
    return value


def has_values(value: Tensor) -> bool:
    """Says whether there are values to check; while a graph is traced there are none, and vmap hides them."""
    if is_traced() or transforms_active():
        return False
    return type(value) in PLAIN and value.numel() > 0


def holds(op: str, name: str, condition: Tensor, expected: str, value: Tensor) -> None:
    """Requires that ``condition`` is true everywhere. On the CPU the error names the range of ``value``; on a CUDA
    device the device asserts it."""
    if condition.is_cuda:
        torch._assert_async(condition.all(), f"fastasr.{op}: {name}: expected {expected}")
    elif condition.is_cpu and not condition.all():
        _refuse(op, name, expected, value)


def between(op: str, name: str, value: Tensor, most: int, expected: str) -> list[int] | None:
    """Requires integers (B,) in [0, most]. Returns them where they are on the CPU."""
    if not has_values(value):
        return None
    if not value.is_cpu:
        holds(op, name, (value >= 0) & (value <= most), expected, value)
        return None
    numbers = value.tolist()
    if not all(0 <= one <= most for one in numbers):  # Python is faster for few numbers.
        _refuse(op, name, expected, value)
    return numbers


def _refuse(op: str, name: str, expected: str, value: Tensor) -> None:
    low, high = value.aminmax()
    raise ValueError(
        f"fastasr.{op}: {name}: expected {expected}, got values in [{int(low)}, {int(high)}]: "
        f"{value.tolist() if value.numel() <= 32 else 'of shape ' + str(tuple(value.shape))}"
    )


def symbols(
    op: str, value: object, batch: int, length: int, classes: int, boundary: Tensor | None, like: Tensor
) -> Tensor:
    """Returns the symbols (B, S) as int64. Inside the boundary they must lie in [0, C); padding may have any value and
    is clamped into [0, C).
    """
    value = integers(op, "symbols", value, (batch, length), like, "the scores")
    if has_values(value):
        if value.is_cpu:
            low, high = map(int, value.aminmax())
            if low >= 0 and high < classes:
                return value
        right = (value >= 0) & (value < classes)
        if boundary is not None:
            s = torch.arange(value.shape[1], device=value.device, dtype=torch.int64)
            right |= (s < boundary[:, 0:1]) | (s >= boundary[:, 2:3])
        holds(op, "symbols", right, f"classes in [0, {classes})", value)
    return value.clamp(0, classes - 1)


@overload
def boundary(op: str, value: Tensor, batch: int, length: int, frames: int, like: Tensor) -> Tensor: ...


@overload
def boundary(
    op: str, value: Tensor | None, batch: int, length: int, frames: int, like: Tensor
) -> Tensor | None: ...


def boundary(op: str, value: object, batch: int, length: int, frames: int, like: Tensor) -> Tensor | None:
    """Returns the boundary as int64, after checking rows [s_begin, t_begin, s_end, t_end] with 0 <= s_begin <= s_end <=
    S and 0 <= t_begin <= t_end <= T.
    """
    if value is None:
        return None
    value = integers(op, "boundary", value, (batch, 4), like, "the scores")
    if not has_values(value):
        return value
    expected = f"rows [s_begin, t_begin, s_end, t_end] within S = {length} and T = {frames}, begin <= end"
    if value.is_cpu:
        rows = value.tolist()  # Python is faster for few numbers.
        if not all(0 <= s <= end <= length and 0 <= t <= stop <= frames for s, t, end, stop in rows):
            _refuse(op, "boundary", expected, value)
    else:
        s, t, end, stop = value.unbind(1)
        right = (s >= 0) & (s <= end) & (end <= length) & (t >= 0) & (t <= stop) & (stop <= frames)
        holds(op, "boundary", right, expected, value)
    return value


def ranges(op: str, value: object, batch: int, frames: int, length: int, like: Tensor) -> Tensor:
    """Checks windows (B, T, R) of neighbouring positions in [0, S] that never go back, and returns their starts
    (B, T)."""
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
    """Requires windows of at least two: in a constrained lattice a symbol needs the blank of the next position on its
    frame.
    """
    if rnnt_type == "constrained" and width < 2 <= length + 1:
        raise ValueError(
            f"fastasr.{op}: ranges: expected windows of at least 2 positions for a constrained lattice, got {width}: "
            f"no symbol can be emitted in windows of one"
        )
