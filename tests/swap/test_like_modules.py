# SPDX-License-Identifier: Apache-2.0
"""Of like modules, verify runs the first in float64, and others only where that can change the verdict."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import moved, numbers, seeded
from tiny_parakeet import SIZES

import fastasr
from fastasr import ops, processor
from fastasr.swap import replay
from fastasr.swap.verdict import Part, Verdict, near

scaling = pytest.importorskip("zipformer.modules.scaling", reason="upstream's package is not installed")


def norms(count=5, channels=8):
    """Returns a model of like modules with different parameters, and its inputs."""
    seeded("norms")
    model = torch.nn.Sequential(*(scaling.BiasNorm(channels) for _ in range(count)))
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    return model, torch.randn(4, channels)


@pytest.fixture
def far_from_rounding(monkeypatch):
    """Allows far more than rounding, so that no drawn number decides which module is near."""
    monkeypatch.setattr("fastasr.swap.verdict._ULPS", 800)


@pytest.fixture
def references(monkeypatch, far_from_rounding):
    """The modules that ran in float64, once per pass."""
    found, original = [], replay.Reference._replay

    def recorded(self, roundings):
        if roundings is None:
            found.append(self.call.probe.path)
        return original(self, roundings)

    monkeypatch.setattr(replay.Reference, "_replay", recorded)
    return found


def break_module(monkeypatch, module, change):
    """Changes what bias_norm returns for this module's parameters."""
    original = ops.bias_norm

    def changed(x, bias, *args, **kwargs):
        y = original(x, bias, *args, **kwargs)
        return change(y) if bias is module.bias else y

    monkeypatch.setattr(ops, "bias_norm", changed)


def test_the_first_one_has_a_run_in_float64(references):
    model, x = norms()
    report = fastasr.accelerate(model, verify=x)
    assert report.ok, str(report)
    assert references == ["0", "0"]
    assert report["0"].like is None
    for path in "1234":
        row = report[path]
        assert row.like == "0"
        for kind in ("values", "gradients"):
            assert 0 < row.errors[f"upstream_{kind}"] <= row.errors[kind] <= row.allowed[kind]


def test_other_inputs_or_modes_are_not_like(references):
    model, x = norms(2)
    model.append(torch.nn.Flatten(0)).append(torch.nn.Unflatten(0, (8, 4))).append(scaling.BiasNorm(4))
    model[1].eval()
    fastasr.accelerate(model, verify=x)
    assert references == ["0", "0", "1", "1", "4", "4"]


@pytest.mark.usefixtures("far_from_rounding")
@pytest.mark.parametrize(
    "change", [lambda y: y * 1.001, lambda y: y * float("nan"), lambda y: y.double(), lambda y: y[:3]]
)
def test_a_wrong_one_among_them_is_rolled_back(change, monkeypatch):
    model, x = norms()
    break_module(monkeypatch, model[3], change)
    report = fastasr.accelerate(model, verify=lambda model: [norm(x) for norm in model])
    assert [row.path for row in report.rolled_back] == ["3"]
    assert report["4"].like == "0"


def test_one_that_is_less_near_has_its_own_run_in_float64(references, monkeypatch):
    """Its error is more than half of what is allowed."""
    model, x = norms()
    break_module(monkeypatch, model[3], lambda y: y * (1 + 7e-5))
    report = fastasr.accelerate(model, verify=x)
    assert report.ok, str(report)
    assert references == ["0", "0", "3", "3"]
    assert report["3"].like is None
    assert 6e-5 < report["3"].errors["values"] < 8e-5


def test_a_first_one_that_fails_stands_for_none(references, monkeypatch):
    model, x = norms(3)
    break_module(monkeypatch, model[0], lambda y: y * 1.001)
    report = fastasr.accelerate(model, verify=x)
    assert [row.path for row in report.rolled_back] == ["0"]
    assert report["2"].like == "1"


def reference(truth, count, dtype):
    """Returns what Verdict asks of a Reference whose further runs allow nothing."""
    return types.SimpleNamespace(
        of=lambda kind: truth,
        count=count,
        dtype=dtype,
        rounding_effect=lambda kind: [0.0] * len(truth),
        nearby_error=lambda kind, index: 0.0,
    )


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    count=st.integers(1, 40),
    apart=st.floats(0.0, 12.0),
    off=st.floats(-20.0, 20.0),
)
def test_no_run_in_float64_could_change_the_verdict(seed, dtype, count, apart, off):
    """fastasr's result is ``apart`` units from upstream's, which is ``off`` units from the exact one."""
    generator, eps = numbers(seed), torch.finfo(dtype).eps
    theirs = torch.randn(9, generator=generator, dtype=torch.float64).to(dtype)
    unit = eps * theirs.abs().max().double()
    signs = torch.randint(-1, 2, (9,), generator=generator)
    ours = (theirs + apart * unit * count * signs).to(dtype)
    truth = theirs.double() - off * unit * count * signs
    like = types.SimpleNamespace(parts=[Part(0.0, 0.0, 1.0, False)])
    parts = near([("y", ours)], [("y", theirs)], count, dtype, like)
    if parts is not None:
        verdict = Verdict("values", [("y", ours)], [("y", theirs)], reference([("y", truth)], count, dtype))
        assert verdict.failure is None
        assert parts[0].error < 41 * 64 * eps
    elif apart < 1 and count < 20 and dtype is torch.float32:
        pytest.fail("so near a result needs no run in float64")


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_sum_that_is_zero_but_for_rounding(cancelled):
    """It is compared relative to the largest tensor, if it was for the like module."""
    weight, noise = torch.ones(3), torch.tensor([1e-8, -2e-8, 1e-8])
    like = types.SimpleNamespace(parts=[Part(0.0, 0.0, 1.0, False), Part(0.0, 0.0, 1.0, cancelled)])
    pair = [("weight", weight), ("bias", -noise)], [("weight", weight), ("bias", noise)]
    assert (near(*pair, 1, torch.float32, like) is not None) == cancelled
    large = [("weight", weight), ("bias", -noise * 1e3)], [("weight", weight), ("bias", noise * 1e3)]
    assert near(*large, 1, torch.float32, like) is None


def test_a_keys_bias_has_a_gradient_that_is_zero_but_for_rounding(monkeypatch):
    transformers = pytest.importorskip("transformers")
    verdicts, original = [], Verdict.__init__

    def recorded(self, kind, ours, upstream, reference):
        original(self, kind, ours, upstream, reference)
        verdicts.extend(zip((name for name, _ in upstream), self.parts, strict=True))

    monkeypatch.setattr(Verdict, "__init__", recorded)
    seeded("keys")
    config = transformers.ParakeetEncoderConfig(**SIZES, attention_bias=True)
    model = moved(transformers.ParakeetEncoder(config), 0.3)
    fastasr.accelerate(model, only="*self_attn", verify=(torch.randn(1, 40, SIZES["num_mel_bins"]),))
    cancelled = {name for name, part in verdicts if part is not None and part.cancelled}
    assert "the gradient of k_proj.bias" in cancelled
    assert "the gradient of k_proj.weight" not in cancelled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_needs_a_run_in_float64(value):
    like = types.SimpleNamespace(parts=[Part(0.0, 0.0, 1.0, False)])
    finite, other = torch.ones(3), torch.tensor([1.0, value, 1.0])
    for pair in ((finite, other), (other, finite), (other, other)):
        assert near([("y", pair[0])], [("y", pair[1])], 1, torch.float32, like) is None


def test_threads(monkeypatch):
    """On free cores fastasr's code in the first of like modules runs on all threads; all else that is short on one."""
    model, x = norms(3)
    fastasr.accelerate(model)
    found = []
    ours, theirs = ops.bias_norm, scaling.BiasNorm.forward

    def recorded(side, original):
        def run(*args, **kwargs):
            found.append((side, torch.get_num_threads()))
            return original(*args, **kwargs)

        return run

    monkeypatch.setattr(ops, "bias_norm", recorded("ours", ours))
    monkeypatch.setattr(scaling.BiasNorm, "forward", recorded("theirs", theirs))
    monkeypatch.setattr(processor, "free_cores", lambda: 2)
    torch.set_num_threads(2)
    fastasr.verify(model, x)
    assert torch.get_num_threads() == 2
    assert found.count(("ours", 2)) == 2
    assert found.count(("ours", 1)) == 4
    assert {used for side, used in found if side == "theirs"} == {1}
    found.clear()
    monkeypatch.setattr(sys.modules["fastasr.swap.verify"], "_WORTH_THREADS", -1.0)
    for free, expected in ((2, {2}), (1, {1})):
        monkeypatch.setattr(processor, "free_cores", lambda free=free: free)
        fastasr.verify(model, x)
        assert {used for _, used in found} == expected
        found.clear()
