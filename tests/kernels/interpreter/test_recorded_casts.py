# SPDX-License-Identifier: Apache-2.0
"""A recorded pass casts the weights that have changed, however they were written, and no others."""

import itertools

import pytest
import torch
from torch import nn

from fastasr import backend
from tests.graphs.recorded import graphed, reasons

WIDTHS = 32, 4112, 48  # so many elements that programs take two blocks of a weight


@pytest.fixture
def layers(launches_on_the_tape):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)]
    odd = nn.Linear(WIDTHS[-1], 3)  # its weight and bias are no jobs
    module = nn.Sequential(*layers, odd)
    graphs = graphed(module, after=0)
    with backend("triton"):
        yield module, graphs
    assert reasons(graphs) == []


def replayed(layers, rows=5, grad=False):
    """Returns the outputs of a call and of the modules by themselves."""
    module, _ = layers
    x = torch.randn(rows, WIDTHS[0], generator=torch.Generator().manual_seed(rows))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        expected = x
        for layer in module:
            expected = layer(expected)
    if grad:
        y.sum().backward()
    return y.detach(), expected.detach()


def is_right(layers, **call):
    return torch.equal(*replayed(layers, **call))


def test_writes_are_noticed(layers):
    module, _ = layers
    assert is_right(layers)
    with torch.no_grad():
        module[0].weight[-1, -1] += 1  # counted, but in no sample
    assert is_right(layers)
    for p in module.parameters():
        p.data.mul_(1.5)  # not counted
    assert is_right(layers)
    module[1].weight.data[0].zero_()  # part of one tensor, also of its sample
    assert is_right(layers)


def test_kinds_share_what_they_know(layers):
    module, _ = layers
    before = [p.clone() for p in module.parameters()]
    for rows, grad in ((5, False), (6, False), (6, True)):
        assert is_right(layers, rows=rows, grad=grad)
    for rows, grad in ((5, False), (6, True)):
        for p in module.parameters():
            p.data.neg_()
        assert is_right(layers, rows=rows, grad=grad)
        for p, old in zip(module.parameters(), before, strict=True):
            p.data.copy_(old)
        assert is_right(layers, rows=6)  # this kind's last weights were these


def test_unchanged_weights_are_not_cast(layers):
    module, graphs = layers
    assert is_right(layers)
    (graph,) = graphs.graphs.values()
    weight = graph.casts.leaves[0]
    with torch.no_grad():
        weight[0, 0] = torch.nan
    assert replayed(layers)[0].isnan().all()
    with torch.no_grad():
        module[0].bias.zero_()
    assert is_right(layers)


def test_a_pass_that_trains_casts_all(layers):
    _, graphs = layers
    assert is_right(layers, grad=True)
    (graph,) = graphs.graphs.values()
    with torch.no_grad():
        graph.casts.leaves[0].fill_(torch.nan)
    assert is_right(layers, grad=True)


def test_weights_in_float16(layers):
    module, _ = layers
    module.half()
    assert is_right(layers)
    for p in module.parameters():
        p.data.mul_(1.5)
    assert is_right(layers)
