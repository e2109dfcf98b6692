# SPDX-License-Identifier: Apache-2.0
"""With the same seed and draws, a swapped training step is upstream's, up to rounding."""

import copy

import pytest
import torch
from steps import close, numbers
from tiny_zipformer import set_batch_count, training_step

import fastasr


def _steps(model, inputs, seed, **options):
    """Returns the gradients of upstream and of a swapped copy, after comparing everything else."""
    swapped = copy.deepcopy(model)
    assert fastasr.accelerate(swapped, **options).replaced
    loss, gradients, random_states = training_step(model, inputs, seed)
    loss_now, gradients_now, random_states_now = training_step(swapped, inputs, seed)
    close(loss_now, loss, what="loss")
    assert gradients.keys() == gradients_now.keys()
    assert random_states_now == random_states
    return gradients, gradients_now


@pytest.mark.parametrize("batch_count", [0.0, 2000.0, 20000.0])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float32, 2e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"]
)
def test_loss_every_gradient_and_the_random_states(model, inputs, dtype, digits, batch_count, seed):
    set_batch_count(model.to(dtype), batch_count)
    x, lens = inputs[0].to(dtype), inputs[1]
    rounded = copy.deepcopy(model)
    gradients, gradients_now = _steps(model, (x, lens), seed)

    # This is how far upstream's own gradients move when the features are rounded: some are sums that cancel.
    eps = torch.finfo(dtype).eps
    generator = numbers(0)
    signs = [torch.randint(0, 2, x.shape, generator=generator) * 2 - 1 for _ in range(4)]
    nearby = [training_step(rounded, (x * (1 + eps * sign), lens), seed)[1] for sign in signs]
    # Sums that cancel to rounding errors of fp64 are compared by the size of gradients at large.
    least = 1e-4 * max(g.abs().max().item() for g in gradients.values()) if dtype is torch.float64 else 1e-12
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp_min(1e-12)
        noise = max(((other[name] - gradient).abs().max() / scale).item() for other in nearby)
        close(gradients_now[name], gradient, tolerance=max(digits, 20 * noise), what=name, least=least)


def test_optimizer_made_before_the_swap_steps_the_same_parameters(model, inputs):
    model, inputs = model.double(), (inputs[0].double(), inputs[1])
    swapped = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (model, swapped)]
    fastasr.accelerate(swapped)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        for m, optimizer in zip((model, swapped), optimizers, strict=True):
            training_step(m, inputs, seed=step)
            optimizer.step()
    moved = 0
    for (name, p), q in zip(model.named_parameters(), swapped.parameters(), strict=True):
        close(q.detach(), p.detach(), tolerance=1e-6, what=name)
        moved += not torch.equal(p, start[name])
    assert moved > 100
