# SPDX-License-Identifier: Apache-2.0
"""Kernels that models call beside the ops, on a GPU: as exact as torch's own, by float64 on the host."""

import copy

import pytest
import torch

from fastasr import backend
from fastasr.models.zipformer.self_attention import weighted
from fastasr.ops import _folded_norm, _weighted_values

pytestmark = pytest.mark.gpu


def off(found, exact):
    return (found.cpu().double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(4, 3, 750, 750), (8, 1, 61, 61)], ids=str)
def test_weighted_values(sizes, dtype):
    heads, batch, targets, sources = sizes
    rows = torch.zeros(heads, batch, targets, -(-sources // 16) * 16, device="cuda")
    rows[..., :sources] = torch.softmax(2.0 * torch.randn(sizes, device="cuda"), -1)
    weights = rows.to(dtype)[..., :sources].requires_grad_()
    values = torch.randn(sources, batch, heads * 12, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(targets, batch, heads * 12, device="cuda").to(dtype)

    def step(weights, values, grad):
        y = weighted(weights, values)
        return y.detach(), *torch.autograd.grad(y, (weights, values), grad)

    exact = step(
        *(t.detach().cpu().double().requires_grad_() for t in (weights, values)), grad.cpu().double()
    )
    with backend("eager"):
        eager = step(weights, values, grad)
    assert _weighted_values.launchers(weights, values) is not None
    ours = step(weights, values, grad)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert off(a, c) <= 1.1 * off(b, c) + 1e-7 * c.abs().max().item()
    assert all(map(torch.equal, ours, step(weights, values, grad)))


@torch.no_grad()
def test_folded_norm():
    conv, norm = torch.nn.Conv1d(512, 512, 9, groups=512), torch.nn.BatchNorm1d(512)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.01, 4.0)
    exact = _folded_norm.folded(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
    found = _folded_norm.folded(conv.cuda(), norm.cuda())
    for a, b in zip(found, exact, strict=True):
        assert off(a, b) <= 2e-6 * (1.0 + b.abs().max().item())
