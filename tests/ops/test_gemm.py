# SPDX-License-Identifier: Apache-2.0
"""The candidate matrix products: values and errors of each, operands of any strides, and the choice
itself.
"""

import json

import pytest
import torch

from fastasr import ops
from fastasr.ops import _gemm

REASONS = {"onednn": _gemm.onednn_reason(), "native": _gemm.reason_cpu("gemm")}
CANDIDATES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(REASONS.get(name)), reason=REASONS.get(name, "")))
    for name in ("torch", "onednn", "native")
]


def operands(operation, layout):
    """Returns x (m, k), w (n, k) and a bias, as ``operation`` takes them: whole, transposed in memory, or
    slices.
    """
    torch.manual_seed(0)
    m, n, k = 61, 45, 600
    shapes = {
        "forward": ((m, k), (n, k), (n,)),
        "input_grad": ((m, k), (k, n)),
        "weight_grad": ((k, m), (k, n)),
    }[operation]
    made = []
    for shape in shapes:
        if layout == "transposed" and len(shape) == 2:
            made.append(torch.randn(shape[::-1]).t())
        elif layout == "slices":
            made.append(torch.randn(*shape[:-1], 2 * shape[-1] + 1)[..., : shape[-1]])
        else:
            made.append(torch.randn(shape))
    return tuple(made)


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("operation", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("layout", ["whole", "transposed", "slices"])
def test_values(name, operation, layout):
    given = operands(operation, layout)
    if name == "onednn" and layout == "transposed":
        pytest.skip("oneDNN's kernels for such operands are chosen nowhere")
    y = _gemm._CANDIDATES[operation][name](*given)
    exact = _gemm._CANDIDATES[operation]["torch"](*(t.double() for t in given))
    mkl = _gemm._CANDIDATES[operation]["torch"](*given)
    error, theirs = ((t - exact).square().mean().sqrt() for t in (y, mkl))
    assert error <= 1.5 * theirs + 1e-7
    assert y.is_contiguous()


@pytest.mark.skipif(bool(REASONS["native"]), reason=REASONS["native"])
def test_threads_and_rows_do_not_change_a_bit():
    x, w, b = torch.randn(331, 500), torch.randn(129, 500), torch.randn(129)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y = _gemm._native_forward(x, w, b)
        torch.set_num_threads(3)
        assert torch.equal(_gemm._native_forward(x, w, b), y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(_gemm._native_forward(x[7:20], w, b), y[7:20])
    assert torch.equal(_gemm._native_forward(x.view(1, 331, 500), w, b)[0], y)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Starts without choices, neither made in this process nor on disk."""
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    _gemm.forget()
    yield tmp_path
    _gemm.forget()


@pytest.mark.skipif(bool(_gemm.reason()), reason=_gemm.reason())
def test_the_fastest_is_taken_and_remembered(fresh, monkeypatch):
    calls = []

    def candidate(name, seconds):
        def run(*operands):
            calls.append(name)
            return _gemm._torch_forward(*operands)

        return run, seconds

    slowness = {"torch": 3.0, "onednn": 2.0, "native": 1.0}
    made = {name: candidate(name, slowness[name])[0] for name in _gemm._usable()}
    monkeypatch.setitem(_gemm._CANDIDATES, "forward", made)

    def timed(f, operands):
        f(*operands)
        return slowness[calls[-1]] * 1e-3

    monkeypatch.setattr(_gemm, "_timed", timed)
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    fastest = min(_gemm._usable(), key=slowness.get)
    _gemm.forward(x, w, None)
    assert calls[-1] == fastest
    (file,) = fresh.iterdir()
    assert list(json.loads(file.read_text()).values()) == [fastest]
    calls.clear()
    _gemm.forget()
    _gemm.forward(x, w, None)  # read, not measured
    assert calls == [fastest]


def test_forced_choices(fresh, monkeypatch):
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    for name in _gemm._usable():
        monkeypatch.setenv("FASTASR_GEMM", name)
        _gemm.forget()
        _gemm.forward(x, w, None)
        assert list(_gemm._choices.values()) == [_gemm._CANDIDATES["forward"][name]]
    monkeypatch.setenv("FASTASR_GEMM", "fastest")
    _gemm.forget()
    with pytest.raises(
        ValueError, match="FASTASR_GEMM: expected auto, torch, onednn or native, got 'fastest'"
    ):
        _gemm.forward(x, w, None)
    assert not list(fresh.iterdir())


@pytest.mark.parametrize("op", [ops.linear, ops.linear_activation, ops.swoosh_linear])
def test_a_weight_without_inputs_is_refused_at_any_size(op):
    name = op.__name__
    with pytest.raises(ValueError, match=rf"fastasr\.{name}: "):
        op(torch.randn(64, 64), torch.randn(64, 0))
