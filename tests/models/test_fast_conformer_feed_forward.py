# SPDX-License-Identifier: Apache-2.0
"""FastConformer's feed-forward block in training: with dropout it keeps one wide tensor in place of two."""

import pytest
import torch
import torch.nn.functional as F
from steps import cotangent

from fastasr.models.fast_conformer import FastConformerFeedForward
from fastasr.ops import _dropout
from fastasr.testing import seeded

ROWS, WIDTH, HIDDEN = 30, 16, 200


def _block(bias=True, activation=None):
    torch.manual_seed(seeded(1))
    block = FastConformerFeedForward(WIDTH, HIDDEN, bias, activation_dropout=0.3)
    block.activation = activation or block.activation
    return block, torch.randn(2, ROWS // 2, WIDTH, requires_grad=True)


def _formula(block, x):
    hidden = block.activation(F.linear(x, block.linear1.weight, block.linear1.bias))
    return F.linear(F.dropout(hidden, block.activation_dropout), block.linear2.weight, block.linear2.bias)


def _outcome(function, block, x):
    """Returns the output, the gradients of what asks for one, and the generator's next numbers."""
    torch.manual_seed(seeded(2))
    y = function(x)
    wanted = [t for t in (x, *block.parameters()) if t.requires_grad]
    return y.detach(), *torch.autograd.grad(y, wanted, cotangent(y)), torch.rand(3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.ReLU(), torch.nn.GELU()])
@pytest.mark.parametrize(
    "frozen", [(), ("linear1.weight", "linear2.bias"), ("linear2.weight", "linear1.bias")]
)
def test_a_training_step_is_the_formulas(bias, activation, frozen):
    block, x = _block(bias, activation)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    found, expected = _outcome(block, block, x), _outcome(lambda x: _formula(block, x), block, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("product", ["torch", "native"])
def test_the_output_can_be_changed_in_place(product, monkeypatch):
    monkeypatch.setenv("FASTASR_GEMM", product)
    block, x = _block()
    y = block(x)
    y[:, 1:] = 0
    y.sum().backward()
    assert not block.linear2.bias.grad.eq(0).any()


def test_one_wide_tensor_is_kept():
    if not _dropout._draws_are_torchs():
        pytest.skip("the native library does not draw here")
    block, x = _block()
    parameters, kept = {p.data_ptr() for p in block.parameters()}, {}

    def pack(t):
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    # x, W1 x + b1, and a byte for each element that dropout may drop
    assert sum(kept.values()) == 4 * ROWS * WIDTH + 4 * ROWS * HIDDEN + ROWS * HIDDEN


def test_gradients_of_gradients_are_refused():
    if not _dropout._draws_are_torchs():
        pytest.skip("the native library does not draw here")
    block, x = _block()
    with pytest.raises(RuntimeError, match="gradient"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)
