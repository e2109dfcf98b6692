# SPDX-License-Identifier: Apache-2.0
"""Activations by name, and the names under which the kernels know them."""

import torch

from fastasr import ops
from fastasr.models.common import plumbing
from fastasr.models.common.plain import has_known_forward, is_watched

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

_FRAMEWORKS = ("espnet", "espnet2", "fireredasr", "nemo", "speechbrain", "transformers")


def fused_name(activation: torch.nn.Module) -> str | None:
    """Returns the kernels' name for this module's function; None if they do not have it or the module is not plain."""
    if is_watched(activation) or not has_known_forward(activation):
        return None
    kind = type(activation)
    if kind is torch.nn.GELU and activation.approximate != "none":
        return None
    if kind.__name__ in ("Swish", "SiLUActivation") and kind.__module__.partition(".")[0] in _FRAMEWORKS:
        # x sigmoid(beta x), by its own code or by a module of torch's
        inner = next(iter(activation._modules.values()), None)
        if getattr(activation, "beta", 1) != 1:
            return None
        return "silu" if inner is None else fused_name(inner)
    return _FUSED.get(kind)


def activated(linear, activation: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns ``activation(linear(x))``."""
    name = fused_name(activation) if plumbing.is_plain_linear(linear) else None
    if name is None or name == "identity":
        return activation(plumbing.linear(linear, x))
    return ops.linear_activation(x, linear.weight, linear.bias, name)


def norm_activated(norm, activation: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns ``activation(norm(x))``."""
    name = fused_name(activation) if plumbing.is_layer_norm(norm) else None
    if name is None or name == "identity":
        return activation(norm(x))
    return ops.norm_activation(x, norm.weight, norm.bias, eps=norm.eps, activation=name)
