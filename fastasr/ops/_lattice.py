# SPDX-License-Identifier: Apache-2.0
"""What rnnt_lattice and rnnt_pruned_lattice share: what an entry stands for, the boundary, a safe log-sum."""

import torch
from torch import Tensor

from fastasr.ops import _check

# Log probabilities below LEAST count as -inf: kernels keep powers of two as float32 numbers, the impossible as -2^100.
LEAST = -(2.0**80)
_INF = float("inf")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def log_probabilities(x: Tensor, dtype: torch.dtype, inside: Tensor) -> Tensor:
    """The entries as they are used; -inf outside the boundary."""
    x = x.to(dtype)
    x = torch.where(x == _INF, float("nan"), x)
    return torch.where((x < LEAST) | ~inside, -_INF, x)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), with a gradient of 0 where both are -inf."""
    none = (a == -_INF) & (b == -_INF)
    return torch.where(none, -_INF, torch.logaddexp(torch.where(none, 0.0, a), torch.where(none, 0.0, b)))


def share(part: Tensor, whole: Tensor) -> Tensor:
    """e^(part - whole), 0 where whole is -inf."""
    none = whole == -_INF
    return torch.where(none, 0.0, (part - torch.where(none, 0.0, whole)).exp())


def columns(boundary: Tensor, symbols: int, frames: int) -> tuple[Tensor, ...]:
    """s_begin, t_begin, s_end, t_end, each (B,), moved into the lattice where they lie outside."""
    s_begin, t_begin, s_end, t_end = boundary.unbind(1)
    return tuple(
        x.clamp(0, most)
        for x, most in ((s_begin, symbols), (t_begin, frames), (s_end, symbols), (t_end, frames))
    )


# --------------------------------------------------------------------------- checks
def check_integers(op: str, name: str, value: object, reference: Tensor, reference_name: str) -> None:
    """An int64 tensor on the device of ``reference``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastasr.{op}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype is not torch.int64 or value.layout is not torch.strided:
        raise TypeError(
            f"fastasr.{op}: {name}: expected a strided int64 tensor, got {value.dtype}, {value.layout}"
        )
    _check.same_device(op, name, value, reference, reference_name)


def check_boundary(op: str, boundary: Tensor | None, reference: Tensor, reference_name: str) -> None:
    """Type, device and shape. The values are checked by :func:`check_boundary_values`, on the CPU alone: to read
    them on a GPU would stall it."""
    if boundary is None:
        return
    check_integers(op, "boundary", boundary, reference, reference_name)
    batch = reference.shape[0]
    ok = boundary.dim() == 2 and boundary.shape[0] == batch and boundary.shape[1] == 4
    _check.shape(op, "boundary", boundary, f"(B, 4), B being that of {reference_name}", ok)


def check_boundary_values(op: str, boundary: Tensor, symbols: int | None, frames: int) -> None:
    """0 <= s_begin <= s_end <= symbols and 0 <= t_begin <= t_end <= frames, in every row."""
    most = "s_end" if symbols is None else str(symbols)
    for row, (s_begin, t_begin, s_end, t_end) in enumerate(boundary.tolist()):
        if not (
            0 <= s_begin <= s_end <= (s_end if symbols is None else symbols)
            and 0 <= t_begin <= t_end <= frames
        ):
            raise ValueError(
                f"fastasr.{op}: boundary: expected 0 <= s_begin <= s_end <= {most} and "
                f"0 <= t_begin <= t_end <= {frames}, got {[s_begin, t_begin, s_end, t_end]} in row {row}"
            )
