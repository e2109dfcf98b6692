# SPDX-License-Identifier: Apache-2.0
"""balancer_gradient at the sizes of Zipformer-M's stack 0 and of its front-end, where channels are in the middle."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import FORWARD, Case, Cost, Implementation, compiled, parameters, upstream_module

_LIMITS = (-0.05, 0.05, 0.2, 0.5, 0.04)  # random data leave both ranges


def _upstream(grad: torch.Tensor, x: torch.Tensor, channel_dim: int) -> Implementation:
    function = upstream_module("scaling.BalancerFunction")
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = function.apply(leaf, *_LIMITS, channel_dim)
    return Implementation(lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0], parameters())


def _make(shape: tuple[int, ...], channel_dim: int, device: str, dtype: torch.dtype):
    grad = torch.randn(shape, device=device, dtype=dtype)
    x = torch.randn(shape, device=device, dtype=dtype)

    def ours(function):
        return Implementation(lambda: function(grad, x, *_LIMITS, channel_dim), parameters())

    return {
        "eager": lambda: ours(ops.balancer_gradient.definition),
        "compile": lambda: ours(compiled(ops.balancer_gradient.definition)),
        "upstream": lambda: _upstream(grad, x, channel_dim),
        "fastasr": lambda: ours(ops.balancer_gradient),
    }


def _costs(elements: int, size: int) -> dict[str, Cost]:
    return {FORWARD: Cost(4 * elements * size)}  # x twice, grad; y


def _case(channel_dim: int, *shape: int) -> Case:
    name = "x".join(map(str, shape))
    costs = partial(_costs, torch.Size(shape).numel())
    make = partial(_make, shape, channel_dim)
    return Case("balancer_gradient", name, name, make, costs, copy=True, passes=(FORWARD,))


CASES = (_case(-1, 796, 4, 192), _case(1, 4, 32, 798, 39))
