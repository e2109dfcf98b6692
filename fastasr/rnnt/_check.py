# SPDX-License-Identifier: Apache-2.0
"""Argument checks: every message names the function, the argument, the expected value and the given one."""

from typing import Any

import torch
from torch import Tensor

from fastasr.ops._dispatch import FLOATING

_NAMES = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)


def floating_tensor(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"fastasr.{op}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"fastasr.{op}: {name}: expected dtype {_NAMES}, got {str(value.dtype).removeprefix('torch.')}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"fastasr.{op}: {name}: expected a strided tensor, got layout {value.layout}")
    return value


def same_device(op: str, name: str, value: Tensor, reference: Tensor, reference_name: str) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"fastasr.{op}: {name}: expected device {reference.device} (that of {reference_name}), got {value.device}"
        )


def shape(op: str, name: str, value: Tensor, expected: str, ok: bool) -> None:
    if not ok:
        raise ValueError(f"fastasr.{op}: {name}: expected shape {expected}, got {tuple(value.shape)}")


def integer(op: str, name: str, value: Any) -> int:
    found: int = value  # or a SymInt, in traced code
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"fastasr.{op}: {name}: expected an int, got {type(value).__name__}")
    return found


def number(op: str, name: str, value: object) -> float:
    """Checks for a float or int that is neither NaN nor negative."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"fastasr.{op}: {name}: expected a float, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"fastasr.{op}: {name}: expected a number of at least 0, got {value}")
    return float(value)


def flag(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"fastasr.{op}: {name}: expected a bool, got {type(value).__name__}")
    return value
