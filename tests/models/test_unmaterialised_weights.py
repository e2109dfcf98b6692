# SPDX-License-Identifier: Apache-2.0
"""Attention weights that are not in memory: the handle against the tensor, in upstream's consumers and in a layer."""

import copy
import itertools
import random

import pytest
import torch
from largest import Largest
from steps import cotangent, fixed, seeded

import fastasr
from fastasr import ops
from fastasr.models import zipformer as models
from fastasr.models.zipformer import layer as layer_module
from fastasr.models.zipformer import native_layer, unmaterialised
from fastasr.models.zipformer import stack as stack_module
from fastasr.models.zipformer.attention import SCORE_LIMIT
from fastasr.models.zipformer.packed_weights import constant_weights
from fastasr.models.zipformer.self_attention import weighted
from fastasr.models.zipformer.unmaterialised import UnmaterialisedWeights
from fastasr.ops._zipformer_attention import scores

FRAMES, BATCH, HEADS, DIM, POS_DIM = 23, 2, 4, 8, 4


SMALL = {
    "pos_dim": 16, "num_heads": 2, "query_head_dim": 8, "pos_head_dim": 4, "value_head_dim": 6, "feedforward_dim": 24,
    "cnn_module_kernel": 7,
}  # fmt: skip


def small_layer(dtype=torch.float32, **changed):
    seeded(0)
    return models.ZipformerEncoderLayer(16, **SMALL, **changed).to(dtype)


def handle(dtype=torch.float64, masked=True):
    seeded(0)
    x = torch.randn(FRAMES, BATCH, HEADS * (2 * DIM + POS_DIM), dtype=dtype) * 0.5
    pos = torch.randn(1, 2 * FRAMES - 1, HEADS * POS_DIM, dtype=dtype)
    masks = {}
    if masked:
        masks["key_padding_mask"] = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [9]])
        masks["attn_mask"] = torch.rand(FRAMES, FRAMES) > 0.8
    return UnmaterialisedWeights(x, pos, HEADS, DIM, **masks)


def formed(weights):
    """Returns the weights of a handle as a tensor."""
    tensor = ops.zipformer_attention_weights(
        weights.projected, weights.positions, HEADS, DIM, **weights.masks
    )[: weights.heads]
    return tensor if weights.equal is None else constant_weights(tensor)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_weighted_values(heads, masked):
    weights = handle(masked=masked)
    weights = weights[0:1] if heads == 1 else weights
    assert weights.shape == formed(weights).shape == (heads, BATCH, FRAMES, FRAMES)
    assert len(weights) == heads
    values = torch.randn(FRAMES, BATCH, heads * 5, dtype=torch.float64)
    close(weighted(weights, values), weighted(formed(weights), values))
    with pytest.raises(IndexError, match="only the first head"):
        weights[1:3]


def test_constant_attention():
    weights = handle()[0:1]
    equal, expected = constant_weights(weights), constant_weights(formed(weights))
    assert equal.shape == expected.shape
    values = torch.randn(FRAMES, BATCH, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(FRAMES, BATCH, 5, dtype=torch.float64)
    close(weighted(equal, values), weighted(expected, values))
    found = (torch.autograd.grad(weighted(w, values), values, grad)[0] for w in (equal, expected))
    close(*found)


def gradients(weights, use):
    """Returns the gradients of projection and positions, through ``use`` of the weights."""
    inputs = [t for t in (weights.projected, weights.positions) if t is not None]
    return torch.autograd.grad(use(weights), inputs, allow_unused=True)


@pytest.mark.parametrize("case", ["plain", "masked", "nothing to see", "no positions", "one frame", "chunks"])
def test_gradients_of_every_consumer(case):
    """Three consumers have gradients of their own, one of them of the first head."""
    frames = 1 if case == "one frame" else FRAMES
    masks = {}
    if case == "masked":
        masks = {"key_padding_mask": torch.arange(frames) >= torch.tensor([[frames], [9]])}
    if case == "nothing to see":
        masks = {"key_padding_mask": torch.tensor([False, True])[:, None].expand(BATCH, frames).contiguous()}
    if case == "chunks":
        masks = {"chunk_size": 4, "left_context_chunks": 1}
    seeded(0)
    x = torch.randn(frames, BATCH, HEADS * (2 * DIM + POS_DIM), dtype=torch.float64, requires_grad=True)
    pos = torch.randn(1, 2 * frames - 1, HEADS * POS_DIM, dtype=torch.float64, requires_grad=True)
    pos = None if case == "no positions" else pos
    weights = UnmaterialisedWeights(x, pos, HEADS, DIM, **masks)
    values = [torch.randn(frames, BATCH, n, dtype=torch.float64) for n in (HEADS * 3, 16, HEADS * 2)]

    def use(w):
        first, second = weighted(w, values[0]), weighted(w[0:1], values[1])
        return first.square().sum() + second.sin().sum() + weighted(w, values[2] * first[..., :1]).sum()

    def plain(w):
        return use(formed(w))

    for found, expected in zip(gradients(weights, use), gradients(weights, plain), strict=True):
        close(found, expected)


@pytest.mark.parametrize("pos_batch", [0, 1, BATCH])
def test_the_penalty_on_scores_comes_once(pos_batch):
    seeded(0)
    x = torch.randn(FRAMES, BATCH, HEADS * (2 * DIM + POS_DIM), dtype=torch.float64, requires_grad=True)
    pos = torch.randn(pos_batch, 2 * FRAMES - 1, HEADS * POS_DIM, dtype=torch.float64, requires_grad=True)
    pos = pos if pos_batch else None
    inputs = [x, pos] if pos_batch else [x]
    values = torch.randn(FRAMES, BATCH, HEADS, dtype=torch.float64)
    mask = torch.rand(FRAMES, FRAMES) > 0.8
    weights = ops.zipformer_attention_weights(
        x, pos, HEADS, DIM, attn_mask=mask, score_penalty=0.1, score_limit=2.0
    )
    expected = torch.autograd.grad(2 * weighted(weights, values).sum(), inputs)
    penalty = {"score_penalty": 0.1, "score_limit": 2.0}
    weights = UnmaterialisedWeights(x, pos, HEADS, DIM, penalty=penalty, attn_mask=mask)
    y = weighted(weights, values).sum() + weighted(weights, values).sum()
    for a, b in zip(torch.autograd.grad(y, inputs), expected, strict=True):
        close(a, b)


def run(layer, x, pos_emb, padding, mask=None):
    random.seed(3)
    with torch.no_grad(), Largest() as largest:
        y = layer(x, pos_emb, attn_mask=mask, src_key_padding_mask=padding)
    return y, largest.elements, random.random()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_on_long_input(monkeypatch, masked, dtype):
    monkeypatch.setattr(native_layer, "encode", lambda *call: None)  # its submodules' tensors are seen
    frames, batch = 300, 2
    layer = small_layer(dtype).eval()
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


def training_step(layer, x, pos_emb, seed):
    """Returns output, gradients of the input and every parameter, largest tensor, and the next draws of both
    generators.
    """
    layer = copy.deepcopy(layer)  # whitening keeps state
    random.seed(seed)
    seeded(seed)
    x = x.clone().requires_grad_()
    padding = torch.arange(x.shape[0]) >= torch.tensor([[x.shape[0]], [x.shape[0] // 2]])
    with Largest() as largest:
        y = layer(x, pos_emb, src_key_padding_mask=padding)
        y.backward(cotangent(y))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad} | grads, largest.elements, (random.random(), torch.rand(1).item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_in_training(monkeypatch, dtype):
    """The same seed gives the same step, with constant attention, skipped positions and penalised scores."""
    frames, batch = 120, 2
    layer = small_layer(dtype, const_attention_rate=0.5).train()
    # scores beyond the limit; in float32 their gradients would be noise
    factor = 7 if dtype is torch.float64 else 1
    with torch.no_grad():
        layer.self_attn_weights.in_proj.weight *= factor
    x, pos_emb = torch.randn(frames, batch, 16, dtype=dtype), torch.randn(1, 2 * frames - 1, 16, dtype=dtype)
    with torch.no_grad():
        beyond = scores(layer.self_attn_weights.in_proj(x), None, None, 2, 8).abs().max() > SCORE_LIMIT
        assert beyond == (dtype is torch.float64)
    happened = set()

    def noted(*args, **options):
        happened.update(name for name in ("equal", "score_penalty") if options.get(name) is not None)
        return ops.zipformer_attention(*args, **options)

    monkeypatch.setattr(unmaterialised, "zipformer_attention", noted)
    for seed in itertools.count():
        monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 1 << 40)
        y, grads, size, draws = training_step(layer, x, pos_emb, seed)
        assert size >= 2 * batch * frames * frames
        monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 0)
        found, found_grads, size, same_draws = training_step(layer, x, pos_emb, seed)
        assert size < frames * frames
        assert draws == same_draws
        tolerance = 1e-9 if dtype is torch.float64 else 1e-3
        torch.testing.assert_close(found, y, rtol=tolerance, atol=tolerance)
        assert found_grads.keys() == grads.keys()
        for name, grad in grads.items():
            scale = grad.abs().max() + 1e-3 * grads["x"].abs().max()
            error = (found_grads[name] - grad).abs().max()
            assert error <= tolerance * scale, f"{name}, seed {seed}: {error} of {scale}"
        if happened == {"equal", "score_penalty"} and seed >= 3:
            break


def test_autocast(monkeypatch):
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 0)
    layer = small_layer().eval()
    x, pos_emb = torch.randn(40, 2, 16, requires_grad=True), torch.randn(1, 79, 16)

    def step():
        random.seed(5)
        assert layer_module._is_long(layer, x)
        y = layer(x, pos_emb).float()
        return torch.autograd.grad(y, x, cotangent(y))[0]

    expected = step()
    with torch.autocast("cpu", torch.bfloat16):
        found = step()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_swapped_layer(monkeypatch):
    """All attention of upstream's layer runs fastasr's code, in inference and with gradients."""
    zipformer = pytest.importorskip("zipformer.modules.zipformer")
    seeded(0)
    layer = zipformer.ZipformerEncoderLayer(16, **SMALL).eval()
    model = torch.nn.Sequential(layer)
    frames = 200
    x, pos_emb = torch.randn(frames, 1, 16), torch.randn(1, 2 * frames - 1, 16)
    expected, _, _ = run(layer, x, pos_emb, None)
    fastasr.accelerate(model)
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES", 0)
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 0)
    y, size, _ = run(layer, x, pos_emb, None)
    assert size < frames * frames
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    with Largest() as largest:
        layer(x, pos_emb).sum().backward()
    assert largest.elements < frames * frames
    with fastasr.eager_mode(model):
        assert not layer_module._is_long(layer, x)
    fastasr.restore(layer.self_attn1)
    assert not layer_module._is_long(layer, x)


def test_padding_changes_nothing():
    """A padded sequence gives its own frames the output and gradients that it has alone."""
    seeded(0)
    frames, length = 40, 27
    x = torch.randn(frames, 1, HEADS * (2 * DIM + POS_DIM), dtype=torch.float64)
    pos = torch.randn(1, 2 * frames - 1, HEADS * POS_DIM, dtype=torch.float64)
    values, grad = (torch.randn(frames, 1, HEADS * 3, dtype=torch.float64) for _ in range(2))
    grad[length:] = 0

    def of(n, **masks):
        shown = pos[:, frames - n : frames + n - 1]
        leaves = [t.clone().requires_grad_() for t in (x[:n], shown, values[:n])]
        y = UnmaterialisedWeights(*leaves[:2], HEADS, DIM, **masks).weighted(leaves[2])
        dx, dpos, dvalue = torch.autograd.grad(y, leaves, grad[:n])
        return y[:length], dx[:length], dpos[:, n - length : n + length - 1], dvalue[:length]

    padded = of(frames, key_padding_mask=torch.arange(frames)[None] >= length)
    for a, b in zip(padded, of(length), strict=True):
        close(a, b)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("left", [[16], [-1]])
def test_chunk_sizes_are_the_mask(monkeypatch, training, left):
    """The encoder passes chunk sizes down to the attention, and agrees with masks; it makes no tensor of
    time by time.
    """
    seeded(0)
    frames, batch = 203, 2
    encoder = models.Zipformer(
        downsampling_factor=(1, 2), encoder_dim=(16, 24), num_encoder_layers=1, encoder_unmasked_dim=16,
        query_head_dim=8, pos_head_dim=4, value_head_dim=6, num_heads=2, feedforward_dim=24, cnn_module_kernel=7,
        pos_dim=16, causal=True, chunk_size=[8], left_context_frames=left,
    ).double().train(training)  # fmt: skip
    x = torch.randn(frames, batch, 16, dtype=torch.float64)
    lengths = torch.tensor([frames, 150])
    padding = torch.arange(frames) >= lengths[:, None]

    def step():
        fixed(2)  # with other seeds a layer may draw the penalty on large scores, which needs them all
        source = x.clone().requires_grad_()
        with Largest() as largest:
            y, _ = encoder(source, lengths, padding)
            (grad,) = torch.autograd.grad(y, source, cotangent(y))
        return y.detach(), grad, largest.elements

    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 0)
    *found, size = step()
    assert size < frames * frames
    monkeypatch.setattr(stack_module, "takes_chunks", lambda layer: False)
    *expected, size = step()
    assert size >= frames * frames
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_layers_that_are_watched_get_a_mask():
    layer = small_layer(causal=True)
    assert stack_module.takes_chunks(layer)
    seen = layer.register_forward_pre_hook(lambda *a: None)
    assert not stack_module.takes_chunks(layer)
    seen.remove()
    layer.self_attn_weights.forward = layer.self_attn_weights.forward
    assert not stack_module.takes_chunks(layer)


def test_hooks_and_dropout_keep_the_tensor(monkeypatch):
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES", 0)
    layer, x = small_layer().eval(), torch.randn(9, 1, 16)
    assert not layer_module._is_long(layer, x)  # its parameters want gradients, and it is short for that
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 0)
    assert layer_module._is_long(layer, x)
    layer.self_attn_weights.dropout = 0.1
    assert not layer_module._is_long(layer, x)
    with torch.no_grad():
        assert layer_module._is_long(layer, x)
        for register in (
            layer.self_attn1.register_forward_hook,
            layer.self_attn1.register_full_backward_hook,
        ):
            seen = register(lambda *a: None)
            assert not layer_module._is_long(layer, x)
            seen.remove()
