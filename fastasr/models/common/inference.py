# SPDX-License-Identifier: Apache-2.0
"""When a module may take its inference path: nothing watches, transforms, differentiates, casts or compiles it."""

import torch
from torch import Tensor

from fastasr._recording import is_traced
from fastasr._transforms import is_transformed


def is_plain_inference(module: torch.nn.Module, x: Tensor, weight: object, ndim: int) -> bool:
    """Says whether this call runs in eval mode on the CPU without gradients, transforms, autocast or
    compilation.

    It is False too unless x has ``ndim`` dimensions, is not empty and has the weight's dtype.
    """
    return (
        not module.training
        and isinstance(weight, Tensor)  # a quantised layer has a method in its place
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.ndim == ndim
        and x.numel() > 0
        and not is_traced()
        and not is_transformed()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or _wants_gradients(module)))
    )


def _wants_gradients(module: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
