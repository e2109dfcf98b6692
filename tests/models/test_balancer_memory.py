# SPDX-License-Identifier: Apache-2.0
"""Balancers on a GPU ask for the allocated memory once in a pass. Tensors that say they are on a GPU stand for one."""

import random
from unittest import mock

import pytest
import torch

from fastasr.models.zipformer import Balancer, balancer, checkpoint

PER_PASS = 6


@pytest.fixture
def memory(monkeypatch):
    """Stands for ``torch.cuda.memory_allocated``: 100, 101, ... bytes."""
    monkeypatch.setattr(balancer, "_READINGS", {})
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    asked = mock.Mock(side_effect=range(100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", asked)
    return asked


def balancers():
    found = torch.nn.Sequential(*(Balancer(4, -1, prob=1.0) for _ in range(PER_PASS)))
    for one in found:
        one.mem_cutoff = mock.Mock(return_value=False)
    return found


def seen(one):
    return [call.args[0] for call in one.mem_cutoff.call_args_list]


def test_one_reading_serves_a_pass(memory):
    model, x = balancers(), torch.randn(3, 4, requires_grad=True)
    for _ in range(3):
        model(x)
    assert [seen(one) for one in model] == [[100, 101, 102]] * PER_PASS
    assert memory.call_args_list == [mock.call(x.device)] * 3


def test_a_pass_may_leave_out_layers(memory):
    model, x = balancers(), torch.randn(3, 4, requires_grad=True)
    for left_out in (1, 2, 1):
        for one in (one for i, one in enumerate(model) if i != left_out):
            one(x)
    assert [seen(one) for one in model[:4]] == [[100, 101, 102], [101], [100, 102], [100, 101, 102]]


def test_inference_does_not_ask(memory):
    balancers()(torch.randn(3, 4))
    assert not memory.called


def test_above_the_cutoff_nothing_happens_and_nothing_is_drawn(memory):
    model, x = balancers(), torch.randn(3, 4, requires_grad=True)
    for one in model:
        one.mem_cutoff = balancer.CutoffEstimator(0.05)
    state = random.getstate()
    assert model(x) is x  # any memory is above the first cutoff, which is 0
    assert random.getstate() == state
    memory.side_effect = [1]
    assert model(x) is not x
    assert random.getstate() != state


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_decides_as_the_forward_pass_did(memory, reentrant):
    model, x = balancers(), torch.randn(3, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert [seen(one) for one in model] == [[100]] * PER_PASS
    assert memory.call_count == 1
