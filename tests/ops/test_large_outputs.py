# SPDX-License-Identifier: Apache-2.0
"""Large outputs take their memory from a pool: no two live tensors share it, and it is reused."""

import pytest
import torch
from steps import cotangent

from fastasr import ops
from fastasr.ops import _dispatch

pytestmark = pytest.mark.skipif(
    bool(_dispatch.why_not_native()) or _dispatch.forced_backend() not in ("auto", "cpu"),
    reason="the native kernels do not serve here",
)
ELEMENTS = 2_300_000  # 9.2 MB in float32


def _swoosh(x):
    return ops.swoosh_r(x)


def _depthwise(x):
    return ops.depthwise_conv2d(x.view(1, -1, 50, 100), torch.ones(100, 1, 1)).view(-1)


def _norm(x):
    one = torch.ones(100)
    return ops.residual_norm(x.view(-1, 100), x.view(-1, 100), one, one).view(-1)


def _bypass(x):
    return ops.bypass(x.view(-1, 100), x.view(-1, 100), torch.ones(100)).view(-1)


@pytest.mark.parametrize("function", [_swoosh, _depthwise, _norm, _bypass])
def test_live_tensors_share_nothing(function):
    x = torch.linspace(-3, 3, ELEMENTS)
    first = function(x)
    kept = first.clone()
    others = [function(x + shift) for shift in (1.0, 2.0)]
    assert torch.equal(first, kept)
    assert len({t.data_ptr() for t in (first, *others)}) == 3


@pytest.mark.parametrize("function", [_swoosh, _depthwise, _norm, _bypass])
def test_memory_is_used_again(function):
    x = torch.linspace(-3, 3, ELEMENTS)
    y = function(x)
    expected, address = y.clone(), y.data_ptr()
    view = y[10:]
    del y
    assert function(x).data_ptr() != address  # the view keeps it
    del view
    addresses = set()
    for _ in range(3):
        y = function(x)
        addresses.add(y.data_ptr())
        assert torch.equal(y, expected)
        del y
    assert len(addresses) == 1


def test_gradients():
    x = torch.linspace(-3, 3, ELEMENTS).requires_grad_()
    y = ops.swoosh_r(x)
    grad = cotangent(y)
    (first,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(y, x, 2 * grad)
    assert torch.equal(first, kept)
    assert torch.equal(second, 2 * first)
