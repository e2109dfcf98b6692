# SPDX-License-Identifier: Apache-2.0
"""Activations by ESPnet's names, and the names under which the kernels know them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr._transforms import is_transformed
from fastasr.models.common import activations, plumbing
from fastasr.models.common.activations import Name


class FTSwish(torch.nn.Module):
    """Flattened-T Swish (Chieng et al., 2018): y = x sigmoid(x) + T where y >= 0, T elsewhere, less ``mean_shift``."""

    def __init__(self, threshold: float = -0.2, mean_shift: float = 0.0) -> None:
        super().__init__()
        if not threshold < 0:
            raise ValueError(f"FTSwish: threshold: expected a negative number, got {threshold}")
        self.threshold, self.mean_shift = threshold, mean_shift

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(x) + self.threshold
        return torch.where(y >= 0, y, self.threshold) - self.mean_shift


class Smish(torch.nn.Module):
    """Smish (Wang et al., 2022): alpha x tanh(log(1 + sigmoid(beta x))). Factors that are not positive count as 1."""

    def __init__(self, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta = alpha if alpha > 0 else 1.0, beta if beta > 0 else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x * torch.tanh(torch.log1p(torch.sigmoid(self.beta * x)))


class Swish(torch.nn.Module):
    """E-Swish (Alcaide, 2018): beta x sigmoid(x). A beta below 1 counts as 1."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = max(beta, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.beta * x * torch.sigmoid(x)


def get_activation(
    activation_type: str,
    ftswish_threshold: float = -0.2,
    ftswish_mean_shift: float = 0.0,
    hardtanh_min_val: float = -1.0,
    hardtanh_max_val: float = 1.0,
    leakyrelu_neg_slope: float = 0.01,
    smish_alpha: float = 1.0,
    smish_beta: float = 1.0,
    softplus_beta: float = 1.0,
    softplus_threshold: int = 20,
    swish_beta: float = 1.0,
) -> torch.nn.Module:
    """Returns the module that ESPnet's ``get_activation`` makes for these arguments.

    ``softplus_beta`` and ``softplus_threshold`` have no effect, as in ESPnet, because Mish is torch's.
    Raises ValueError for an unknown ``activation_type``.
    """
    makers = {
        "ftswish": lambda: FTSwish(ftswish_threshold, ftswish_mean_shift),
        "hardtanh": lambda: torch.nn.Hardtanh(hardtanh_min_val, hardtanh_max_val),
        "leaky_relu": lambda: torch.nn.LeakyReLU(leakyrelu_neg_slope),
        "mish": torch.nn.Mish,
        "relu": torch.nn.ReLU,
        "selu": torch.nn.SELU,
        "smish": lambda: Smish(smish_alpha, smish_beta),
        "swish": lambda: Swish(swish_beta) if swish_beta > 1 else torch.nn.SiLU(),
        "tanh": torch.nn.Tanh,
        "identity": torch.nn.Identity,
    }
    if activation_type not in makers:
        raise ValueError(
            f"MEGA: activation_type: expected one of {', '.join(makers)}, got {activation_type!r}"
        )
    return makers[activation_type]()


_IN_PLACE = {"silu": lambda x: F.silu(x, inplace=True), "relu": torch.relu_, "tanh": torch.tanh_}


def fused_name(activation: torch.nn.Module) -> Name | None:
    """Returns the name under which the kernels of MEGA know this module's function; None if they do not have it or the
    module is not plain."""
    name = activations.fused_name(activation)
    return name if name in _IN_PLACE or name == "identity" else None


def activate(activation: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns ``activation(x)`` for an x that nobody else holds; it works in place if no gradient needs x."""
    name = fused_name(activation)
    needed = (torch.is_grad_enabled() and x.requires_grad) or is_transformed()
    if name is None or torch.compiler.is_compiling() or needed:
        return activation(x)
    return x if name == "identity" else _IN_PLACE[name](x)


def activated(module: torch.nn.Module, activation: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns activation(module(x)) for a linear layer."""
    y = plumbing.linear(module, x)
    return activate(activation, y) if plumbing.is_plain_linear(module) else activation(y)


def dropped(
    module: torch.nn.Module, activation: torch.nn.Module, dropout: torch.nn.Module, x: Tensor
) -> Tensor:
    """Returns dropout(activation(module(x))) for a linear layer."""
    found = activations.dropped_in_kernel(module, activation, dropout, x)
    return plumbing.dropout(dropout, activated(module, activation, x)) if found is None else found


def instance(activation: torch.nn.Module | type[torch.nn.Module]) -> torch.nn.Module:
    """Returns ``activation`` if it is a module; an instance if it is a class, as ESPnet's default argument is."""
    return activation() if isinstance(activation, type) else activation
