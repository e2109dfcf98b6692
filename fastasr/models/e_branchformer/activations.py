# SPDX-License-Identifier: Apache-2.0
"""The activations of E-Branchformer by name, and which of them the kernels compute themselves."""

import torch

from fastasr import ops
from fastasr.models.common import plumbing

_MODULES = {
    "gelu": torch.nn.GELU,
    "hardtanh": torch.nn.Hardtanh,
    "identity": torch.nn.Identity,
    "relu": torch.nn.ReLU,
    "selu": torch.nn.SELU,
    "silu": torch.nn.SiLU,
    "swish": torch.nn.SiLU,
    "tanh": torch.nn.Tanh,
}


def instance(owner: str, name: str, activation) -> torch.nn.Module:
    """A module as it is; a class made without arguments; a name looked up (ESPnet's, and "gelu", "silu",
    "identity")."""
    if isinstance(activation, torch.nn.Module):
        return activation
    if isinstance(activation, type) and issubclass(activation, torch.nn.Module):
        return activation()
    if not isinstance(activation, str):
        raise TypeError(
            f"{owner}: {name}: expected a name or a torch.nn.Module, got {type(activation).__name__}"
        )
    if activation not in _MODULES:
        raise ValueError(f"{owner}: {name}: expected one of {', '.join(_MODULES)}, got {activation!r}")
    return _MODULES[activation]()


_FUSED = {
    torch.nn.GELU: "gelu",
    torch.nn.Identity: "identity",
    torch.nn.ReLU: "relu",
    torch.nn.SiLU: "silu",
    torch.nn.Tanh: "tanh",
}


def fused_name(activation: torch.nn.Module) -> str | None:
    """The name under which the kernels know this module's function; None when they do not, or a hook watches it."""
    if activation._forward_hooks or activation._forward_pre_hooks:
        return None
    if type(activation) is torch.nn.GELU and activation.approximate != "none":
        return None
    if (
        type(activation).__name__ == "Swish"
        and not activation._modules
        and not vars(activation).get("forward")
    ):
        return "silu"  # ESPnet's: x sigmoid(x)
    return _FUSED.get(type(activation))


def activated(linear, activation: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``activation(linear(x))``."""
    name = fused_name(activation) if plumbing.is_plain_linear(linear) else None
    if name is None or name == "identity":
        return activation(plumbing.linear(linear, x))
    return ops.linear_activation(x, linear.weight, linear.bias, name)
