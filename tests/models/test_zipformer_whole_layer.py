# SPDX-License-Identifier: Apache-2.0
"""A layer in inference in one native call: its bits are those of its submodules, and it runs only where it may."""

import copy
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from packed_layers import zipformer_layer

import fastasr
from fastasr.models.common.ragged import Packing, in_use
from fastasr.models.zipformer import ZipformerEncoderLayer, native_layer
from fastasr.ops import _gemm, _reduced_weights


def _call(layer, frames=9, batch=2, chunk_size=-1, attn_mask=None, padding=None, left_context_chunks=None):
    src = torch.randn(frames, batch, layer.embed_dim)
    pos_emb = torch.randn(1, 2 * frames - 1, layer.self_attn_weights.linear_pos.in_features)
    return src, pos_emb, chunk_size, attn_mask, padding, left_context_chunks


def _by_submodules(layer, call):
    return ZipformerEncoderLayer._encode_by_submodules(layer, False, *call)


def _whole(layer, call):
    by_submodules = partial(ZipformerEncoderLayer._encode_by_submodules, layer, False)
    return native_layer.encode(layer, *call, by_submodules)


def _check(layer, call):
    """Requires that the native call serves and gives the submodules' bits, and draws as many random numbers."""
    random.seed(7)
    expected = _by_submodules(layer, call)  # measures the products
    drawn = random.random()
    random.seed(7)
    got = _whole(layer, call)
    assert got is not None, native_layer.why_not(layer)
    assert random.random() == drawn
    assert torch.equal(got, expected)


@pytest.fixture(params=["auto", "torch", "native"])
def products(request, monkeypatch):
    monkeypatch.setenv("FASTASR_GEMM", request.param)
    _gemm.forget()
    yield
    monkeypatch.undo()
    _gemm.forget()


@torch.no_grad()
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (1, 3), (9, 2), (130, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_bits(frames, batch, causal):
    layer = zipformer_layer(causal=causal)
    padding = torch.rand(batch, frames) < 0.3
    mask = torch.rand(frames, frames) < 0.2
    masks = torch.rand(batch, frames, frames) < 0.2
    _check(layer, _call(layer, frames, batch))
    _check(layer, _call(layer, frames, batch, padding=padding))
    _check(layer, _call(layer, frames, batch, padding=padding.int(), attn_mask=mask))
    _check(layer, _call(layer, frames, batch, attn_mask=masks))
    every_second = (torch.rand(batch, 2 * frames, 2 * frames) < 0.2)[:, ::2, ::2]
    _check(layer, _call(layer, frames, batch, attn_mask=every_second))
    _check(layer, _call(layer, frames, batch, attn_mask=every_second[0]))
    if causal:
        _check(layer, _call(layer, frames, batch, chunk_size=4, padding=padding, left_context_chunks=1))
        _check(layer, _call(layer, frames, batch, chunk_size=4, attn_mask=mask))


@torch.no_grad()
@pytest.mark.usefixtures("products")
def test_large():
    """Products beyond the sizes that are torch's, and a first head beyond those of a batch."""
    layer = zipformer_layer(dim=192, num_heads=4, query_head_dim=32, value_head_dim=12, feedforward_dim=512)
    call = _call(layer, 320, 2, padding=torch.arange(320) >= torch.tensor([[320], [200]]))
    _check(layer, call)
    _check(layer, _call(layer, 5, 2))
    with in_use(Packing([320, 7, 150], torch.device("cpu"))):
        _check(layer, _recordings(layer, [320, 7, 150]))


def _recordings(layer, lengths, chunk_size=-1, left_context_chunks=None):
    src, _, *rest = _call(layer, sum(lengths), 1, chunk_size, left_context_chunks=left_context_chunks)
    return src, _call(layer, max(lengths))[1], *rest


@torch.no_grad()
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("lengths", [[9, 0, 4, 9, 1], [140, 3], [1], [0, 12]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_recordings_without_padding(lengths, causal):
    layer = zipformer_layer(causal=causal)
    with in_use(Packing(lengths, torch.device("cpu"), pads=not causal)):
        _check(layer, _recordings(layer, lengths))
        if causal:
            _check(layer, _recordings(layer, lengths, chunk_size=4, left_context_chunks=1))
        src, pos_emb, *rest = _recordings(layer, lengths)
        assert _whole(layer, (src[1:], pos_emb, *rest)) is None
        assert _whole(layer, (src, pos_emb[:, 2:], *rest)) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert _whole(layer, (src, pos_emb, *rest)) is None
        assert fastasr.why(layer)["forward"] == "autocast is on"
        assert (
            _whole(layer, (src, pos_emb, -1, torch.zeros(len(src), len(src), dtype=torch.bool), None, None))
            is None
        )


@torch.no_grad()
@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_fewer_bits(format):
    if _reduced_weights.why_not(format):
        pytest.skip(_reduced_weights.why_not(format))
    layer = zipformer_layer(dim=64, num_heads=4, feedforward_dim=128)
    call = _call(layer, 40, 2)
    exact = _by_submodules(layer, call)
    kept = [layer.feed_forward2.in_proj, layer.feed_forward2.out_proj, layer.self_attn1.in_proj]
    for module in kept:
        copy_ = _reduced_weights.keep(module.weight, format)
    _check(layer, call)
    assert not torch.equal(_whole(layer, call), exact)
    copy_.watch = lambda *a: None  # accelerate(verify=) sees every product
    assert _whole(layer, call) is None
    copy_.watch = None
    with _reduced_weights.suspended():
        assert torch.equal(_whole(layer, call), exact)
    kept[0].weight.mul_(2)  # the copy is packed again
    _check(layer, call)
    kept[0].weight.div_(2)
    for module in kept:
        assert _reduced_weights.drop(module.weight)
    assert torch.equal(_whole(layer, call), exact)


@torch.no_grad()
@pytest.mark.usefixtures("products")
def test_a_length_whose_products_are_not_measured():
    """Lengths of one class share the products of linear layers, but not the first head's."""
    layer = zipformer_layer(dim=192, num_heads=4, query_head_dim=32, value_head_dim=12, feedforward_dim=512)
    _check(layer, _call(layer, 320, 1))
    call = _call(layer, 331, 1)
    before = _whole(layer, call)
    expected = _by_submodules(layer, call)
    assert before is None or torch.equal(before, expected)
    _check(layer, call)


@torch.no_grad()
def test_changes_are_noticed():
    layer = zipformer_layer()
    call = _call(layer)
    _check(layer, call)
    layer.norm.bias.add_(0.5)
    _check(layer, call)
    layer.feed_forward1.in_proj.weight = torch.nn.Parameter(
        2.0 * layer.feed_forward1.in_proj.weight, requires_grad=False
    )
    _check(layer, call)
    _check(copy.deepcopy(layer), call)
    layer.self_attn2.out_proj = torch.nn.Linear(10, 20).eval()  # upstream's code
    assert _whole(layer, call) is None
    assert "self_attn2.out_proj" in native_layer.why_not(layer)["forward"]


def test_declines():
    layer = zipformer_layer()
    call = _call(layer)
    assert _whole(layer, call) is None  # gradients
    with torch.no_grad():
        _check(layer, call)
        seen = []
        hook = layer.feed_forward3.hidden_balancer.register_forward_hook(lambda *a: seen.append(1))
        layer(*call[:2])
        assert seen == [1]
        hook.remove()
        _check(layer, call)
        layer.conv_module1.train()
        assert _whole(layer, call) is None
        layer.eval()
        with fastasr.backend("eager"):
            assert _whole(layer, call) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert _whole(layer, call) is None
        src, pos_emb, *rest = call
        assert _whole(layer, (src, pos_emb.double(), *rest)) is None
        assert _whole(layer, (src, pos_emb[:, 1:], *rest)) is None
        assert _whole(layer, (src, pos_emb, 4, *rest[1:])) is None  # no chunks without causal convolutions
        assert _whole(layer, (src, pos_emb, -1, None, torch.zeros(1, 9, dtype=torch.bool), None)) is None
        with pytest.raises(TypeError, match="attn_mask"):
            layer(src, pos_emb, attn_mask=torch.zeros(9, 9))
        with in_use(Packing([9, 9], src.device)):
            assert _whole(layer, call) is None
        other = torch.nn.Conv1d(20, 20, 7, groups=20, padding=3, padding_mode="circular").eval()
        layer.conv_module2.depthwise_conv = other
        assert _whole(layer, call) is None
        assert "convolution" in native_layer.why_not(layer)["forward"]


@torch.no_grad()
def test_another_formula_is_noticed():
    layer = zipformer_layer()
    layer.feed_forward2.hidden_balancer = torch.nn.Tanh().eval()
    call = _call(layer)
    assert _whole(layer, call) is None
    assert "something else" in native_layer.why_not(layer)["forward"]
    assert torch.equal(layer(*call[:2]), _by_submodules(layer, call))


@torch.no_grad()
def test_entropy_is_logged(caplog, monkeypatch):
    layer = zipformer_layer()
    call = _call(layer)
    _check(layer, call)
    monkeypatch.setattr(random, "random", lambda: 0.0)
    with caplog.at_level(logging.INFO):
        _by_submodules(layer, call)
        assert _whole(layer, call) is not None
    first, second = (record.getMessage() for record in caplog.records if "entropy" in record.getMessage())
    assert first == second


@torch.no_grad()
def test_in_parallel():
    """Threads share a layer whose copies in fewer bits come and go."""
    layer = zipformer_layer(dim=64, num_heads=4, feedforward_dim=128)
    call, weight = _call(layer, 40, 2), layer.feed_forward2.in_proj.weight
    exact = _by_submodules(layer, call)
    _reduced_weights.keep(weight, "int8")
    reduced = _by_submodules(layer, call)
    _reduced_weights.drop(weight)

    def run(i):
        with torch.no_grad():
            if i % 7 == 0:
                _reduced_weights.keep(weight, "int8")
            elif i % 7 == 3:
                _reduced_weights.drop(weight)
            return layer(*call[:2])

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(run, range(60)):
            assert torch.equal(y, exact) or torch.equal(y, reduced)
    _reduced_weights.drop(weight)
    assert torch.equal(layer(*call[:2]), exact)
