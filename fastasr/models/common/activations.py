# SPDX-License-Identifier: Apache-2.0
"""Activations by name, and the names under which the kernels know them."""

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
    """Returns an activation module: ``activation`` itself if it is a module, an instance if it is a class, and for a
    name (ESPnet's names, "gelu", "silu" and "identity") the module that it stands for. Raises ValueError for an
    unknown name and TypeError for anything else."""
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
    """Returns the kernels' name for this module's function; None if they do not have it or the module has hooks."""
    if activation._forward_hooks or activation._forward_pre_hooks:
        return None
    if type(activation) is torch.nn.GELU and activation.approximate != "none":
        return None
    named_silu = type(activation).__name__ in ("Swish", "SiLUActivation")
    if named_silu and not vars(activation).get("forward"):
        if not activation._modules:
            return "silu"  # ESPnet's and transformers' classes compute x sigmoid(x)
        if getattr(activation, "beta", None) == 1:
            return fused_name(activation.silu)  # SpeechBrain's computes silu(beta x)
    return _FUSED.get(type(activation))


def activated(linear, activation: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns ``activation(linear(x))``."""
    name = fused_name(activation) if plumbing.is_plain_linear(linear) else None
    if name is None or name == "identity":
        return activation(plumbing.linear(linear, x))
    return ops.linear_activation(x, linear.weight, linear.bias, name)
