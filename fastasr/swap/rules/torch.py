# SPDX-License-Identifier: Apache-2.0
"""The rules for torch's own classes. They apply to a model in which a rule of a framework matched a module."""

import torch

from fastasr.models.common import convolutions, plumbing
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


def convolution_rule(name: str, *sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> Rule:
    """Returns the rule for convolutions in one group of these kernels, strides and paddings, which the forward of a
    front end calls. Their results may have channels last in memory: other convolutions are left, because vocoders and
    vision towers of the same models may need channels first."""
    over_time = len(sizes[0][0]) == 1
    kind = torch.nn.Conv1d if over_time else torch.nn.Conv2d

    def structure(module: Upstream) -> str | None:
        if (module.kernel_size, module.stride, module.padding) not in sizes:
            return "is no convolution of a front end that fastasr knows"
        plain = plumbing.is_conv1d(module) if over_time else plumbing.is_dense_conv2d(module)
        if not plain or module.groups > 1 or upstream_class(module) is not kind:
            return f"is no plain torch.nn.{kind.__name__} in one group without dilation"
        return None

    return Rule(
        name=name,
        class_name=kind.__name__,
        forward=convolutions.conv1d if over_time else convolutions.conv2d,
        structure=structure,
        companion=True,
    )


RULES = (LINEAR,)
