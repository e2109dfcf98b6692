# SPDX-License-Identifier: Apache-2.0
"""The swapped Conv2dSubsampling against upstream's: values, lengths, gradients, draws, memory order."""

import copy

import pytest
import torch
from steps import same, same_step, step
from tiny_encoders import by_itself, swapped
from torch.testing import assert_close

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from zipformer.modules import subsampling

from fastasr.models.zipformer import subsampling as front_end


@pytest.fixture
def upstream():
    return subsampling.Conv2dSubsampling(20, 12, 4, 8, 16, dropout=0.5).eval()


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
    ours = swapped(upstream)
    seen = _orders(ours)
    with torch.inference_mode():
        expected, expected_lens = upstream(x, lens)
        actual, actual_lens = ours(x, lens)
    assert seen == ["last"]
    assert torch.equal(actual_lens, expected_lens)
    assert actual_lens.dtype == expected_lens.dtype
    assert actual.is_contiguous()
    assert_close(actual, expected, rtol=1e-5, atol=3e-6)


def test_inference_in_fp64(upstream):
    upstream.double()
    x, lens = _batch()
    with torch.no_grad():
        assert_close(
            swapped(upstream)(x.double(), lens)[0], upstream(x.double(), lens)[0], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("exclude", ["conv.*", "convnext*", "out*", ["conv.*", "convnext*", "out*"]])
def test_parts_of_it_unswapped(upstream, exclude):
    x, lens = _batch()
    with torch.no_grad():
        actual = swapped(upstream, exclude=exclude)(x, lens)[0]
        assert_close(actual, upstream(x, lens)[0], rtol=1e-5, atol=3e-6)


def test_bf16_and_autocast(upstream):
    x, lens = _batch()
    ours = swapped(upstream)
    seen = _orders(ours)
    with torch.no_grad():
        exact = upstream(x, lens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = upstream(x, lens)[0], ours(x, lens)[0]
        assert seen == ["last"]
        assert actual.dtype == expected.dtype
        assert _distance([actual], [exact]) < 1.1 * _distance([expected], [exact])
        expected, actual = upstream.bfloat16()(x.bfloat16(), lens)[0], ours.bfloat16()(x.bfloat16(), lens)[0]
        assert actual.dtype == expected.dtype
        assert _distance([actual], [exact]) < 1.1 * _distance([expected], [exact])


def _distance(tensors, reference):
    return sum((a - b).float().square().sum() for a, b in zip(tensors, reference, strict=True)).sqrt().item()


def test_a_step_under_autocast_is_as_near_to_float32(upstream):
    upstream.train()
    ours, x = swapped(upstream), _batch()
    exact, state = step(copy.deepcopy(upstream), *x)  # a step changes what the next one draws
    with torch.autocast("cpu", torch.bfloat16):
        results = [step(module, *x) for module in (upstream, ours)]
    assert results[0][1] == results[1][1] == state
    theirs, mine = ([named[name] for name in exact] for named, _ in results)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    assert _distance(mine, exact.values()) < 1.25 * _distance(theirs, exact.values())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("seed", range(4))
def test_with_gradients(upstream, training, seed):
    """Values, gradients and draws are upstream's; the convolutions run in channels_last order, hence the rounding."""
    upstream.train(training)
    ours, own_parts = swapped(upstream), by_itself(upstream)
    inputs = _batch()
    seen = _orders(ours)
    expected = step(copy.deepcopy(upstream), *inputs, seed=seed)
    for module in (own_parts, ours):
        same(step(module, *inputs, seed=seed), expected, 1e-4)
    assert seen == ["last"]


@pytest.mark.parametrize("part", ["conv.6", "convnext.pointwise_conv1"])
def test_training_with_a_hook_runs_the_submodules(upstream, part):
    """The hook sees what upstream gives it, and nothing changes."""
    upstream.train()
    ours, shapes = swapped(upstream), []
    seen = _orders(ours)
    ours.get_submodule(part).register_forward_hook(lambda module, args, y: shapes.append(args[0].stride()))
    reference = copy.deepcopy(upstream)
    reference.get_submodule(part).register_forward_hook(
        lambda module, args, y: shapes.append(args[0].stride())
    )
    same_step(ours, reference, *_batch(), tolerance=1e-4, seed=1)
    assert seen == ["first"]
    assert shapes[0] == shapes[1]


def test_hooks_behind_the_convolutions_change_nothing(upstream):
    ours, seen = swapped(upstream), []
    orders = _orders(ours)
    ours.out.register_forward_hook(lambda module, args, y: seen.append(args[0].is_contiguous()))
    with torch.no_grad():
        ours(*_batch())
    assert seen == [True]
    assert orders == ["last"]


def test_a_wrong_length_raises_as_upstream_does(upstream):
    x, lens = _batch()
    for module in (upstream, swapped(upstream)):
        with torch.no_grad(), pytest.raises(AssertionError):
            module(x, lens - 4)


def test_streaming_forward_is_upstreams(upstream):
    ours = swapped(upstream)
    assert "streaming_forward" not in vars(ours)
    x, lens = _batch(2, 45)
    cache = torch.randn(upstream.get_init_states(2).shape)
    with torch.no_grad():
        results = [module.streaming_forward(x, lens, cache) for module in (ours, upstream)]
    assert_close(*results, rtol=1e-5, atol=3e-6)


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
            assert_close(ours.streaming_forward(x, lens, cache), expected, rtol=1e-5, atol=3e-6)
            ours.convnext.activation.register_forward_hook(lambda module, args, y: None)
