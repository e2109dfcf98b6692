# SPDX-License-Identifier: Apache-2.0
"""Activations by name, and the names under which the kernels know them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr._recording import on_host
from fastasr._transforms import is_transformed
from fastasr.models.common import attention_dropout, plumbing
from fastasr.models.common.plain import has_known_forward, is_watched, original, weight_and_bias
from fastasr.ops import _dispatch, _dropout

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


def instance(
    owner: str, name: str, activation: str | torch.nn.Module | type[torch.nn.Module]
) -> torch.nn.Module:
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


# The names that ``ops.linear_activation`` knows
Name = Literal["gelu", "identity", "relu", "silu", "tanh"]

_FUSED: dict[type[torch.nn.Module], Name] = {
    torch.nn.GELU: "gelu",
    torch.nn.Identity: "identity",
    torch.nn.ReLU: "relu",
    torch.nn.SiLU: "silu",
    torch.nn.Tanh: "tanh",
}

_FRAMEWORKS = ("espnet", "espnet2", "fireredasr", "nemo", "speechbrain", "transformers")


def fused_name(activation: torch.nn.Module, identity: bool = True) -> Name | None:
    """Returns the kernels' name for this module's function; None if they do not have it or the module is not plain, or
    if it is "identity" and the caller has another kernel for that."""
    activation = original(activation)
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
    if kind.__name__ == "GELUActivation" and kind.__module__ == "transformers.activations":
        return "gelu" if vars(activation).get("act") is F.gelu else None
    return _FUSED.get(kind) if identity or kind is not torch.nn.Identity else None


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_.default,
    "relu": torch.relu_,
    "silu": torch.ops.aten.silu_.default,
    "tanh": torch.tanh_,
}


def applied(activation: torch.nn.Module, y: Tensor) -> Tensor:
    """Returns ``activation(y)`` of y that nobody else holds. Without gradients the result takes y's memory on the CPU:
    the page faults of large fresh memory take three times as long as the activation."""
    in_place = _IN_PLACE.get(fused_name(activation) or "")
    if in_place is None or torch.is_grad_enabled() or not on_host(y) or is_transformed():
        found: Tensor = activation(y)
        return found
    return in_place(y)


def activated(linear: torch.nn.Module, activation: torch.nn.Module, x: Tensor, gated: bool = False) -> Tensor:
    """Returns ``activation(linear(x))``; or a · ``activation(g)`` for (a, g) = ``linear(x)``."""
    if plumbing.is_plain_linear(linear) and (name := fused_name(activation, identity=gated)):
        return ops.linear_activation(x, *weight_and_bias(linear), name, gated)
    z = plumbing.linear(linear, x)
    if not gated:
        return activation(z)
    a, g = z.chunk(2, -1)
    return a * activation(g)


def dropped(
    linear: torch.nn.Module,
    activation: torch.nn.Module,
    dropout: torch.nn.Module | float,
    x: Tensor,
    gated: bool = False,
) -> Tensor:
    """Returns the dropout of ``activated(linear, activation, x, gated)``, by a module or of a share."""
    found = dropped_in_kernel(linear, activation, dropout, x, gated)
    if found is not None:
        return found
    hidden = activated(linear, activation, x, gated)
    if isinstance(dropout, torch.nn.Module):
        return plumbing.dropout(dropout, hidden)
    return _dropout.dropout(hidden, dropout) if dropout else hidden


def dropped_in_kernel(
    linear: torch.nn.Module,
    activation: torch.nn.Module,
    dropout: torch.nn.Module | float,
    x: Tensor,
    gated: bool = False,
) -> Tensor | None:
    """Returns the same where a kernel for GPUs drops elements as it writes the activation, by a hash, else None.

    torch's dropout would read the activation again, and write it with a mask that is kept for the backward pass. On a
    CPU the draws are torch's, see ``fastasr.ops._dropout``.
    """
    p = plumbing.dropped_share(dropout) if isinstance(dropout, torch.nn.Module) else dropout
    if not p or not plumbing.is_plain_linear(linear) or not (name := fused_name(activation, identity=gated)):
        return None
    if _dispatch.serving("linear_activation", x) != "triton":
        return None
    drawn = attention_dropout.of_kernel(p, x.device)
    if drawn is None:
        return None
    return ops.linear_activation(x, *weight_and_bias(linear), name, gated, **drawn)


def norm_activated(norm: torch.nn.Module, activation: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns ``activation(norm(x))``."""
    if plumbing.is_layer_norm(norm) and (name := fused_name(activation, identity=False)):
        return ops.norm_activation(x, norm.weight, norm.bias, eps=norm.eps, activation=name)
    return activation(norm(x))


def batch_norm_activated(norm: Any, name: Name, z: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Returns the activation of ``norm(z)`` of z (B, T, C) in training mode, with statistics over the frames where
    ``hidden`` (B, T) is False, or over all, which change the running ones as torch does. ``norm`` is torch's BatchNorm
    with everything that it may have. Where all frames are hidden there is none to normalise: then y is 0, and the
    running statistics stay."""
    if hidden is None and z.shape[:-1].numel() == 1:
        return norm(z.transpose(1, 2))  # raises: a frame has no variance
    momentum = 1.0 if norm.momentum is None else norm.momentum
    y, *found, rate = ops.batch_norm_activation(
        z, norm.weight, norm.bias, padding_mask=hidden, eps=norm.eps, momentum=momentum, activation=name
    )
    running = [norm.running_mean, norm.running_var]
    dtype = norm.running_mean.dtype
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            rate = rate / norm.num_batches_tracked
        torch._foreach_lerp_(running, [t.to(dtype) for t in found], [rate.to(dtype)] * 2)
    return y
