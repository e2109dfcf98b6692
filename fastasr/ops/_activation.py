# SPDX-License-Identifier: Apache-2.0
"""The activations that kernels apply to their inputs or outputs, with the names and numbers that all kernels share."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


Activation = Literal["identity", "silu", "relu", "tanh", "gelu"]
NAMES = get_args(Activation)
NUMBERS = {name: number for number, name in enumerate(NAMES)}  # Kernels receive the number.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "silu": F.silu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,  # x Φ(x), by erf
}
