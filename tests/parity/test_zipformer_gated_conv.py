# SPDX-License-Identifier: Apache-2.0
"""gated_depthwise_conv against upstream's ConvolutionModule, reduced to what lies between its two projections."""

import pytest
import torch

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from zipformer.modules.zipformer import ConvolutionModule

from fastasr import ops
from fastasr.ops import _swoosh

BOUND = {torch.float32: 2e-6, torch.float64: 1e-13}


class _SwooshR(torch.nn.Module):
    def forward(self, x):
        return _swoosh.definition(x, "SwooshR")


def _upstream(channels, taps, causal, dtype=torch.float32):
    module = ConvolutionModule(channels, taps, causal).eval()
    module.in_proj, module.out_proj = torch.nn.Identity(), _SwooshR()
    # these change gradients at random, in eval mode too
    module.balancer1 = module.balancer2 = module.whiten = torch.nn.Identity()
    if causal:
        torch.nn.init.normal_(module.depthwise_conv.chunkwise_conv_scale, std=0.3)
    return module.to(dtype)


def _parameters(module):
    conv = module.depthwise_conv
    if not module.causal:
        return conv.weight, conv.bias
    inner, causal = conv.chunkwise_conv, conv.causal_conv
    return inner.weight, inner.bias, causal.weight, causal.bias, conv.chunkwise_conv_scale


def _inputs(frames, batch, channels, dtype=torch.float32):
    h = torch.randn(frames, batch, 2 * channels, dtype=dtype)
    lengths = torch.tensor([max(0, frames - 5 * b) for b in range(batch)])
    return h, torch.arange(frames) >= lengths.unsqueeze(1)


def _same(actual, expected, what):
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= BOUND[actual.dtype], f"{what}: {error:.2e}"


def _agree(module, h, mask, dtype, **options):
    """Asserts that values and every gradient agree."""
    theirs, ours = h.clone().requires_grad_(), h.clone().requires_grad_()
    parameters = _parameters(module)
    expected = module(theirs, mask, **options)
    y = ops.gated_depthwise_conv(ours, *parameters, padding_mask=mask, **options)
    _same(y, expected, "y")
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (theirs, *parameters), grad)
    found = torch.autograd.grad(y, (ours, *parameters), grad)
    for name, a, e in zip(("h", "weight", "bias", "v", "v bias", "scale"), found, wanted, strict=False):
        _same(a, e, name)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("frames", "taps"), [(50, 31), (80, 15), (6, 31), (1, 7)])
def test_plain(frames, taps, dtype):
    module = _upstream(20, taps, False, dtype)
    h, mask = _inputs(frames, 3, 20, dtype)
    _agree(module, h, mask, dtype)
    _agree(module, h, None, dtype)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("chunk", [-1, 1, 2, 4, 7, 16, 37, 40, 100])
@pytest.mark.parametrize("taps", [7, 31])
def test_chunk_causal(chunk, taps, dtype):
    module = _upstream(18, taps, True, dtype)
    h, mask = _inputs(37, 3, 18, dtype)
    _agree(module, h, mask, dtype, chunk_size=chunk)


@pytest.mark.parametrize("chunk", [2, 4, 16])
@pytest.mark.parametrize("taps", [1, 15, 31])
def test_streaming_step_by_step(chunk, taps):
    """Each step and its cache are upstream's, and together they are the chunked whole."""
    module = _upstream(18, taps, True)
    h, mask = _inputs(48, 2, 18)
    parameters = _parameters(module)
    cache = theirs = torch.zeros(2, 18, taps // 2)
    pieces = []
    with torch.no_grad():
        for start in range(0, 48, chunk):
            part, padding = h[start : start + chunk], mask[:, start : start + chunk]
            if taps > 1:  # upstream's cache of no frames keeps them all
                expected, theirs = module.streaming_forward(part, theirs, padding)
            y, cache = ops.gated_depthwise_conv(
                part, *parameters, padding_mask=padding, cache=cache, return_cache=True
            )
            if taps > 1:
                _same(y, expected, f"y at {start}")
                _same(cache, theirs, f"cache after {start}")
            pieces.append(y)
        whole = ops.gated_depthwise_conv(h, *parameters, padding_mask=mask, chunk_size=chunk)
    _same(torch.cat(pieces), whole, "the whole")


def test_gradients_through_the_cache():
    """Two steps differentiated together give the gradients of the whole; the cache passes them on."""
    module = _upstream(8, 7, True, torch.float64)
    h, _ = _inputs(9, 2, 8, torch.float64)
    parameters = _parameters(module)

    def steps(compiled):
        call = (
            torch.compile(ops.gated_depthwise_conv, backend="aot_eager")
            if compiled
            else ops.gated_depthwise_conv
        )
        x = h.clone().requires_grad_()
        first, cache = call(x[:2], *parameters, return_cache=True)  # shorter than the cache
        second, cache = call(x[2:], *parameters, cache=cache, return_cache=True)
        return x, torch.cat([first, second]), cache

    def reference():
        x = h.clone().requires_grad_()
        cache = torch.zeros(2, 8, 3, dtype=torch.float64)
        first, cache = module.streaming_forward(x[:2], cache, None)
        second, cache = module.streaming_forward(x[2:], cache, None)
        return x, torch.cat([first, second]), cache

    weights = torch.randn(9, 2, 8, dtype=torch.float64), torch.randn(2, 8, 3, dtype=torch.float64)
    found = []
    for x, y, cache in (reference(), steps(False), steps(True)):
        loss = (y * weights[0]).sum() + (cache * weights[1]).sum()
        found.append(torch.autograd.grad(loss, (x, *parameters)))
    for other in found[1:]:
        for a, e in zip(other, found[0], strict=True):
            _same(a, e, "gradient")


def test_registered_op_with_cache():
    module = _upstream(6, 5, True)
    h, mask = _inputs(4, 2, 6)
    arguments = (h, *_parameters(module), mask, torch.randn(2, 6, 2), None, -1, "swoosh_r", True)
    torch.library.opcheck(torch.ops.fastasr.gated_depthwise_conv.default, arguments)


def test_strided_slices_are_read_where_they_lie():
    """h may be a slice of a wider projection, and frames or sequences of a longer one."""
    module = _upstream(16, 7, False)
    wide = torch.randn(60, 5, 100)
    h = wide[3:50:2, 1:4, 30:62]
    expected = ops.gated_depthwise_conv(h.contiguous(), *_parameters(module))
    assert torch.equal(ops.gated_depthwise_conv(h, *_parameters(module)), expected)
