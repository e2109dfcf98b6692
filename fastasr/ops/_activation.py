# SPDX-License-Identifier: Apache-2.0
"""The activations that kernels apply on the way in or out, by the names and numbers they share."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


# The place of a name is the number that kernels are given.
Activation = Literal["identity", "silu", "relu", "tanh", "gelu"]
NAMES = get_args(Activation)
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "silu": F.silu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,  # x Φ(x), by erf
}


def function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation in eager PyTorch."""
    return _FUNCTIONS[name]


def derivative(name: str, x: Tensor) -> Tensor:
    """The activation's derivative at x, in x's dtype."""
    if name == "identity":
        return torch.ones_like(x)
    if name == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if name == "relu":
        return (x > 0).to(x.dtype)
    if name == "tanh":
        return 1 - torch.tanh(x).square()
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327


def number(op: str, name: object) -> int:
    """The number of an activation, for the kernels; raises on anything that is not one."""
    if not isinstance(name, str):
        raise TypeError(f"fastasr.{op}: activation: expected a str, got {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"fastasr.{op}: activation: expected one of {NAMES}, got {name!r}")
    return NAMES.index(name)
