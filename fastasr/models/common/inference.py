# SPDX-License-Identifier: Apache-2.0
"""When a module may take its inference path: nothing watches, differentiates, casts or compiles the call."""

import torch


def is_plain_inference(module, x, weight, ndim):
    """Eval mode on CPU without gradients, autocast or compilation.

    x must have ``ndim`` dimensions, not be empty and be of the weight's dtype.
    """
    return (
        not module.training
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.ndim == ndim
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or _wants_gradients(module)))
    )


def _wants_gradients(module):
    return any(p.requires_grad for p in module.parameters())


def any_hooked(modules):
    """Whether one of the modules has hooks, which would see other tensors or none."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


def has_known_forward(module):
    """Whether its forward is its class's, or the one that fastasr's swap gave it."""
    bound = vars(module).get("forward")
    return bound is None or hasattr(bound, "fastasr_forward")


def is_unmodified(module, classes):
    """Whether the module is exactly of one of these classes and nobody replaced its forward but fastasr's swap."""
    return type(module) in classes and has_known_forward(module)


def runs(module, method, name="forward"):
    """Whether the method ``name`` of ``module`` is this function: its class's, or bound to it, as it is or wrapped."""
    function = getattr(getattr(module, name), "__func__", None)
    return getattr(function, "__wrapped__", function) is method
