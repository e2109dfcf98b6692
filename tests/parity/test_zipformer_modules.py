# SPDX-License-Identifier: Apache-2.0
"""fastasr's Zipformer classes against the ``zipformer`` package: states, values, gradients, draws."""

import random

import pytest
import torch

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from zipformer.modules import scaling, subsampling, zipformer

import fastasr
from fastasr import models
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


def _step(module, inputs, seed):
    """Returns output, gradients of inputs and parameters, and the random states afterwards."""
    random.seed(seed)
    torch.manual_seed(seed)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    y = module(*inputs)
    y.mul(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = [x.grad for x in inputs] + [p.grad for p in module.parameters()]
    return y.detach(), gradients, (random.getstate(), torch.get_rng_state().tolist())


def _compare(ours, theirs, inputs, tolerance, seed=0):
    y, gradients, states = _step(ours, inputs, seed)
    expected, expected_gradients, expected_states = _step(theirs, inputs, seed)
    assert states == expected_states
    for a, b in zip([y, *gradients], [expected, *expected_gradients], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)


def _twins(name, arguments, options):
    home = zipformer if name == "BypassModule" else scaling
    theirs = getattr(home, name)(*arguments, **options)
    ours = getattr(models.zipformer, name)(*arguments, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


CASES = {
    "SwooshL": ("SwooshL", (), {}, [(7, 3, 12)]),
    "SwooshR": ("SwooshR", (), {}, [(2, 3, 5, 4)]),
    "ADL SwooshL": ("ActivationDropoutAndLinear", (12, 8), {}, [(7, 3, 12)]),
    "ADL SwooshR": ("ActivationDropoutAndLinear", (12, 8), {"activation": "SwooshR"}, [(7, 3, 12)]),
    "ADL no bias": ("ActivationDropoutAndLinear", (12, 8), {"bias": False}, [(7, 3, 12)]),
    "ADL dropout over time": (
        "ActivationDropoutAndLinear",
        (12, 8),
        {"dropout_p": 0.5, "dropout_shared_dim": 0},
        [(7, 3, 12)],
    ),
    "ADL dropout last": ("ActivationDropoutAndLinear", (12, 8), {"dropout_p": 0.5}, [(7, 3, 12)]),
    "ADL dropout full": (
        "ActivationDropoutAndLinear",
        (12, 8),
        {"dropout_p": 0.5, "dropout_shared_dim": None},
        [(7, 3, 12)],
    ),
    "BiasNorm": ("BiasNorm", (12,), {}, [(7, 3, 12)]),
    "BiasNorm dim 1": ("BiasNorm", (3,), {"channel_dim": 1}, [(7, 3, 12)]),
    "BiasNorm dim -2": ("BiasNorm", (3,), {"channel_dim": -2}, [(7, 3, 12)]),
    "BiasNorm below its limit": ("BiasNorm", (12,), {"log_scale": -2.0}, [(7, 3, 12)]),
    "BiasNorm above its limit": ("BiasNorm", (12,), {"log_scale": 2.0}, [(7, 3, 12)]),
    "Bypass": ("BypassModule", (12,), {}, [(7, 3, 12), (7, 3, 12)]),
    "Bypass outside its limits": (
        "BypassModule",
        (12,),
        {"scale_min": 0.6, "scale_max": 0.7},
        [(7, 3, 12)] * 2,
    ),
    "Bypass skipping": ("BypassModule", (12,), {"skip_rate": 0.4, "scale_min": 0.2}, [(7, 3, 12)] * 2),
    "Bypass straight": (
        "BypassModule",
        (12,),
        {"skip_rate": 0.2, "straight_through_rate": 0.4, "scale_min": 0.2},
        [(7, 3, 12)] * 2,
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_module(case, training):
    name, arguments, options, shapes = CASES[case]
    if name == "BypassModule":  # upstream's default limits are a schedule that reads Python's random
        options = {"scale_min": 0.0, **options}
    ours, theirs = _twins(name, arguments, options)
    inputs = [2 * torch.randn(shape) for shape in shapes]
    for seed in range(4):
        _compare(ours.train(training), theirs.train(training), inputs, 3e-6, seed)
    inputs = [x.double() for x in inputs]
    _compare(ours.double(), theirs.double(), inputs, 1e-12)


def test_defaults_of_our_constructors():
    assert models.zipformer.BypassModule(4).bypass_scale.tolist() == [0.5] * 4
    norm = models.zipformer.BiasNorm(1000)
    assert norm.log_scale.item() == 1.0
    assert 0 < norm.bias.abs().max() < 1e-3
    fused = models.zipformer.ActivationDropoutAndLinear(100, 50, initial_scale=0.1)
    assert fused.weight.abs().max() <= 0.01
    assert fused.bias.abs().max() <= 0.01
    with pytest.raises(ValueError, match="activation must be 'SwooshL' or 'SwooshR', got 'ReLU'"):
        models.zipformer.ActivationDropoutAndLinear(4, 4, activation="ReLU")


def test_limits_that_exclude_every_value():
    from fastasr.models.zipformer import limit_param_value

    with pytest.raises(ValueError, match="min must not exceed max"):
        limit_param_value(torch.ones(2), 1.0, 0.0, prob=1.0)


def test_linear_is_torch_linear():
    ours, theirs = models.zipformer.Linear(12, 8), torch.nn.Linear(12, 8)
    theirs.load_state_dict(ours.state_dict())
    _compare(ours, theirs, [torch.randn(7, 3, 12)], 3e-6)


def _convnext(channels=8):
    upstream = subsampling.ConvNeXt(channels)
    with torch.no_grad():
        upstream.pointwise_conv2.weight.mul_(
            50
        )  # upstream starts it at a hundredth, which would hide its errors
    return upstream.eval()


def _swapped(module):
    import copy

    result = copy.deepcopy(module)
    report = fastasr.accelerate(result)
    assert report[""].status == "replaced"
    return result


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(2, 8, 13, 5), (1, 8, 1, 1), (3, 8, 40, 19), (1, 8, 2, 1), (0, 8, 4, 3)])
def test_convnext_inference(shape, layout, monkeypatch):
    monkeypatch.setattr(front_end, "BLOCK_ROWS", 100)  # several blocks, with a shorter last one
    upstream = _convnext()
    x = torch.randn(shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "sliced":
        x = torch.randn(shape[0], shape[1], shape[2], 2 * shape[3])[..., ::2]
    with torch.inference_mode():
        expected = upstream(x)
        actual = _swapped(upstream)(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def test_convnext_result_is_laid_out_for_the_projection():
    x = torch.randn(2, 8, 13, 5)
    with torch.no_grad():
        y = _swapped(_convnext())(x)
    flat = y.transpose(1, 2).reshape(2, 13, 40)
    assert flat.data_ptr() == y.data_ptr()


def test_convnext_block_size_does_not_matter(monkeypatch):
    x = torch.randn(2, 8, 30, 7)
    ours = _swapped(_convnext())
    results = []
    for rows in (1, 64, 10**6):
        monkeypatch.setattr(front_end, "BLOCK_ROWS", rows)
        with torch.no_grad():
            results.append(ours(x))
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], results[2], rtol=1e-5, atol=1e-6)


def test_convnext_bf16_and_autocast():
    upstream = _convnext()
    ours = _swapped(upstream)
    x = torch.randn(2, 8, 30, 7)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = upstream(x), ours(x)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
        expected, actual = upstream.bfloat16()(x.bfloat16()), ours.bfloat16()(x.bfloat16())
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_convnext_with_gradients(training):
    """In eval mode with gradients upstream's balancers draw numbers too, and fastasr draws the same."""
    upstream = _convnext().train(training)
    ours = _swapped(upstream)
    for seed in range(4):
        _compare(ours, upstream, [torch.randn(2, 8, 13, 5)], 1e-4, seed)


def test_convnext_honours_hooks_on_its_parts():
    ours = _swapped(_convnext())
    seen = []
    ours.activation.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        ours(torch.randn(1, 8, 4, 3))
    assert seen


def test_convnext_of_a_wrong_shape_raises():
    ours = _swapped(_convnext())
    with torch.no_grad(), pytest.raises(ValueError, match="expected shape"):
        ours(torch.randn(2, 5, 13, 5))


def test_streaming_forward_uses_the_swapped_activation():
    """streaming_forward stays upstream's code and agrees, as the submodules it calls do."""
    upstream = _convnext()
    ours = _swapped(upstream)
    x, cache = torch.randn(2, 8, 9, 5), torch.randn(2, 8, 3, 5)
    with torch.no_grad():
        for a, b in zip(ours.streaming_forward(x, cache), upstream.streaming_forward(x, cache), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
