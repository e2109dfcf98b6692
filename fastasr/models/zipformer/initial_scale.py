# SPDX-License-Identifier: Apache-2.0
"""Layers with scaled initial weights and a small uniform bias.

The weights are torch's initialisation times ``initial_scale``, the bias is uniform in
[-0.1, 0.1] * initial_scale.
"""

from typing import Any, TypeVar

import torch

from fastasr.models.common.linear import Linear

Layer = TypeVar("Layer", Linear, torch.nn.Conv2d)


def ScaledLinear(*args: Any, initial_scale: float = 1.0, **kwargs: Any) -> Linear:
    """Returns a Linear. The other arguments are those of torch.nn.Linear."""
    return scale_(Linear(*args, **kwargs), initial_scale)


def ScaledConv2d(*args: Any, initial_scale: float = 1.0, **kwargs: Any) -> torch.nn.Conv2d:
    """Returns a torch.nn.Conv2d. The other arguments are its own."""
    return scale_(torch.nn.Conv2d(*args, **kwargs), initial_scale)


@torch.no_grad()
def scale_(layer: Layer, initial_scale: float) -> Layer:
    layer.weight.mul_(initial_scale)
    if layer.bias is not None:
        layer.bias.uniform_(-0.1 * initial_scale, 0.1 * initial_scale)
    return layer
