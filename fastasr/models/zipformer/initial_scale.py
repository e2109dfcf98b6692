# SPDX-License-Identifier: Apache-2.0
"""Layers with scaled initial weights and a small uniform bias.

The weights are torch's initialisation times ``initial_scale``, the bias is uniform in
[-0.1, 0.1] * initial_scale.
"""

import torch

from fastasr.models.common.linear import Linear


def ScaledLinear(*args, initial_scale=1.0, **kwargs):
    """Returns a Linear. The other arguments are those of torch.nn.Linear."""
    return scale_(Linear(*args, **kwargs), initial_scale)


def ScaledConv2d(*args, initial_scale=1.0, **kwargs):
    """Returns a torch.nn.Conv2d. The other arguments are its own."""
    return scale_(torch.nn.Conv2d(*args, **kwargs), initial_scale)


@torch.no_grad()
def scale_(layer, initial_scale):
    layer.weight.mul_(initial_scale)
    if layer.bias is not None:
        layer.bias.uniform_(-0.1 * initial_scale, 0.1 * initial_scale)
    return layer
