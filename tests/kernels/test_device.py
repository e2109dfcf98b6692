# SPDX-License-Identifier: Apache-2.0
"""Behaviour that only hardware can show: offsets beyond 32 bits, graph capture, streams, no host
synchronisation.
"""

from functools import partial

import pytest
import torch

import fastasr
from fastasr import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _calls(dtype=torch.float32):
    """Yields (name, function, tensors) for every op with a GPU kernel."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    x, other, bias = make(60, 4, 192), make(60, 4, 192), make(192)
    return [
        ("swoosh_l", ops.swoosh_l, (x,)),
        ("swoosh_r", ops.swoosh_r, (x,)),
        ("bias_norm", ops.bias_norm, (x, bias, make(()))),
        ("bypass", ops.bypass, (other, x, bias)),
        ("bypass per sequence", ops.bypass, (other, x, make(4, 192))),
        ("swoosh_linear", ops.swoosh_linear, (x, make(32, 192), make(32))),
        ("ema_scan", partial(ops.ema_scan, activation="silu"), (x, *(make(192, 4) for _ in range(4)), bias)),
        ("ema_scan, one step", ops.ema_scan, (x[:1], *(make(192, 4) for _ in range(4)), bias)),
        (
            "complex_ema_scan",
            partial(ops.complex_ema_scan, activation="silu"),
            (x, make(192, 4), make(192, 4), make(192), make(192, 4, 2), bias),
        ),
        (
            "gated_residual_norm",
            ops.gated_residual_norm,
            (other, x, make(60, 4, 192), x * 2, bias, make(192)),
        ),
        ("residual_norm", ops.residual_norm, (other, x, bias, make(192))),
        (
            "depthwise_conv2d",
            partial(ops.depthwise_conv2d, padding=(3, 3)),
            (make(2, 60, 19, 64), make(64, 1, 7, 7), make(64)),
        ),
        (
            "depthwise_conv_residual",
            ops.depthwise_conv_residual,
            (make(2, 60, 64), make(64, 1, 3), make(64)),
        ),
        ("linear_activation", ops.linear_activation, (make(60, 4, 64), make(96, 64), make(96))),
        ("gated_depthwise_conv", ops.gated_depthwise_conv, (x, make(96, 1, 7), make(96))),
        (
            "gated_depthwise_conv, chunks",
            partial(ops.gated_depthwise_conv, chunk_size=16),
            (x, make(96, 1, 7), make(96), make(96, 1, 4), make(96), make(2, 96, 7)),
        ),
        (
            "conv_spatial_gate",
            partial(ops.conv_spatial_gate, activation="silu"),
            (x, make(96), make(96), make(96, 1, 7), make(96)),
        ),
        (
            "layer_norm_lstm",
            lambda *tensors: ops.layer_norm_lstm(*tensors)[0],
            (x, make(384, 192), make(384, 96), make(384), make(384), bias[:96], make(96)),
        ),
        (
            "toeplitz_attention",
            ops.toeplitz_attention,
            (make(60, 4, 64), x, other, make(2, 64), make(2, 64), make(119)),
        ),
        (
            "zipformer_attention_weights",
            lambda x, pos: ops.zipformer_attention_weights(x, pos, 3, 8, chunk_size=16),
            (make(60, 2, 60), make(1, 119, 12)),
        ),
        (
            "zipformer_attention",
            lambda x, pos, value: ops.zipformer_attention(x, pos, value, 3, 8, chunk_size=16),
            (make(60, 2, 60), make(1, 119, 12), make(60, 2, 15)),
        ),
        (
            "rel_attention",
            ops.rel_attention,
            (*[make(2, 60, 3, 16) for _ in range(3)], make(119, 3, 16), make(3, 16), make(3, 16)),
        ),
        (
            "segment_attention",
            lambda *tensors: ops.segment_attention(
                *tensors,
                num_heads=3,
                frames=60,
                segment_length=16,
                left_context_length=30,
                right_context_length=4,
            ),
            (make(76, 2, 48), make(76, 2, 48), make(76, 2, 48)),
        ),
        ("rnnt_joiner", _joiner, (make(2, 30, 192), make(2, 9, 192), make(70, 192), make(70))),
        ("rnnt_lattice", ops.rnnt_lattice, (make(4, 20, 61), make(4, 21, 60))),
        ("rnnt_pruned_lattice", _pruned_lattice, (make(4, 60, 5), make(4, 60, 5))),
    ]


def _pruned_lattice(*tensors: torch.Tensor) -> torch.Tensor:
    starts = (torch.arange(60, device="cuda") // 4).expand(4, 60)
    return ops.rnnt_pruned_lattice(*tensors, starts)


def _joiner(*tensors: torch.Tensor) -> torch.Tensor:
    symbols = torch.ones(2, 8, dtype=torch.int64, device="cuda")
    starts = torch.zeros(2, 30, dtype=torch.int64, device="cuda")
    return torch.stack(ops.rnnt_joiner(*tensors, symbols, starts, s_range=5, termination_symbol=0))


@pytest.mark.parametrize("index", range(26))
def test_capture_in_a_graph(index):
    name, function, tensors = _calls()[index]
    tensors = tuple(t.requires_grad_() for t in tensors)

    def step():
        y = function(*tensors)
        return (y, *torch.autograd.grad(y.sum(), tensors))

    expected = [t.clone() for t in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("index", range(26))
def test_no_wait_for_the_device(index):
    _, function, tensors = _calls()[index]
    tensors = tuple(t.requires_grad_() for t in tensors)
    function(*tensors).sum().backward()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(function(*tensors).sum(), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("index", range(26))
def test_on_a_stream_of_its_own(index):
    name, function, tensors = _calls(torch.bfloat16)[index]
    expected = function(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        delayed = tensors[0] + 0
        y = function(delayed, *tensors[1:])
    stream.synchronize()
    assert torch.equal(y, expected), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("index", range(26))
def test_on_the_tensors_device(index):
    name, function, tensors = _calls()[index]
    y = function(*(t.to("cuda:1") for t in tensors))
    assert y.device == torch.device("cuda:1")
    torch.testing.assert_close(y.cpu(), function(*tensors).cpu(), msg=name)


@pytest.mark.parametrize("op", ["swoosh_l", "bias_norm", "bypass"])
def test_offsets_beyond_32_bits(op):
    """The last rows of a tensor of more than 2^31 elements are those of the same rows alone."""
    rows, channels = 2**31 // 256 + 9, 256
    if torch.cuda.mem_get_info()[0] < 6 * rows * channels * 2:
        pytest.skip("needs 26 GB of free device memory")
    x = torch.empty(rows, channels, device="cuda", dtype=torch.bfloat16).normal_()
    scale = torch.rand(channels, device="cuda", dtype=torch.bfloat16)
    calls = {
        "swoosh_l": lambda t: ops.swoosh_l(t),
        "bias_norm": lambda t: ops.bias_norm(t, scale, scale[0]),
        "bypass": lambda t: ops.bypass(t, t, scale),
    }
    tail = x[-16:].clone()
    y = calls[op](x)
    assert torch.equal(y[-16:], calls[op](tail))
    assert torch.equal(y[:16], calls[op](x[:16].clone()))


def test_ema_scan_offsets_beyond_32_bits():
    """The last sequences of a batch of more than 2^31 elements are those of the same sequences alone."""
    length, channels = 16, 256
    batch = 2**31 // (length * channels) + 9
    if torch.cuda.mem_get_info()[0] < 6 * batch * length * channels * 2:
        pytest.skip("needs 26 GB of free device memory")
    x = torch.empty(batch, length, channels, device="cuda", dtype=torch.bfloat16).normal_()
    parameters = [torch.randn(channels, 4, device="cuda") for _ in range(4)]
    call = partial(ops.ema_scan, layout="BLD")
    y = call(x, *parameters)
    assert torch.equal(y[-4:], call(x[-4:].clone(), *parameters))
    assert torch.equal(y[:4], call(x[:4].clone(), *parameters))


@pytest.mark.parametrize("layout", ["LBD", "BDL"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("shape", [(2048, 4, 512), (2048, 16, 512), (2**17, 1, 40)])
def test_ema_scan_in_one_segment_and_in_several(shape, direction, layout):
    """Both ways to cut the work give values and gradients that repeat to the bit."""
    channels = shape[2]
    rows = channels * (2 if direction == "bidirectional" else 1)
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda")
    x = (x.permute(1, 2, 0).contiguous() if layout == "BDL" else x).requires_grad_()
    parameters = [torch.randn(rows, 4, device="cuda", requires_grad=True) for _ in range(4)]
    residual = torch.randn(channels, device="cuda", requires_grad=True)
    inputs = (x, *parameters, residual)
    options = {"direction": direction, "layout": layout, "activation": "silu"}

    def run(f, inputs):
        y = f(*inputs, **options)
        return (y, *torch.autograd.grad(y.square().sum(), inputs))

    with fastasr.backend("cuda"):
        first, second = run(ops.ema_scan, inputs), run(ops.ema_scan, inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    reference = run(ops.ema_scan.definition, wide)
    for a, b, r in zip(first, second, reference, strict=True):
        assert torch.equal(a, b)
        assert (a - r).abs().max() <= 1e-5 * r.abs().max()


def test_ragged_lengths_reuse_the_compiled_kernels():
    """A new length compiles nothing: there are at most a handful of variants per kernel, whatever the
    lengths.
    """
    from fastasr.kernels import bias_norm, bypass, swoosh

    kernels = (swoosh.forward_flat, bias_norm.forward_kernel, bypass.forward_kernel)

    def run(frames):
        x, scale = torch.randn(frames, 3, 192, device="cuda"), torch.rand(192, device="cuda")
        ops.swoosh_l(x), ops.bias_norm(x, scale, scale[0]), ops.bypass(x, x, scale)

    for frames in (1, 2, 17):
        run(frames)
    before = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    for frames in range(18, 60):
        run(frames)
    assert [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels] == before
