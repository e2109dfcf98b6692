# SPDX-License-Identifier: Apache-2.0
"""Attention weights that are not in memory: the handle against the tensor, in upstream's consumers, in a layer."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastasr.models import zipformer as models
from fastasr.models.zipformer import layer as layer_module
from fastasr.models.zipformer.self_attention import weighted
from fastasr.models.zipformer.unmaterialised import UnmaterialisedWeights

FRAMES, BATCH, HEADS, DIM, POS_DIM = 23, 2, 4, 8, 4


def handle(dtype=torch.float64, masked=True):
    torch.manual_seed(0)
    x = torch.randn(FRAMES, BATCH, HEADS * (2 * DIM + POS_DIM), dtype=dtype) * 0.5
    pos = torch.randn(1, 2 * FRAMES - 1, HEADS * POS_DIM, dtype=dtype)
    masks = {}
    if masked:
        masks["key_padding_mask"] = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [9]])
        masks["attn_mask"] = torch.rand(FRAMES, FRAMES) > 0.8
    return UnmaterialisedWeights(x, pos, HEADS, DIM, **masks)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 3, HEADS])
def test_weighted_values(heads, masked):
    weights = handle(masked=masked)[:heads]
    assert isinstance(weights, UnmaterialisedWeights)
    assert weights.shape == weights.materialised().shape == (heads, BATCH, FRAMES, FRAMES)
    values = torch.randn(FRAMES, BATCH, heads * 5, dtype=torch.float64)
    expected = weighted(weights.materialised(), values)
    close(weighted(weights, values), expected)
    apart = values.reshape(FRAMES, BATCH, heads, 5).permute(2, 1, 0, 3)
    close(weights @ apart, weights.materialised() @ apart)
    close(torch.matmul(weights, apart), weights.materialised() @ apart)


def test_everything_else_materialises():
    weights = handle()
    tensor = weights.materialised()
    close(weights[0:1].materialised(), tensor[0:1])
    close(weights[1], tensor[1])
    close(weights[1:3], tensor[1:3])
    close(weights[..., 0], tensor[..., 0])
    assert torch.equal(weights > 0, tensor > 0)
    close(weights.sum(-1), tensor.sum(-1))
    close(2 * weights, 2 * tensor)
    close(weights * weights[0:1], tensor * tensor[0:1])
    close(torch.cat([weights, tensor]), torch.cat([tensor, tensor]))
    one = torch.randn(FRAMES, 3, dtype=torch.float64)
    close(weights @ one, tensor @ one)  # values that broadcast
    assert (weights.dtype, weights.device, weights.ndim, len(weights)) == (
        torch.float64,
        tensor.device,
        4,
        HEADS,
    )


def test_constant_attention():
    weights, tensor = handle()[0:1], handle().materialised()[0:1]
    close(layer_module._constant(weights), layer_module._constant(tensor))


def test_upstreams_consumers_take_it():
    zipformer = pytest.importorskip("zipformer.modules.zipformer")
    torch.manual_seed(1)
    attention = zipformer.SelfAttention(24, HEADS, 6).double().eval()
    nonlin = zipformer.NonlinAttention(24, 18).double().eval()
    x = torch.randn(FRAMES, BATCH, 24, dtype=torch.float64)
    with torch.no_grad():
        close(attention(x, handle()), attention(x, handle().materialised()))
        close(nonlin(x, handle()[0:1]), nonlin(x, handle().materialised()[0:1]))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def run(layer, x, pos_emb, padding, mask=None):
    random.seed(3)
    with torch.no_grad(), Largest() as largest:
        y = layer(x, pos_emb, attn_mask=mask, src_key_padding_mask=padding)
    return y, largest.elements, random.random()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_on_long_input(monkeypatch, masked, dtype):
    torch.manual_seed(0)
    frames, batch = 300, 2
    layer = models.ZipformerEncoderLayer(
        16, pos_dim=16, num_heads=2, query_head_dim=8, pos_head_dim=4, value_head_dim=6, feedforward_dim=24,
        cnn_module_kernel=7,
    ).to(dtype).eval()  # fmt: skip
    x, pos_emb = torch.randn(frames, batch, 16, dtype=dtype), torch.randn(1, 2 * frames - 1, 16, dtype=dtype)
    padding = torch.arange(frames) >= torch.tensor([[frames], [120]]) if masked else None
    expected, size, draw = run(layer, x, pos_emb, padding)
    assert size >= 2 * batch * frames * frames
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES", 0)
    actual, size, same_draw = run(layer, x, pos_emb, padding)
    assert size < frames * frames
    assert draw == same_draw
    tolerance = 1e-11 if dtype is torch.float64 else 2e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_training_hooks_and_autocast_keep_the_tensor(monkeypatch):
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES", 0)
    layer = models.ZipformerEncoderLayer(
        16, pos_dim=16, num_heads=2, query_head_dim=8, pos_head_dim=4, value_head_dim=6, feedforward_dim=24,
        cnn_module_kernel=7,
    ).eval()  # fmt: skip
    x = torch.randn(9, 1, 16)
    assert not layer_module._is_long(layer, x)  # its parameters want gradients
    with torch.no_grad():
        assert layer_module._is_long(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not layer_module._is_long(layer, x)
        seen = layer.self_attn1.register_forward_hook(lambda *a: None)
        assert not layer_module._is_long(layer, x)
        seen.remove()
        layer.train()
        assert not layer_module._is_long(layer, x)
