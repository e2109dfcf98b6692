# SPDX-License-Identifier: Apache-2.0
"""The swapped Conv2dSubsampling against upstream's: values, lengths, gradients, draws, memory order."""

import copy
import random
import warnings

import pytest
import torch

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from zipformer.modules import subsampling

import fastasr
from fastasr.models.zipformer import subsampling as front_end


@pytest.fixture(autouse=True)
def _plain_upstream(monkeypatch):
    """Runs upstream's Swoosh functions without torch.compile, on one thread, because the shapes are tiny."""
    monkeypatch.setenv("K2_ONNX_EXPORT", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def upstream():
    return subsampling.Conv2dSubsampling(20, 12, 4, 8, 16, dropout=0.5).eval()


def _swapped(module, **options):
    result = copy.deepcopy(module)
    assert fastasr.accelerate(result, **options)[""].status == "replaced"
    return result


def _batch(batch=2, time=45):
    return torch.randn(batch, time, 20), torch.tensor([time] + [time - 9] * (batch - 1))


def _orders(module):
    """Returns a list that fills with "last" or "first" per call of the second convolution, without a hook."""
    seen, inner = [], module.conv[4]._conv_forward

    def watched(x, weight, bias):
        seen.append("last" if x.is_contiguous(memory_format=torch.channels_last) else "first")
        return inner(x, weight, bias)

    module.conv[4]._conv_forward = watched
    return seen


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize(("batch", "time"), [(2, 45), (1, 9), (1, 10), (3, 60)])
def test_inference(upstream, batch, time, layout):
    x, lens = _batch(batch, time)
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        x = torch.randn(batch, time, 40)[..., ::2]
    ours = _swapped(upstream)
    seen = _orders(ours)
    with torch.inference_mode():
        expected, expected_lens = upstream(x, lens)
        actual, actual_lens = ours(x, lens)
    assert seen == ["last"]
    assert torch.equal(actual_lens, expected_lens)
    assert actual_lens.dtype == expected_lens.dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-6)


def test_inference_in_fp64(upstream):
    upstream.double()
    x, lens = _batch()
    with torch.no_grad():
        torch.testing.assert_close(
            _swapped(upstream)(x.double(), lens)[0], upstream(x.double(), lens)[0], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("exclude", ["conv.*", "convnext*", "out*", ["conv.*", "convnext*", "out*"]])
def test_parts_of_it_unswapped(upstream, exclude):
    x, lens = _batch()
    with torch.no_grad():
        actual = _swapped(upstream, exclude=exclude)(x, lens)[0]
        torch.testing.assert_close(actual, upstream(x, lens)[0], rtol=1e-5, atol=3e-6)


def test_bf16_and_autocast(upstream):
    x, lens = _batch()
    ours = _swapped(upstream)
    seen = _orders(ours)
    with torch.no_grad():
        exact = upstream(x, lens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = upstream(x, lens)[0], ours(x, lens)[0]
        assert seen == ["last"]
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
        assert _distance([actual], [exact]) < 1.1 * _distance([expected], [exact])
        expected, actual = upstream.bfloat16()(x.bfloat16(), lens)[0], ours.bfloat16()(x.bfloat16(), lens)[0]
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def _step(module, inputs, seed):
    """Returns output, gradients of the features and the parameters, and the random states afterwards."""
    random.seed(seed)
    torch.manual_seed(seed)
    x, lens = inputs[0].clone().requires_grad_(), inputs[1]
    module.zero_grad()
    y, _ = module(x, lens)
    loss = y.mul(torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
    loss.backward()
    named = {"loss": loss.detach(), "y": y.detach(), "x": x.grad}
    named |= {name: p.grad for name, p in module.named_parameters()}
    return named, (random.getstate(), torch.get_rng_state().tolist())


def _distance(tensors, reference):
    return sum((a - b).float().square().sum() for a, b in zip(tensors, reference, strict=True)).sqrt().item()


def test_a_step_under_autocast_is_as_near_to_float32(upstream):
    upstream.train()
    ours, x = _swapped(upstream), _batch()
    exact, state = _step(upstream, x, 0)
    with torch.autocast("cpu", torch.bfloat16):
        results = [_step(module, x, 0) for module in (upstream, ours)]
    assert results[0][1] == results[1][1] == state
    theirs, mine = ([named[name] for name in exact] for named, _ in results)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    assert _distance(mine, exact.values()) < 1.25 * _distance(theirs, exact.values())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("seed", range(4))
def test_with_gradients(upstream, training, seed):
    """Values, gradients and draws are upstream's; the convolutions run in channels_last order, hence the rounding."""
    upstream.train(training)
    ours, own_parts = _swapped(upstream), _swapped(upstream, only=lambda path, module: path == "")
    inputs = _batch()
    seen = _orders(ours)
    expected, expected_states = _step(copy.deepcopy(upstream), inputs, seed)
    for module in (own_parts, ours):
        named, states = _step(module, inputs, seed)
        assert states == expected_states
        assert named.keys() == expected.keys()
        for name, value in expected.items():
            error = (named[name] - value).abs().max()
            assert error <= 1e-4 * value.abs().max().clamp_min(1e-12), name
    assert seen == ["last"]


@pytest.mark.parametrize("part", ["conv.6", "convnext.pointwise_conv1"])
def test_training_with_a_hook_runs_the_submodules(upstream, part):
    """The hook sees what upstream gives it, and nothing changes."""
    upstream.train()
    ours, shapes = _swapped(upstream), []
    seen = _orders(ours)
    ours.get_submodule(part).register_forward_hook(lambda module, args, y: shapes.append(args[0].stride()))
    reference = copy.deepcopy(upstream)
    reference.get_submodule(part).register_forward_hook(
        lambda module, args, y: shapes.append(args[0].stride())
    )
    inputs = _batch()
    found, states = _step(ours, inputs, 1)
    expected, expected_states = _step(reference, inputs, 1)
    assert seen == ["first"]
    assert states == expected_states
    assert shapes[0] == shapes[1]
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max().clamp_min(1e-12), name


def test_state_dict(upstream):
    ours = _swapped(upstream)
    assert list(ours.state_dict()) == list(upstream.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), upstream.parameters(), strict=True))
    ours.load_state_dict(upstream.state_dict(), strict=True)


@pytest.mark.parametrize("part", ["conv", "conv.1", "conv.7", "convnext", "convnext.out_balancer"])
def test_hooks_see_the_strides_that_upstream_gives_them(upstream, part):
    ours, seen = _swapped(upstream), []
    for module in (upstream, ours):
        child = module.get_submodule(part)
        child.register_forward_hook(lambda module, args, y: seen.append(args[0].stride()))
    with torch.no_grad():
        upstream(*_batch())
        ours(*_batch())
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_hooks_behind_the_convolutions_change_nothing(upstream):
    ours, seen = _swapped(upstream), []
    orders = _orders(ours)
    ours.out.register_forward_hook(lambda module, args, y: seen.append(args[0].is_contiguous()))
    with torch.no_grad():
        ours(*_batch())
    assert seen == [True]
    assert orders == ["last"]


def test_convolutions_replaced_after_the_swap(upstream):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    x, lens = _batch()
    ours = _swapped(upstream)
    ours.conv = Wrapped(ours.conv)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, lens)[0], upstream(x, lens)[0], rtol=1e-5, atol=3e-6)


def test_a_wrong_length_raises_as_upstream_does(upstream):
    x, lens = _batch()
    for module in (upstream, _swapped(upstream)):
        with torch.no_grad(), pytest.raises(AssertionError):
            module(x, lens - 4)


def test_no_warnings(upstream):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        _swapped(upstream)(*_batch())


def test_streaming_forward_is_upstreams(upstream):
    ours = _swapped(upstream)
    assert "streaming_forward" not in vars(ours)
    x, lens = _batch(2, 45)
    cache = torch.randn(upstream.get_init_states(2).shape)
    with torch.no_grad():
        results = [module.streaming_forward(x, lens, cache) for module in (ours, upstream)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_our_streaming_forward(upstream, gradients):
    """fastasr's class runs with upstream's parameters: with rows of channels, and by the submodules where one is
    hooked.
    """
    ours = front_end.Conv2dSubsampling(20, 12, 4, 8, 16, dropout=0.5).eval()
    ours.load_state_dict(upstream.state_dict())
    x, lens = _batch(2, 45)
    cache = torch.randn(upstream.get_init_states(2).shape)
    with torch.set_grad_enabled(gradients):
        expected = upstream.streaming_forward(x, lens, cache)
        for _ in range(2):
            for a, b in zip(ours.streaming_forward(x, lens, cache), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6)
            ours.convnext.activation.register_forward_hook(lambda module, args, y: None)


def test_verify(upstream):
    ours = _swapped(upstream)
    assert fastasr.verify(ours, _batch()).ok
    assert front_end.Conv2dSubsampling.forward is not type(ours).forward
