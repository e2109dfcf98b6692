# SPDX-License-Identifier: Apache-2.0
"""A layer whose activations are computed again in the backward pass gives the gradients that it gives without that."""

import random

import pytest
import torch
from steps import cotangent, numbers, seeded, set_batch_count

from fastasr.models.zipformer import Balancer, Whiten, ZipformerEncoderLayer, checkpoint
from fastasr.models.zipformer import layer as layer_module

T, B, C, POS = 20, 2, 16, 8


@pytest.fixture(scope="module")
def layer():
    seeded(0)
    module = ZipformerEncoderLayer(C, POS, 2, 4, 4, 4, 24, cnn_module_kernel=7).train()
    # a batch early in the schedules: many layers are skipped, and regularisers act often
    return set_batch_count(module, 100.0)


def _step(layer, forward, seed):
    """Returns gradients of the input and of every parameter, what the regularisers learned, and the next random
    numbers.
    """
    for part in layer.modules():
        if isinstance(part, Whiten):
            part.prob = part.max_prob
    layer.zero_grad(set_to_none=True)
    generator = numbers(seed)
    x = torch.randn(T, B, C, generator=generator).requires_grad_()
    positions = torch.randn(1, 2 * T - 1, POS, generator=generator)
    seeded(seed)
    random.seed(seed)
    y = forward(layer, x, positions)
    after_forward = random.random()
    y.backward(cotangent(y))
    gradients = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad, "y": y.detach()}
    probabilities = [part.prob for part in layer.modules() if isinstance(part, Whiten)]
    return gradients, (probabilities, after_forward, random.random(), torch.rand(1).item())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("materialised", [True, False])
def test_a_layer_in_training(layer, reentrant, materialised, monkeypatch):
    if not materialised:
        monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 0)
    changed = 0
    for seed in range(6):
        expected, state = _step(layer, lambda f, *args: f(*args), seed)
        actual, replayed = _step(layer, lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant), seed)
        assert replayed == state
        changed += state[0] != [p.max_prob for p in layer.modules() if isinstance(p, Whiten)]
        for name, gradient in expected.items():
            if gradient is None:
                assert actual[name] is None, name
            else:
                assert torch.equal(actual[name], gradient), name
    assert changed  # Whiten acted in some backward passes, else this shows little


def test_checkpoints_inside_checkpoints(layer):
    def nested(f, *args):
        return checkpoint(lambda *inner: checkpoint(f, *inner), *args)

    expected, state = _step(layer, lambda f, *args: f(*args), 1)
    actual, replayed = _step(layer, nested, 1)
    assert replayed == state
    assert all(g is None or torch.equal(actual[name], g) for name, g in expected.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_share_that_changes_between_forward_and_recomputation(reentrant):
    """When one Whiten is called twice, the backward pass of the second call lowers the share that the first was drawn
    with.
    """
    whiten = Whiten(num_groups=1, whitening_limit=50.0, prob=(1e-9, 1.0), grad_scale=0.1).train()
    balancer = Balancer(C, channel_dim=-1, prob=1.0)
    seen = []

    def run(x):
        y = whiten(balancer(x))
        if torch.is_grad_enabled():
            seen.append("_Whitening" in y.grad_fn.name())
        return y.square()  # keeps y: the recomputation goes as far as here

    x = torch.randn(T, C, generator=numbers(0)).requires_grad_()
    random.seed(0)
    total = checkpoint(run, x, use_reentrant=reentrant) + checkpoint(run, x, use_reentrant=reentrant)
    total.sum().backward()
    assert whiten.prob == whiten.min_prob
    assert seen == [True] * 4


def test_without_gradients_nothing_is_kept(layer):
    x = torch.randn(T, B, C)
    positions = torch.randn(1, 2 * T - 1, POS)
    with torch.no_grad():
        y = checkpoint(layer.eval(), x, positions)
        layer.train()
    assert not y.requires_grad
