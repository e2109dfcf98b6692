# SPDX-License-Identifier: Apache-2.0
"""Behaviour that only hardware can show: offsets beyond 32 bits, graph capture, streams, no host
synchronisation.
"""

from functools import partial

import pytest
import torch
from steps import seeded

import fastasr
from fastasr import ops
from fastasr.benchmarks.device.checks import CHECKS
from fastasr.benchmarks.device.machine import GPU, Skipped, kernels
from fastasr.ops._dispatch import FAMILIES
from fastasr.testing import Make, tables
from fastasr.testing.table import flat, floating

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


SAMPLES = [
    pytest.param(table, sample, id=f"{name}-{sample.name}".replace(" ", "_"))
    for name, table in tables().items()
    if any(
        {"cuda", "triton"} & {i.backend for i in f.implementations}
        for f in FAMILIES.values()
        if name in f.ops
    )
    for sample in table.thorough
    if not sample.arguments(Make()).get("training")  # every call draws another dropout mask
]
on_samples = pytest.mark.parametrize(("table", "sample"), SAMPLES)


def _call(table, sample, dtype=torch.float32, device="cuda"):
    """Returns the call as a function of its floating tensors, and these on the device."""
    arguments = sample.arguments(Make(dtype))
    tensors = floating(arguments)

    rest = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}

    def function(*values):
        return flat(table.function(**rest | dict(zip(tensors, values, strict=True))))

    return function, tuple(t.to(device) for t in tensors.values())


@pytest.mark.parametrize("title", CHECKS)
@pytest.mark.parametrize("op", kernels())
def test_what_the_verdict_checks(op, title):
    machine = GPU()
    try:
        with machine.serving(op):
            CHECKS[title](machine, tables()[op])
    except Skipped as reason:
        pytest.skip(str(reason))


@on_samples
def test_no_wait_for_the_device(table, sample):
    function, tensors = _call(table, sample)
    tensors = tuple(t.requires_grad_() for t in tensors)
    function(*tensors).sum().backward()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(function(*tensors).sum(), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    seeded(0)
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
