# SPDX-License-Identifier: Apache-2.0
"""balancer_gradient at the sizes of Zipformer-M's stack 0 and of its front-end, where channels are in the middle."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    FORWARD,
    Case,
    Cost,
    Implementation,
    parameters,
    shaped,
    upstream_member,
    versions,
)

_LIMITS = (-0.05, 0.05, 0.2, 0.5, 0.04)  # random data leave both ranges


def _upstream(grad: torch.Tensor, x: torch.Tensor, channel_dim: int) -> Implementation:
    function = upstream_member("zipformer.modules.scaling.BalancerFunction")
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = function.apply(leaf, *_LIMITS, channel_dim)
    return Implementation(lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0], parameters())


def _case(channel_dim: int, *shape: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        grad, x = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        upstream = {"upstream": lambda: _upstream(grad, x, channel_dim)}
        inputs = grad, x, *_LIMITS, channel_dim
        return versions(ops.balancer_gradient, *inputs, others=upstream, differentiable=())

    def costs(size: int) -> dict[str, Cost]:
        return {FORWARD: Cost(4 * torch.Size(shape).numel() * size)}  # x twice, grad; y

    return shaped("balancer_gradient", shape, make, costs, copy=True, passes=(FORWARD,))


CASES = (_case(-1, 796, 4, 192), _case(1, 4, 32, 798, 39))
