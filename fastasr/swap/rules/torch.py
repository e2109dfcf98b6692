# SPDX-License-Identifier: Apache-2.0
"""The rules for torch's own classes. They apply to a model in which a rule of a framework matched a module."""

import torch

from fastasr.models.common.linear import Linear
from fastasr.swap.rule import Rule, Upstream, check_children, check_parameters, upstream_class


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

RULES = (LINEAR,)
