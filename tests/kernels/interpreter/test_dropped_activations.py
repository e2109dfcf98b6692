# SPDX-License-Identifier: Apache-2.0
"""The first half of a feed-forward block in training: the kernel drops by the seed that torch draws, and the backward
pass by the same."""

import torch

from fastasr import backend
from fastasr.models.common import activations
from fastasr.ops import _weights_dropout
from fastasr.testing import seeded


def test_a_training_step_is_the_formulas():
    linear, activation, x = torch.nn.Linear(16, 70), torch.nn.SiLU(), torch.randn(3, 15, 16)
    cotangent = torch.randn(3, 15, 70)
    leaves = [x.requires_grad_(), *linear.parameters()]
    torch.manual_seed(seeded(1))
    with backend("triton"):
        y = activations.dropped(linear, activation, 0.3, x)
        found = torch.autograd.grad(y, leaves, cotangent)
    torch.manual_seed(seeded(1))
    kept = _weights_dropout.kept(_weights_dropout.draw_seed(x.device), 0.3, *y.shape)
    expected = activation(linear(x)) * kept / 0.7
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, cotangent), rtol=1e-4, atol=1e-4)
