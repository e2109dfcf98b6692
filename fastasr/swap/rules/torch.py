# SPDX-License-Identifier: Apache-2.0
"""The rules for torch's own classes. They apply to a model in which a rule of a framework matched a module."""

from collections.abc import Callable

import torch

from fastasr.models.common import convolutions, plumbing
from fastasr.models.common.linear import Linear
from fastasr.swap.forwards import torch_attention
from fastasr.swap.rule import (
    Rule,
    Upstream,
    check_child_names,
    check_children,
    check_parameters,
    upstream_class,
)


def _linear_structure(module: Upstream) -> str | None:
    if upstream_class(module) is not torch.nn.Linear:
        return f"is a subclass of torch.nn.Linear ({type(module).__module__}.{type(module).__qualname__})"
    return linear_structure(module)


def linear_structure(module: Upstream) -> str | None:
    shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    return check_parameters(module, shapes, optional=("bias",)) or check_children(module, {})


LINEAR = Rule(
    name="torch.linear",
    class_name="Linear",
    forward=Linear.forward,
    kernels=("linear",),
    structure=_linear_structure,
    companion=True,
)


def _attention_structure(module: Upstream) -> str | None:
    if upstream_class(module) is not torch.nn.MultiheadAttention:
        return "is a subclass of torch.nn.MultiheadAttention"
    width = module.embed_dim
    shapes: dict[str, tuple[int, ...]] = {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}
    unset = [f"{name}_proj_weight" for name in "qkv"]
    reason = torch_attention.why_not(module) or check_child_names(module, ("out_proj",))
    return reason or check_parameters(
        module, shapes | dict.fromkeys(unset, ()), optional=("in_proj_bias", *unset)
    )


# For the families that list it: others call it for its weights, or read its parameters.
ATTENTION = Rule(
    name="torch.multihead_attention",
    class_name="MultiheadAttention",
    forward=torch_attention.multihead_attention,
    kernels=("linear", "rel_attention"),
    structure=_attention_structure,
    companion=True,
    note="in training the kernel draws the dropout of the weights itself, see upstream_draws",
)


def _convolution(kind: type[torch.nn.Module], is_plain: Callable, forward: Callable) -> Rule:
    def structure(module: Upstream) -> str | None:
        if upstream_class(module) is not kind or not is_plain(module) or module.groups > 1:
            return f"is no plain torch.nn.{kind.__name__} in one group without dilation"
        overlap = module.kernel_size > module.stride or max(module.padding) > 0  # patches of images do not
        if min(module.stride) == 1 or not overlap:
            return "does not shorten its input as a front end does"
        return None

    name = kind.__name__
    return Rule(
        name=f"torch.{name.lower()}", class_name=name, forward=forward, structure=structure, companion=True
    )


# For families whose forwards call the convolutions of a front end, and take maps with channels last in memory. Vocoders
# and vision towers of the same models, which may not, have other convolutions.
CONVOLUTIONS = (
    _convolution(torch.nn.Conv1d, plumbing.is_conv1d, convolutions.conv1d),
    _convolution(torch.nn.Conv2d, plumbing.is_dense_conv2d, convolutions.conv2d),
)

RULES = (LINEAR,)
