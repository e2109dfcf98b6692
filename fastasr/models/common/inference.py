# SPDX-License-Identifier: Apache-2.0
"""When a module may take its inference path: nothing watches, transforms, differentiates, casts or compiles it."""

import torch

from fastasr.ops._transforms import is_transformed


def is_plain_inference(module, x, weight, ndim):
    """Says whether this call runs in eval mode on the CPU without gradients, transforms, autocast or
    compilation.

    It is False too unless x has ``ndim`` dimensions, is not empty and has the weight's dtype.
    """
    return (
        not module.training
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.ndim == ndim
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or _wants_gradients(module)))
    )


def _wants_gradients(module):
    return any(p.requires_grad for p in module.parameters())


def any_hooked(modules):
    """Says whether one of the modules has hooks, which a fused call would give other tensors or not call at all."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


def has_known_forward(module):
    """Says whether the module's forward is that of its class or the one that fastasr's swap bound to it."""
    bound = vars(module).get("forward")
    return bound is None or hasattr(bound, "fastasr_forward")


def is_unmodified(module, classes):
    """Says whether the module's class is one of ``classes`` itself and nothing but fastasr's swap replaced its
    forward.
    """
    return type(module) in classes and has_known_forward(module)


def runs(module, method, name="forward"):
    """Says whether ``module.name`` is the function ``method``: from the class or bound to the instance, plain or
    wrapped.
    """
    function = getattr(getattr(module, name), "__func__", None)
    return getattr(function, "__wrapped__", function) is method
