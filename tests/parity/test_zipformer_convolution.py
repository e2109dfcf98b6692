# SPDX-License-Identifier: Apache-2.0
"""The swapped ConvolutionModule against upstream's: values, masks, chunks, streaming, gradients, draws."""

import copy
import random

import pytest
import torch
from steps import close, cotangent, same, set_batch_count, step
from tiny_encoders import by_itself, swapped
from torch.testing import assert_close

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from zipformer.modules.zipformer import ConvolutionModule

from fastasr.models import zipformer as ours_of
from fastasr.models.zipformer import convolution


def _module(channels=12, taps=7, causal=False):
    module = ConvolutionModule(channels, taps, causal)
    torch.nn.init.normal_(module.out_proj.weight)
    return module.eval()


@pytest.fixture
def upstream():
    return _module()


def _mask(batch, time):
    """Returns a mask: True in the last frames of every sequence but the first, and all over the last of three."""
    lengths = torch.tensor([max(0, time - 3 * i) for i in range(batch)])
    if batch == 3:
        lengths[2] = 0
    return torch.arange(time) >= lengths.unsqueeze(1)


@pytest.fixture
def convolved(monkeypatch):
    """Records the convolutions that were called, in order."""
    seen, inner = [], torch.nn.Conv1d._conv_forward

    def watched(self, x, weight, bias):
        seen.append(self)
        return inner(self, x, weight, bias)

    monkeypatch.setattr(torch.nn.Conv1d, "_conv_forward", watched)
    return seen


SHAPES = [(20, 2), (20, 1), (1, 1), (1, 3), (2, 2), (3, 1), (7, 3), (33, 5)]


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("channels", "taps"), [(12, 7), (1, 3), (19, 1), (16, 31)])
@pytest.mark.parametrize(("time", "batch"), SHAPES)
def test_inference(convolved, time, batch, channels, taps, masked, causal):
    upstream = _module(channels, taps, causal)
    x = torch.randn(time, batch, channels)
    mask = _mask(batch, time) if masked else None
    own_parts, ours = by_itself(upstream), swapped(upstream)
    for chunk_size in (-1, 1, 4, 7, 100) if causal else (-1,):
        with torch.inference_mode():
            expected = upstream(x, src_key_padding_mask=mask, chunk_size=chunk_size)
            del convolved[:]
            equal, near = own_parts(x, mask, chunk_size), ours(x, mask, chunk_size)
        assert convolved == []
        assert equal.stride() == expected.stride()
        assert_close(equal, expected, rtol=2e-6, atol=2e-6)
        assert_close(near, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(upstream, layout):
    x = {
        "transposed": torch.randn(3, 20, 12).transpose(0, 1),
        "sliced": torch.randn(20, 3, 24)[..., ::2],
        "expanded": torch.randn(20, 1, 12).expand(20, 3, 12),
    }[layout]
    kept, mask = x.clone(), _mask(3, 20)
    masks = (mask, mask.t().contiguous().t(), mask[:1])
    with torch.no_grad():
        for each in masks:
            assert_close(swapped(upstream)(x, each), upstream(x, each), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)


def test_in_proj_with_another_memory_order(upstream):
    class Strided(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(0, 2).contiguous().transpose(0, 2)

    upstream.in_proj.__class__ = Strided
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    with torch.no_grad():
        assert_close(swapped(upstream)(x, mask), upstream(x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(upstream, dtype):
    upstream.to(dtype)
    x, mask = torch.randn(20, 3, 12, dtype=dtype), _mask(3, 20)
    with torch.no_grad():
        expected, actual = upstream(x, mask), swapped(upstream)(x, mask)
    assert actual.dtype == dtype
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
def test_autocast(causal):
    upstream = _module(causal=causal)
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    ours = swapped(upstream)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = upstream(x, mask), ours(x, mask)
    assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_without_a_bias(upstream):
    upstream.depthwise_conv.bias = None
    x = torch.randn(20, 3, 12)
    with torch.no_grad():
        assert_close(swapped(upstream)(x), upstream(x), rtol=1e-5, atol=1e-5)


def test_frozen_weights(upstream):
    ours = swapped(upstream.requires_grad_(False))
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    assert_close(ours(x, mask), upstream(x, mask), rtol=1e-5, atol=1e-5)


def test_an_empty_batch(upstream):
    x = torch.randn(20, 0, 12)
    with torch.no_grad():
        assert swapped(upstream)(x).shape == upstream(x).shape


# taps, time, chunk size; None: not causal
FORMS = [(7, 20, None), (31, 9, None), (7, 20, -1), (7, 22, 4), (15, 20, 16), (31, 9, 2)]


@pytest.mark.parametrize("always", [False, True], ids=["drawn", "always"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("taps", "time", "chunk_size"), FORMS)
def test_with_gradients(convolved, taps, time, chunk_size, training, always):
    """Gradients are upstream's, those of its balancers and whitening included, and so are its random draws."""
    upstream = _module(taps=taps, causal=chunk_size is not None)
    if upstream.causal:
        torch.nn.init.normal_(upstream.depthwise_conv.chunkwise_conv_scale, std=0.3)
    for module in set_batch_count(upstream, 20000.0).modules():
        if always and hasattr(module, "prob"):
            module._modules.pop("prob", None)  # a schedule
            module.prob = module.min_prob = module.max_prob = 1.0
    upstream.train(training)
    ours, own_parts = swapped(upstream), by_itself(upstream)
    x, mask = torch.randn(time, 3, 12), _mask(3, time)
    chunk_size = -1 if chunk_size is None else chunk_size
    for seed in range(1 if always else 4):
        options = {"seed": seed, "src_key_padding_mask": mask, "chunk_size": chunk_size}
        expected = step(copy.deepcopy(upstream), x, **options)
        del convolved[:]
        for module in (own_parts, ours):
            same(step(copy.deepcopy(module), x, **options), expected, 2e-5)
        assert convolved == []


@pytest.mark.parametrize("seed", range(6))
def test_the_gates_balancer_acts_on_the_gates_gradient(seed):
    """fastasr's balancer and upstream's act alike; where it acts on nothing, no part of the graph stands for it."""
    module = ours_of.ConvolutionModule(12, 7, causal=False).train()
    x = torch.randn(20, 3, 12, requires_grad=True)
    random.seed(seed)
    acts = random.random() < float(module.balancer1.prob)
    random.seed(seed)
    h = module.in_proj(x)
    assert (convolution._with_balanced_gate(module, h) is h) == (not acts)


@pytest.mark.parametrize("taps", [1, 7, 31])
@pytest.mark.parametrize("chunk_size", [2, 4, 16])
def test_streaming(convolved, chunk_size, taps):
    upstream = _module(taps=taps, causal=True)
    torch.nn.init.normal_(upstream.depthwise_conv.chunkwise_conv_scale, std=0.3)
    x, mask = torch.randn(32, 3, 12), _mask(3, 32)
    for ours in (swapped(upstream), by_itself(upstream)):
        cache = theirs = torch.zeros(3, 12, taps // 2)
        with torch.no_grad():
            for start in range(0, 32, chunk_size):
                part = slice(start, start + chunk_size)
                if taps == 1:  # upstream's cache then keeps every frame
                    theirs = torch.zeros(3, 12, 0)
                expected, theirs = upstream.streaming_forward(x[part], theirs, mask[:, part])
                if taps == 1:
                    cache = torch.zeros(3, 12, 0)
                del convolved[:]
                y, cache = ours.streaming_forward(x[part], cache, mask[:, part])
                assert taps == 1 or convolved == []
                assert_close(y, expected, rtol=1e-5, atol=1e-5)
                assert_close(cache, theirs, rtol=2e-6, atol=2e-6)


def test_streaming_gradients():
    upstream = _module(causal=True)
    x, first = torch.randn(6, 2, 12), torch.randn(2, 12, 3)
    found = []
    for module in (upstream, swapped(upstream)):
        chunk, cache = x.clone().requires_grad_(), first.clone().requires_grad_()
        y, after = module.streaming_forward(chunk, cache, None)
        weights = cotangent(y), cotangent(after)
        found.append(torch.autograd.grad((y, after), (chunk, cache, *module.parameters()), weights))
    for a, e in zip(*found, strict=True):
        close(a, e, 2e-5)


def test_a_cache_of_another_length_raises():
    upstream = _module(causal=True)
    for module in (upstream, swapped(upstream), ours_of.ConvolutionModule(12, 7, True).eval()):
        with torch.no_grad(), pytest.raises((AssertionError, ValueError)):
            module.streaming_forward(torch.randn(4, 2, 12), torch.zeros(2, 12, 2), None)


def test_chunks_without_a_causal_module_raise(upstream):
    x = torch.randn(20, 3, 12)
    for module in (upstream, swapped(upstream)):
        with torch.no_grad(), pytest.raises(AssertionError):
            module(x, chunk_size=4)


@pytest.mark.parametrize("shape", [(3, 19), (2, 20), (4, 20), (20, 3)])
def test_masks_of_another_shape_raise(upstream, shape):
    x, mask = torch.randn(20, 3, 12), torch.zeros(shape, dtype=torch.bool)
    for module in (upstream, swapped(upstream)):
        with torch.no_grad(), pytest.raises(RuntimeError):
            module(x, mask)


@pytest.mark.parametrize(
    "causal", [pytest.param(False, marks=pytest.mark.long), True], ids=["plain", "causal"]
)
def test_compiled(causal):
    upstream = _module(causal=causal)
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    torch._dynamo.reset()  # its caches are the process's: once, after other tests, it compiled nothing here
    with torch.no_grad():
        compiled = torch.compile(swapped(upstream), backend="eager", fullgraph=True)
        assert_close(compiled(x, mask), upstream(x, mask), rtol=1e-5, atol=1e-5)
