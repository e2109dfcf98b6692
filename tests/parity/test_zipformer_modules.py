# SPDX-License-Identifier: Apache-2.0
"""fastasr's Zipformer classes against the ``zipformer`` package: states, values, gradients, draws."""

import pytest
import torch
from steps import fixed, same_step
from tiny_encoders import swapped
from torch.testing import assert_close

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from zipformer.modules import scaling, subsampling, zipformer

from fastasr import models
from fastasr.models.zipformer import convnext, limit_param_value


def _twins(name, arguments, options):
    home = zipformer if name == "BypassModule" else scaling
    theirs = getattr(home, name)(*arguments, **options)
    ours = getattr(models.zipformer, name)(*arguments, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


ADL = "ActivationDropoutAndLinear"
CASES = {
    "SwooshL": ("SwooshL", (), {}, (7, 3, 12)),
    "SwooshR": ("SwooshR", (), {}, (2, 3, 5, 4)),
    "ADL SwooshL": (ADL, (12, 8), {}, (7, 3, 12)),
    "ADL SwooshR": (ADL, (12, 8), {"activation": "SwooshR"}, (7, 3, 12)),
    "ADL no bias": (ADL, (12, 8), {"bias": False}, (7, 3, 12)),
    "ADL dropout over time": (ADL, (12, 8), {"dropout_p": 0.5, "dropout_shared_dim": 0}, (7, 3, 12)),
    "ADL dropout last": (ADL, (12, 8), {"dropout_p": 0.5}, (7, 3, 12)),
    "ADL dropout full": (ADL, (12, 8), {"dropout_p": 0.5, "dropout_shared_dim": None}, (7, 3, 12)),
    "BiasNorm": ("BiasNorm", (12,), {}, (7, 3, 12)),
    "BiasNorm dim 1": ("BiasNorm", (3,), {"channel_dim": 1}, (7, 3, 12)),
    "BiasNorm dim -2": ("BiasNorm", (3,), {"channel_dim": -2}, (7, 3, 12)),
    "BiasNorm below its limit": ("BiasNorm", (12,), {"log_scale": -2.0}, (7, 3, 12)),
    "BiasNorm above its limit": ("BiasNorm", (12,), {"log_scale": 2.0}, (7, 3, 12)),
    # upstream's default limits are a schedule that reads Python's random
    "Bypass": ("BypassModule", (12,), {"scale_min": 0.0}, (7, 3, 12)),
    "Bypass outside its limits": ("BypassModule", (12,), {"scale_min": 0.6, "scale_max": 0.7}, (7, 3, 12)),
    "Bypass skipping": ("BypassModule", (12,), {"skip_rate": 0.4, "scale_min": 0.2}, (7, 3, 12)),
    "Bypass straight": (
        "BypassModule", (12,), {"skip_rate": 0.2, "straight_through_rate": 0.4, "scale_min": 0.2}, (7, 3, 12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_module(case, training):
    # the terms of a scalar's gradient may cancel: no relative tolerance in float32 holds for every draw
    fixed(0)
    name, arguments, options, shape = CASES[case]
    ours, theirs = _twins(name, arguments, options)
    inputs = [2 * torch.randn(shape) for _ in range(2 if name == "BypassModule" else 1)]
    for seed in range(4):
        same_step(ours.train(training), theirs.train(training), *inputs, tolerance=3e-6, seed=seed)
    inputs = [x.double() for x in inputs]
    same_step(ours.double(), theirs.double(), *inputs, tolerance=1e-12)


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
    with pytest.raises(ValueError, match="min must not exceed max"):
        limit_param_value(torch.ones(2), 1.0, 0.0, prob=1.0)


def test_linear_is_torch_linear():
    ours, theirs = models.zipformer.Linear(12, 8), torch.nn.Linear(12, 8)
    theirs.load_state_dict(ours.state_dict())
    same_step(ours, theirs, torch.randn(7, 3, 12), tolerance=3e-6)


def _convnext():
    upstream = subsampling.ConvNeXt(8)
    with torch.no_grad():
        # upstream starts it at a hundredth, which would hide its errors
        upstream.pointwise_conv2.weight.mul_(50)
    return upstream.eval()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(2, 8, 13, 5), (1, 8, 1, 1), (3, 8, 40, 19), (1, 8, 2, 1), (0, 8, 4, 3)])
def test_convnext_inference(shape, layout, monkeypatch):
    monkeypatch.setattr(convnext, "BLOCK_ROWS", 100)  # several blocks, with a shorter last one
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
        actual = swapped(upstream)(x)
    assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def test_convnext_result_is_laid_out_for_the_projection():
    x = torch.randn(2, 8, 13, 5)
    with torch.no_grad():
        y = swapped(_convnext())(x)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_convnext_block_size_does_not_matter(monkeypatch):
    x = torch.randn(2, 8, 30, 7)
    ours = swapped(_convnext())
    results = []
    for rows in (1, 64, 10**6):
        monkeypatch.setattr(convnext, "BLOCK_ROWS", rows)
        with torch.no_grad():
            results.append(ours(x))
    assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)
    assert_close(results[1], results[2], rtol=1e-5, atol=1e-6)


def test_convnext_bf16_and_autocast():
    upstream = _convnext()
    ours = swapped(upstream)
    x = torch.randn(2, 8, 30, 7)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = upstream(x), ours(x)
        assert_close(actual, expected, rtol=0.05, atol=0.05)
        expected, actual = upstream.bfloat16()(x.bfloat16()), ours.bfloat16()(x.bfloat16())
        assert actual.dtype == torch.bfloat16
        assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_convnext_with_gradients(training):
    """In eval mode with gradients upstream's balancers draw numbers too, and fastasr draws the same."""
    upstream = _convnext().train(training)
    ours = swapped(upstream)
    for seed in range(4):
        same_step(ours, upstream, torch.randn(2, 8, 13, 5), tolerance=1e-4, seed=seed)


def test_convnext_of_a_wrong_shape_raises():
    ours = swapped(_convnext())
    with torch.no_grad(), pytest.raises(ValueError, match="expected shape"):
        ours(torch.randn(2, 5, 13, 5))


def test_streaming_forward_uses_the_swapped_activation():
    """streaming_forward stays upstream's code and agrees, as the submodules it calls do."""
    upstream = _convnext()
    ours = swapped(upstream)
    x, cache = torch.randn(2, 8, 9, 5), torch.randn(2, 8, 3, 5)
    with torch.no_grad():
        expected = upstream.streaming_forward(x, cache)
        assert_close(ours.streaming_forward(x, cache), expected, rtol=1e-5, atol=1e-6)
