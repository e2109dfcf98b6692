# SPDX-License-Identifier: Apache-2.0
"""Convolutions over time as matrix products: values and gradients against float64, their bits, the memory that they
read, and the choice between them and torch's."""

import pytest
import torch
import torch.nn.functional as F

import fastasr
from fastasr.models.common import convolutions
from fastasr.ops import _conv1d, _gemm

pytestmark = pytest.mark.skipif(bool(_gemm.why_not()), reason=str(_gemm.why_not()))

# channels, outputs, taps, stride, padding, groups
SHAPES = [
    (1, 16, 10, 5, 0, 1),
    (24, 16, 3, 2, 0, 1),
    (24, 16, 2, 2, 0, 1),
    (24, 16, 3, 1, 1, 1),
    (24, 16, 1, 3, 0, 1),
    (32, 16, 16, 1, 8, 4),
    (16, 32, 5, 3, 2, 2),
    (16, 32, 2, 5, 1, 2),
]


def operands(shape, batch=2, frames=53, dtype=torch.float32, last=True):
    channels, outputs, taps, _, _, groups = shape
    torch.manual_seed(1)
    x = torch.randn(batch, frames, channels, dtype=torch.float32).transpose(1, 2)
    weight = torch.randn(outputs, channels // groups, taps, dtype=torch.float32)
    bias = torch.randn(outputs, dtype=torch.float32)
    x = x if last else x.contiguous()
    return [t.to(dtype).requires_grad_() for t in (x, weight / weight[0].numel() ** 0.5, bias)]


def results(f, given):
    y = f(*given)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    return [y.detach(), *torch.autograd.grad(y, given, grad.to(y.dtype))]


def compared(shape, slack=1e-7, **options):
    stride, padding, groups = shape[3:]

    def formula(x, weight, bias):
        return F.conv1d(x.contiguous(), weight, bias, stride, padding, 1, groups)

    exact = results(formula, operands(shape, dtype=torch.float64, **options))
    theirs = results(formula, operands(shape, **options))
    ours = results(lambda *g: _conv1d.convolution(*g, stride, padding, groups), operands(shape, **options))
    for name, found, eager, right in zip(("y", "x", "weight", "bias"), ours, theirs, exact, strict=True):
        error, allowed = ((t.double() - right).norm() / right.norm() for t in (found, eager))
        assert error <= 1.1 * allowed + slack, name
    assert ours[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "last"), [(1, True), (2, True), (3, False)])
def test_values_and_gradients(shape, batch, last):
    compared(shape, batch=batch, last=last)


@pytest.mark.parametrize("shape", [(256, 64, 3, 2, 0, 1), (128, 128, 64, 1, 32, 2)])
def test_sums_over_many_terms_are_as_exact_as_torchs(shape):
    compared(shape, slack=0.0, frames=301)


def test_frames_that_no_output_sees_do_not_matter():
    x, weight, bias = operands(SHAPES[1], frames=54)
    with torch.no_grad():
        x[:, :, 53] = float("nan")
    found = results(lambda *g: _conv1d.convolution(*g, 2, 0, 1), [x, weight, bias])
    assert all(t.isfinite().all() for t in found)
    assert not found[1][:, :, 53].any()


def test_the_other_recordings_of_a_batch_change_no_bit():
    x, weight, bias = (t.detach() for t in operands(SHAPES[1], batch=3))
    together = _conv1d.convolution(x, weight, bias, 2, 0, 1)
    for i in range(3):
        alone = _conv1d.convolution(x[i : i + 1], weight, None, 2, 0, 1)
        torch.testing.assert_close(together[i : i + 1], alone + bias[:, None], rtol=1e-6, atol=1e-6)
        two = _conv1d.convolution(x[[i, i]], weight, bias, 2, 0, 1)
        assert torch.equal(together[i], two[0])


def test_x_is_read_where_it_lies():
    x, weight, bias = (t.detach() for t in operands(SHAPES[1], batch=1))
    assert _conv1d._by_group(x, 0, 1).data_ptr() == x.data_ptr()
    part = x[:, :, 7:]  # begins inside its memory
    torch.testing.assert_close(
        _conv1d.convolution(part, weight, bias, 2, 0, 1), F.conv1d(part, weight, bias, 2)
    )


def test_a_change_of_what_the_backward_pass_reads_is_found():
    x, weight, bias = operands(SHAPES[1], batch=1)
    x = x * 1.0
    y = _conv1d.convolution(x, weight, bias, 2, 0, 1)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5]])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_result_can_be_changed_in_place(shape, batch):
    given, options = operands(shape, batch=batch), shape[3:]
    found = torch.autograd.grad(_conv1d.convolution(*given, *options).mul_(2.0).sum(), given)
    right = torch.autograd.grad(_conv1d.convolution(*given, *options).mul(2.0).sum(), given)
    torch.testing.assert_close(found, right)


def test_a_batch_of_gradients():
    """``torch.autograd.functional.jacobian(vectorize=True)`` asks for it too."""
    given = operands(SHAPES[3])
    y = _conv1d.convolution(*given, 1, 1, 1)
    grads = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    found = torch.autograd.grad(y, given, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        expected = torch.autograd.grad(y, given, grad, retain_graph=True)
        for batch, one in zip(found, expected, strict=True):
            assert torch.equal(batch[i], one)


@pytest.mark.parametrize("policy", ["native", "torch"])
def test_a_convolution_runs_what_is_faster(monkeypatch, policy):
    monkeypatch.setenv("FASTASR_GEMM", policy)
    monkeypatch.setattr(_gemm, "_choices", {})
    calls = []
    found = _conv1d.convolution
    monkeypatch.setattr(_conv1d, "convolution", lambda *given: calls.append(1) or found(*given))
    conv = torch.nn.Conv1d(32, 64, 3, 2)
    normed = torch.nn.utils.parametrizations.weight_norm(
        torch.nn.Conv1d(32, 64, 8, padding=4, groups=4), dim=2
    )
    x = torch.randn(2, 32, 99, dtype=torch.float32)
    for each in (conv, normed):
        torch.testing.assert_close(convolutions.over_time(each, x), each(x), rtol=1e-5, atol=1e-5)
        assert calls == ([1] if policy == "native" else [])
        calls.clear()
        seen = []
        handle = each.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        convolutions.over_time(each, x)
        assert len(seen) == 1
        handle.remove()
        with fastasr.backend("eager"):
            convolutions.over_time(each, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert convolutions.over_time(each, x).dtype is torch.bfloat16
    for other in (
        torch.nn.Conv1d(32, 64, 3, dilation=2),
        torch.nn.Conv1d(32, 64, 3, padding="same"),
        torch.nn.Conv1d(32, 64, 3, padding=1, padding_mode="reflect"),
        torch.nn.utils.weight_norm(torch.nn.Conv1d(32, 64, 3)),
    ):
        assert torch.equal(convolutions.over_time(other, x), other(x))
    with pytest.raises(RuntimeError, match="to have 32 channels"):
        convolutions.over_time(conv, x[:, :16])
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        convolutions.over_time(conv, x[:, :, :2])
    assert calls == []


@pytest.mark.parametrize("norm", [lambda conv: conv, torch.nn.utils.parametrizations.weight_norm])
def test_a_class_patched_as_a_whole_is_called(monkeypatch, norm):
    conv = norm(torch.nn.Conv1d(32, 64, 3))
    monkeypatch.setattr(torch.nn.Conv1d, "forward", lambda self, x: -x)
    x = torch.randn(2, 32, 9, dtype=torch.float32)
    assert torch.equal(convolutions.over_time(conv, x), -x)
