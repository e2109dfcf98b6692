# SPDX-License-Identifier: Apache-2.0
"""Convolutions as matrix products: values and gradients against float64, the frames that they do not see, their bits,
and the choice between them and torch's."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastasr
from fastasr.models.common import convolutions
from fastasr.ops import _conv2d, _gemm

pytestmark = pytest.mark.skipif(bool(_gemm.why_not()), reason=str(_gemm.why_not()))

# kernel, stride, padding
SHAPES = [
    ((3, 3), (2, 2), (0, 0)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 3), (1, 1), (0, 0)),
    ((3, 3), (1, 2), (0, 1)),
    ((5, 5), (3, 3), (0, 0)),
    ((2, 4), (3, 1), (1, 2)),
    ((1, 1), (2, 3), (0, 0)),
]
SIZES = [(1, 9, 11), (2, 12, 10), (3, 8, 13)]  # batch, frames, frequencies


def operands(kernel, size, channels=24, outputs=16, dtype=torch.float32):
    torch.manual_seed(1)
    batch, *maps = size
    x = torch.randn(batch, channels, *maps, dtype=torch.float32)
    weight = (
        torch.randn(outputs, channels, *kernel, dtype=torch.float32)
        / (channels * kernel[0] * kernel[1]) ** 0.5
    )
    bias = torch.randn(outputs, dtype=torch.float32)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def results(f, given, grad=None):
    y = f(*given)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    return [y.detach(), *torch.autograd.grad(y, given, grad.to(y.dtype))]


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("shape", "size"), itertools.product(SHAPES, SIZES))
@pytest.mark.parametrize("relu", [True, False])
def test_values_and_gradients(shape, size, relu):
    kernel, stride, padding = shape

    def formula(x, weight, bias):
        return F.conv2d(x.relu() if relu else x, weight, bias, stride, padding)

    exact = results(formula, operands(kernel, size, dtype=torch.float64))
    theirs = results(formula, operands(kernel, size))
    ours = results(lambda *given: _conv2d.convolution(*given, stride, padding, relu), operands(kernel, size))
    assert ours[0].is_contiguous(memory_format=torch.channels_last) or 1 in ours[0].shape
    for name, found, eager, right in zip(("y", "x", "weight", "bias"), ours, theirs, exact, strict=True):
        assert error(found, right) <= 1.1 * error(eager, right) + 1e-7, name


def test_sums_over_many_channels_are_as_exact_as_torchs():
    """Beside torch's sums of maps with channels first. With channels last torch's are three times less exact."""
    given = operands((3, 3), (2, 21, 20), channels=512, outputs=64)
    exact = results(lambda *g: F.conv2d(*g, 2, 1), [t.detach().double().requires_grad_() for t in given])
    theirs = results(lambda *g: F.conv2d(*g, 2, 1), given)
    ours = results(lambda *g: _conv2d.convolution(*g, (2, 2), (1, 1), False), given)
    for name, found, eager, right in zip(("y", "x", "weight", "bias"), ours, theirs, exact, strict=True):
        assert error(found, right) <= 1.1 * error(eager, right), name


def test_frames_that_no_output_sees_do_not_matter():
    x, weight, bias = operands((3, 3), (2, 10, 12))  # outputs see 9 frames of 11 frequencies
    with torch.no_grad():
        x[:, :, 9:] = float("nan")
        x[:, :, :, 11:] = float("inf")
    found = results(lambda *g: _conv2d.convolution(*g, (2, 2), (0, 0), True), [x, weight, bias])
    assert all(t.isfinite().all() for t in found)
    assert not found[1][:, :, 9:].any()
    assert not found[1][:, :, :, 11:].any()


def test_a_wrong_number_of_channels_gets_torchs_error(monkeypatch):
    monkeypatch.setenv("FASTASR_GEMM", "native")
    monkeypatch.setattr(_gemm, "_choices", {})
    conv = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, 2), torch.nn.ReLU())
    convolutions.in_sequence(conv, torch.randn(2, 64, 33, 20, dtype=torch.float32))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 64 channels"):
        convolutions.in_sequence(conv, torch.randn(2, 48, 33, 20, dtype=torch.float32))


def test_the_result_can_be_changed_in_place():
    given = operands((3, 3), (2, 10, 12))
    y = _conv2d.convolution(*given, (2, 2), (0, 0), True)
    found = torch.autograd.grad(y.mul_(2.0).sum(), given)
    right = torch.autograd.grad(F.conv2d(given[0].relu(), *given[1:], 2).mul(2.0).sum(), given)
    torch.testing.assert_close(found, right)


def test_the_other_recordings_of_a_batch_change_no_bit():
    x, weight, bias = (t.detach() for t in operands((3, 3), (3, 33, 20), channels=64))
    together = _conv2d.convolution(x, weight, bias, (2, 2), (1, 1), True)
    for i in range(3):
        alone = _conv2d.convolution(x[i : i + 1], weight, bias, (2, 2), (1, 1), True)
        assert torch.equal(together[i : i + 1], alone)


def test_the_choice_is_measured_in_training_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTASR_GEMM", "auto")
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    _gemm.forget()
    x, weight, bias = operands((3, 3), (2, 33, 20))
    assert _conv2d.is_faster(x, weight, bias, (2, 2), (0, 0)) in (True, False)
    assert [name for name in _gemm._read(_gemm.cache_file()) if name.startswith("conv2d")]
    _gemm.forget()


@pytest.mark.parametrize("policy", ["native", "torch"])
def test_a_front_end_runs_what_is_faster(monkeypatch, policy):
    monkeypatch.setenv("FASTASR_GEMM", policy)
    monkeypatch.setattr(_gemm, "_choices", {})
    calls = []
    convolution = _conv2d.convolution
    monkeypatch.setattr(_conv2d, "convolution", lambda *given: calls.append(given[-1]) or convolution(*given))
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(1, 64, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, 2), torch.nn.ReLU()
    )
    x = torch.randn(2, 1, 99, 40, dtype=torch.float32)
    torch.testing.assert_close(convolutions.in_sequence(conv, x), conv(x), rtol=1e-5, atol=1e-6)
    assert calls == ([True] if policy == "native" else [])
    calls.clear()
    with torch.no_grad():
        for there in (conv[2], conv[1]):  # hooks see what upstream computes
            seen = []
            handle = there.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
            convolutions.in_sequence(conv, x)
            assert len(seen) == 1
            handle.remove()
    with fastasr.backend("eager"):  # which serves gradients of gradients
        convolutions.in_sequence(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolutions.in_sequence(conv, x).dtype is torch.bfloat16
    assert calls == []


@pytest.mark.parametrize(("shape", "size"), itertools.product(SHAPES, SIZES))
def test_maps_of_one_channel(monkeypatch, shape, size):
    monkeypatch.setenv("FASTASR_GEMM", "native")
    monkeypatch.setattr(_gemm, "_choices", {})
    monkeypatch.setattr(_gemm, "SMALL", 0)
    conv = torch.nn.Conv2d(1, 32, *shape, dtype=torch.float32)
    x = torch.randn(size[0], 1, *size[1:], dtype=torch.float32, requires_grad=True)
    right = copy.deepcopy(conv).double()
    given = [x, conv.weight, conv.bias]
    exact = results(lambda x, *_: right(x), [x.detach().double().requires_grad_(), right.weight, right.bias])
    theirs = results(lambda x, *_: conv(x), given)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", None)  # nothing but a product serves
    ours = results(lambda x, *_: convolutions.convolved([conv], x), given)
    assert ours[0].is_contiguous(memory_format=torch.channels_last) or 1 in ours[0].shape
    for of, found, eager, float64 in zip(("y", "x", "weight", "bias"), ours, theirs, exact, strict=True):
        assert error(found, float64) <= 1.1 * error(eager, float64) + 1e-7, of
