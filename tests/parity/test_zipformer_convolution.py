# SPDX-License-Identifier: Apache-2.0
"""The swapped ConvolutionModule against upstream's: values, masks, gradients, draws, memory order."""

import copy
import random
import warnings

import pytest
import torch

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from zipformer.modules.zipformer import ConvolutionModule

import fastasr
from fastasr.models import zipformer as ours_of


@pytest.fixture(autouse=True)
def _plain_upstream(monkeypatch):
    """Upstream's Swoosh functions without torch.compile, and one thread: the shapes are tiny."""
    monkeypatch.setenv("K2_ONNX_EXPORT", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def _module(channels=12, taps=7, causal=False):
    module = ConvolutionModule(channels, taps, causal)
    torch.nn.init.normal_(module.out_proj.weight)
    return module.eval()


@pytest.fixture
def upstream():
    return _module()


def _swapped(module, **options):
    result = copy.deepcopy(module)
    assert fastasr.accelerate(result, **options)[""].status == "replaced"
    return result


def _mask(batch, time):
    """True in the last frames of every sequence but the first, and all over the last of three."""
    lengths = torch.tensor([max(0, time - 3 * i) for i in range(batch)])
    if batch == 3:
        lengths[2] = 0
    return torch.arange(time) >= lengths.unsqueeze(1)


def _orders(module):
    """A list that fills with "as it is" or "moved" per call of the module, without a hook."""
    seen, inner = [], module.depthwise_conv._conv_forward

    def watched(x, weight, bias):
        seen.append("moved")
        return inner(x, weight, bias)

    module.depthwise_conv._conv_forward = watched
    return seen


SHAPES = [(20, 2), (20, 1), (1, 1), (1, 3), (2, 2), (3, 1), (7, 3), (33, 5)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("channels", "taps"), [(12, 7), (1, 3), (19, 1), (16, 31)])
@pytest.mark.parametrize(("time", "batch"), SHAPES)
def test_inference(time, batch, channels, taps, masked):
    upstream = _module(channels, taps)
    x = torch.randn(time, batch, channels)
    mask = _mask(batch, time) if masked else None
    own_parts, ours = _swapped(upstream, only=lambda path, module: path == ""), _swapped(upstream)
    moved = _orders(own_parts)
    with torch.inference_mode():
        expected = upstream(x, src_key_padding_mask=mask)
        same, close = own_parts(x, mask), ours(x, mask)
    assert moved == []
    assert same.shape == expected.shape
    assert same.stride() == expected.stride()
    torch.testing.assert_close(same, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(close, expected, rtol=1e-5, atol=1e-5)


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
            torch.testing.assert_close(_swapped(upstream)(x, each), upstream(x, each), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)


def test_in_proj_with_another_memory_order(upstream):
    class Strided(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(0, 2).contiguous().transpose(0, 2)

    upstream.in_proj.__class__ = Strided
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(_swapped(upstream)(x, mask), upstream(x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(upstream, dtype):
    upstream.to(dtype)
    x, mask = torch.randn(20, 3, 12, dtype=dtype), _mask(3, 20)
    with torch.no_grad():
        expected, actual = upstream(x, mask), _swapped(upstream)(x, mask)
    assert actual.dtype == dtype
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(actual, expected, **tolerance)


def test_autocast(upstream):
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    ours = _swapped(upstream)
    moved = _orders(ours)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = upstream(x, mask), ours(x, mask)
    assert moved == ["moved"]
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_without_a_bias(upstream):
    upstream.depthwise_conv.bias = None
    x = torch.randn(20, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(_swapped(upstream)(x), upstream(x), rtol=1e-5, atol=1e-5)


def test_frozen_weights_need_no_inference_mode(upstream):
    ours = _swapped(upstream.requires_grad_(False))
    moved, x, mask = _orders(ours), torch.randn(20, 3, 12), _mask(3, 20)
    torch.testing.assert_close(ours(x, mask), upstream(x, mask), rtol=1e-5, atol=1e-5)
    assert moved == []


def test_an_empty_batch(upstream):
    x = torch.randn(20, 0, 12)
    with torch.no_grad():
        assert _swapped(upstream)(x).shape == upstream(x).shape


def _step(module, x, mask, seed):
    """Output, gradients of the input and the parameters, and the random states afterwards."""
    random.seed(seed)
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x, src_key_padding_mask=mask)
    loss = y.mul(torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
    loss.backward()
    named = {"loss": loss.detach(), "y": y.detach(), "x": x.grad}
    named |= {name: p.grad for name, p in module.named_parameters()}
    return named, (random.getstate(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("seed", range(4))
def test_with_gradients(upstream, training, seed):
    """The same code runs, so with upstream's projections the gradients are the same to the last bit."""
    for module in upstream.modules():
        if hasattr(module, "batch_count"):
            module.batch_count = 20000.0
    upstream.train(training)
    ours, own_parts = _swapped(upstream), _swapped(upstream, only=lambda path, module: path == "")
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    moved = _orders(ours)
    expected, expected_states = _step(copy.deepcopy(upstream), x, mask, seed)
    for module, tolerance in ((own_parts, 0.0), (ours, 1e-4)):
        named, states = _step(module, x, mask, seed)
        assert states == expected_states
        assert named.keys() == expected.keys()
        for name, value in expected.items():
            error = (named[name] - value).abs().max()
            assert error <= tolerance * value.abs().max().clamp_min(1e-12), name
    assert moved == ["moved"]


@pytest.mark.parametrize("chunk_size", [-1, 4, 7])
def test_causal_modules_keep_their_code(chunk_size):
    """They are declined; and on them our forward is upstream's, chunks included."""
    upstream = _module(causal=True)
    report = fastasr.accelerate(copy.deepcopy(upstream))
    assert report[""].status == "skipped"
    assert report[""].reason == "is causal: its convolution works in chunks"
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    with torch.no_grad():
        expected = upstream(x, mask, chunk_size=chunk_size)
        assert torch.equal(ours_of.ConvolutionModule.forward(upstream, x, mask, chunk_size), expected)


def test_chunks_without_a_causal_module_raise(upstream):
    x = torch.randn(20, 3, 12)
    for module in (upstream, _swapped(upstream)):
        with torch.no_grad(), pytest.raises(AssertionError):
            module(x, chunk_size=4)


@pytest.mark.parametrize("shape", [(3, 19), (2, 20), (4, 20), (20, 3)])
def test_masks_of_another_shape_raise(upstream, shape):
    x, mask = torch.randn(20, 3, 12), torch.zeros(shape, dtype=torch.bool)
    for module in (upstream, _swapped(upstream)):
        with torch.no_grad(), pytest.raises(RuntimeError):
            module(x, mask)


@pytest.mark.parametrize("part", ["activation2", "depthwise_conv", "balancer2", "whiten", "out_proj"])
def test_hooks_see_what_upstream_gives_them(upstream, part):
    ours, seen = _swapped(upstream), []
    for module in (upstream, ours):
        child = module.get_submodule(part)
        child.register_forward_hook(lambda module, args, y: seen.append((args[0].shape, args[0].stride())))
    x = torch.randn(20, 3, 12)
    with torch.no_grad():
        upstream(x)
        ours(x)
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_a_convolution_replaced_after_the_swap(upstream):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    ours, x = _swapped(upstream), torch.randn(20, 3, 12)
    for module in (upstream, ours):
        module.depthwise_conv = Wrapped(module.depthwise_conv)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), upstream(x), rtol=1e-5, atol=1e-5)


def test_compiled(upstream):
    x, mask = torch.randn(20, 3, 12), _mask(3, 20)
    with torch.no_grad():
        compiled = torch.compile(_swapped(upstream), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, mask), upstream(x, mask), rtol=1e-5, atol=1e-5)


def test_state_dict(upstream):
    ours = _swapped(upstream)
    assert list(ours.state_dict()) == list(upstream.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), upstream.parameters(), strict=True))
    ours.load_state_dict(upstream.state_dict(), strict=True)


def test_no_warnings(upstream):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        _swapped(upstream)(torch.randn(20, 3, 12), _mask(3, 20))


def test_streaming_forward_is_upstreams(upstream):
    assert "streaming_forward" not in vars(_swapped(upstream))


@pytest.mark.parametrize("masked", [False, True])
def test_verify(upstream, masked):
    ours = _swapped(upstream)
    inputs = (torch.randn(20, 3, 12), _mask(3, 20)) if masked else (torch.randn(20, 3, 12),)
    assert fastasr.verify(ours, inputs).ok
