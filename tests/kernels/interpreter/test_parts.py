# SPDX-License-Identifier: Apache-2.0
"""On a device of many multiprocessors, whose parts are more than 128, every row counts once in the gradients of
parameters, which are sums of parts."""

import pytest
import torch

from fastasr import backend, ops
from fastasr.kernels import _parts

CHANNELS = 2048


def _rows(count: int, *shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, CHANNELS) for _ in range(count)]


# A tile has two rows.
CALLS = {
    "bias_norm": lambda: (ops.bias_norm, [*_rows(1, 290), 0.1 * torch.randn(CHANNELS), torch.tensor(0.3)]),
    "bypass": lambda: (ops.bypass, [*_rows(2, 290), torch.rand(CHANNELS)]),
    "gated_residual_norm": lambda: (ops.gated_residual_norm, [*_rows(4, 290), *_rows(2)]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_row_counts_once(call, monkeypatch):
    monkeypatch.setattr(_parts, "processors", lambda t: 4000)
    function, tensors = call()
    found = [t.requires_grad_() for t in tensors]
    truth = [t.detach().double().requires_grad_() for t in tensors]
    with backend("triton"):
        y = function(*found)
    grad = y.detach() + torch.randn(y.shape)  # sums do not cancel
    ours = y, *torch.autograd.grad(y, found, grad)
    exact = function.definition(*truth)
    for a, t in zip(ours, (exact, *torch.autograd.grad(exact, truth, grad.double())), strict=True):
        assert (a - t).abs().max() / t.abs().max() < 3e-6


@pytest.mark.parametrize("parts", [1, 128, 2500])
def test_a_table_of_any_length_is_added_up(parts):
    table, total = torch.randn(parts, CHANNELS), torch.empty(CHANNELS)
    _parts.add_parts(table, total)
    torch.testing.assert_close(total, table.double().sum(0).float(), rtol=1e-6, atol=1e-6)
