# SPDX-License-Identifier: Apache-2.0
"""On a device that cannot run a kernel the op runs in eager and says why, once."""

from dataclasses import replace

import pytest
import torch
from steps import numbers
from torch._subclasses import FakeTensorMode

import fastasr
from fastasr import ops, swap
from fastasr.ops import _dispatch
from fastasr.ops._dispatch import FAMILIES, explain_choice

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from fastasr.kernels import _folded_norm, _weighted_values, bypass, rnnt_lattice
from fastasr.models.zipformer.self_attention import weighted
from fastasr.ops._folded_norm import folded
from fastasr.testing.fake_gpu import fake_gpu

OLD = "the kernels need compute capability 8.0, and the device has 7.5"


@pytest.fixture
def devices(monkeypatch):
    """Device 0 has compute capability 7.5, device 1 has 9.0."""
    capabilities = {None: (7, 5), 0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    index = lambda device: None if device is None else torch.device(device).index  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[index(device)])
    with fastasr.backend("auto"):
        yield


def test_old_devices(devices, caplog):
    """The choice is made for each device. It warns once, and `fastasr ops` has the reason."""
    assert explain_choice("swoosh", "cuda:0", torch.float32) == ("eager", f"triton: {OLD}")
    assert explain_choice("swoosh", "cuda:1", torch.float32) == ("triton", "")
    rows = [row for row in _dispatch.table() if row["backend"] == "triton"]
    assert rows
    assert all((row["available"], row["reason"]) == (False, OLD) for row in rows)
    family = FAMILIES["swoosh"]
    with FakeTensorMode():
        old, new = (torch.empty(4, device=f"cuda:{index}") for index in range(2))
        for _ in range(2):
            assert family.kernels(old) is None
            assert family.kernels(new).backend == "triton"
    assert [r.message for r in caplog.records] == [f"swoosh on cuda, float32 runs in eager: triton: {OLD}"]


def test_other_backends_of_triton(devices, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reason = "triton: the kernels are for NVIDIA GPUs, and this is torch for ROCm"
    assert explain_choice("swoosh", "cuda:1", torch.float32) == ("eager", reason)


def test_devices_older_than_the_native_library(devices, monkeypatch):
    """The CUDA C++ kernels were compiled for some architectures and run on newer ones."""
    monkeypatch.setattr(_dispatch, "native_build_info", lambda: {"cuda_architectures": "80-real,90-virtual"})
    monkeypatch.setattr(_dispatch, "_why_not_cuda", lambda name: "")
    (cuda,) = (replace(i, why_not=str) for i in FAMILIES["ema_scan"].implementations if i.backend == "cuda")
    why_not = FAMILIES["ema_scan"].why_not
    assert why_not(cuda, torch.device("cuda", 0), torch.float32) == OLD
    assert why_not(cuda, torch.device("cuda", 1), torch.float32) == ""


def test_the_report_of_a_swap_has_the_reason(devices):
    scaling = pytest.importorskip("zipformer.modules.scaling")
    with FakeTensorMode():
        for index, reason in ((0, f"bias_norm in eager: triton: {OLD}"), (1, "")):
            model = scaling.BiasNorm(8)
            for name, parameter in model.named_parameters():
                there = torch.empty(parameter.shape, device=f"cuda:{index}")
                setattr(model, name, torch.nn.Parameter(there))
            found = swap.explain(model)[""].reason
            assert reason in found
            assert ("eager" in found) == bool(reason)


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU whose kernels serve CPU tensors like those of a GPU, not because a backend is forced."""
    for name in ("bypass", "rnnt_lattice", "weighted_values", "folded_norm"):
        (triton,) = (i for i in FAMILIES[name].implementations if i.backend == "triton")
        monkeypatch.setattr(FAMILIES[name], "implementations", (replace(triton, device_types=("cpu",)),))
        monkeypatch.setattr(FAMILIES[name], "failed", {})
    with fake_gpu() as gpu, fastasr.backend("auto"):
        yield gpu


def _bypass():
    make = numbers(0)
    x_orig, x, scale = (torch.randn(*s, generator=make) for s in ((5, 8), (5, 8), (8,)))
    return tuple(t.requires_grad_() for t in (x_orig, x, scale))


@pytest.mark.parametrize("kernel", [bypass.forward_kernel, bypass.backward_kernel])
@pytest.mark.parametrize("traced", [False, True])
def test_a_kernel_that_cannot_be_launched(gpu, caplog, kernel, traced):
    """The op computes the call's values or gradients by the formula, says so once, and launches no kernel again."""
    gpu.errors[kernel] = OutOfResources(300_000, 101_376, "shared memory")
    reason = f"{kernel.__name__}: {gpu.errors[kernel]}"
    f = torch.ops.fastasr.bypass.default if traced else ops.bypass
    inputs = _bypass()
    expected = torch.autograd.grad((ops.bypass.definition(*inputs) * 3).sum(), inputs)
    for _ in range(2):
        y = f(*inputs)
        found = torch.autograd.grad((y * 3).sum(), inputs)
        torch.testing.assert_close(found, expected)
    assert torch.equal(f(*inputs), ops.bypass.definition(*inputs))
    assert len(gpu.launches) == (kernel is bypass.backward_kernel)  # the forward pass of the first call
    assert [r.message for r in caplog.records] == [f"bypass on cpu, float32 runs in eager: triton: {reason}"]
    assert explain_choice("bypass", "cpu", torch.float32) == ("eager", f"triton: {reason}")
    assert explain_choice("bypass", "cpu", torch.bfloat16) == ("triton", "")


@pytest.mark.parametrize("kernel", [_weighted_values.forward_kernel, _weighted_values.backward_kernel])
def test_weighted_values_that_cannot_be_launched(gpu, kernel):
    gpu.errors[kernel] = OutOfResources(300_000, 101_376, "shared memory")
    make = numbers(0)
    sizes = (2, 3, 5, 5), (5, 3, 8)  # in bfloat16, because on a CPU other kernels serve float32
    inputs = [torch.randn(*s, generator=make).bfloat16().requires_grad_() for s in sizes]

    def step():
        y = weighted(*inputs)
        return y.detach(), *torch.autograd.grad((y * 3).sum(), inputs)

    with fastasr.backend("eager"):
        expected = step()
    step()  # what this call launches computes nothing here
    torch.testing.assert_close(step(), expected)
    assert len(gpu.launches) == (kernel is _weighted_values.backward_kernel)
    assert "shared memory" in explain_choice("weighted_values", "cpu", torch.bfloat16)[1]


def test_a_folded_norm_that_cannot_be_launched(gpu):
    gpu.errors[_folded_norm.folded_kernel] = OutOfResources(300_000, 101_376, "shared memory")
    conv, norm = torch.nn.Conv1d(4, 4, 3, groups=4), torch.nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        found = folded(conv, norm)
        with fastasr.backend("eager"):
            expected = folded(conv, norm)
    assert all(map(torch.equal, found, expected))
    assert "shared memory" in explain_choice("folded_norm", "cpu", torch.float32)[1]


def test_a_forced_backend_raises(gpu):
    gpu.errors[bypass.forward_kernel] = OutOfResources(300_000, 101_376, "shared memory")
    with (
        fastasr.backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' is forced but .* shared memory"),
    ):
        ops.bypass(*_bypass())


def test_gradients_without_the_arguments_say_what_to_do(gpu):
    """Kernels of some ops keep nothing from which the formula could compute gradients."""
    gpu.errors[rnnt_lattice.backward_kernel] = OutOfResources(300_000, 101_376, "shared memory")
    px = torch.zeros(1, 2, 4, requires_grad=True)
    py = torch.zeros(1, 3, 3, requires_grad=True)
    total = ops.rnnt_lattice(px, py)
    with pytest.raises(RuntimeError, match=r"rnnt_lattice: .* shared memory.*backend\('eager'\)"):
        total.sum().backward()
