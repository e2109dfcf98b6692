# SPDX-License-Identifier: Apache-2.0
"""The AsrModel of the PyPI package ``zipformer`` trains without k2: losses and gradients are fast_rnnt's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("zipformer", reason="upstream's package is not installed")

import asr_models
from zipformer.modules import model as upstream

import fastasr
from fastasr import rnnt
from fastasr.compat import k2


@pytest.fixture(scope="module")
def inputs():
    pytest.importorskip("kaldi_native_fbank", reason="features need the extra fastasr[asr]")
    return asr_models.batch(Path(__file__).parents[2] / "demo/cache")  # where `make demo` keeps them


@pytest.fixture(autouse=True)
def _plain_upstream(monkeypatch):
    """Runs upstream's Swoosh functions without torch.compile."""
    monkeypatch.setenv("K2_ONNX_EXPORT", "1")


@pytest.fixture
def same_windows(fast_rnnt, monkeypatch):
    """Gives a second package the windows of the first: at a few frames two windows have the same occupation but for
    float32's rounding. test_parity.py compares the windows of equal occupations."""
    kept = []

    def give_kept(choose):
        def windows(*args, **kwargs):
            kept.append(choose(*args, **kwargs))
            assert (kept[-1] != kept[0]).any(2).double().mean() < 0.05
            return kept[0]

        return windows

    for package in (fast_rnnt, k2, rnnt):
        monkeypatch.setattr(package, "get_rnnt_prune_ranges", give_kept(package.get_rnnt_prune_ranges))


@pytest.mark.parametrize(
    ("reduction", "scales"),
    [("sum", {}), ("mean", {"lm_scale": 0.25, "am_scale": 0.1})],
    ids=["sum", "mean, smoothed"],
)
def test_a_training_step(fast_rnnt, same_windows, inputs, monkeypatch, reduction, scales):
    asr, inputs = in_float64(inputs)
    results = []
    for package in (k2, fast_rnnt):
        monkeypatch.setattr(upstream, "k2", package)
        results.append(asr_models.step(asr, inputs, reduction, **scales))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(our_gradients, their_gradients)


def in_float64(inputs):
    """Returns a model and the inputs: in float32 the rounding errors of gradients that nearly cancel (the biases of
    downsampling) reach 1e-8 of the whole."""
    x, *rest = inputs
    return asr_models.model().double(), (x.double(), *rest)


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    # upstream computes the loss itself in float32 all the same
    floor = 1e-8 * float(torch.stack([g.norm() for g in theirs.values()]).norm())
    for name, expected in theirs.items():
        error = float((ours[name] - expected).norm())
        assert error <= 1e-5 * float(expected.norm()) + floor, name


def test_it_learns(inputs, monkeypatch):
    monkeypatch.setattr(upstream, "k2", k2)
    asr = asr_models.model()
    optimizer = torch.optim.Adam(asr.parameters(), 2e-3)
    history = []
    for _ in range(4):
        losses, _ = asr_models.step(asr, inputs)
        optimizer.step()
        history.append(float(sum(losses)))
    assert history[-1] < history[0]


_FRESH = """
import fastasr.compat.k2
fastasr.compat.k2.install()
import torch, asr_models
asr = asr_models.model()
y = [[3, 5, 2], [7, 1]]
losses, gradients = asr_models.step(asr, (torch.randn(2, 90, 80), torch.tensor([90, 71]), y))
assert all(torch.isfinite(x) for x in losses) and len(gradients) > 50, losses
import k2
assert k2.__name__ == "fastasr.compat.k2"
"""


def test_a_fresh_process_that_installs_it():
    """The test installs it and then imports upstream's unmodified code, as a user does."""
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]}\n{_FRESH}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_accelerate_takes_the_transducer_loss(fast_rnnt, same_windows, inputs, monkeypatch):
    monkeypatch.setattr(upstream, "k2", fast_rnnt)
    asr, inputs = in_float64(inputs)
    theirs, their_gradients = asr_models.step(asr, inputs, lm_scale=0.25, am_scale=0.1)
    report = fastasr.accelerate(asr, only=lambda path, module: path == "")
    assert report[""].status == "replaced", report[""].reason
    monkeypatch.setattr(upstream, "k2", None)  # not needed any more
    ours, our_gradients = asr_models.step(asr, inputs, lm_scale=0.25, am_scale=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(our_gradients, their_gradients)
    assert fastasr.restore(asr) == 1
    with pytest.raises(AttributeError, match="rnnt_loss_smoothed"):
        asr_models.step(asr, inputs)


def test_a_swapped_model_is_verified(inputs, monkeypatch):
    monkeypatch.setattr(upstream, "k2", k2)
    asr = asr_models.model()
    x, lengths, tokens = inputs
    report = fastasr.accelerate(asr, exclude="encoder*", verify=(x, lengths, tokens))
    assert report.ok, str(report)
    assert report[""].status == "replaced"
    assert report[""].errors["values"] < 1e-4
    losses, gradients = asr_models.step(asr, inputs)
    assert all(torch.isfinite(x) for x in losses)
    assert gradients["joiner.output_linear.weight"].any()


def test_a_joiner_of_another_kind_is_called(inputs, monkeypatch):
    """Without k2 too, whose loss ours computes from the joiner's logits."""
    asr, inputs = in_float64(inputs)
    fastasr.accelerate(asr, only=lambda path, module: path == "")
    monkeypatch.setattr(upstream, "k2", None)
    fused, fused_gradients = asr_models.step(asr, inputs)
    asr.joiner.output_linear = torch.nn.Sequential(asr.joiner.output_linear)
    called, gradients = asr_models.step(asr, inputs)
    torch.testing.assert_close(called, fused, rtol=1e-6, atol=1e-6)
    gradients = {name.replace("output_linear.0.", "output_linear."): g for name, g in gradients.items()}
    assert_same_gradients(gradients, fused_gradients)


def test_a_model_without_a_transducer_is_declined():
    asr = asr_models.model(use_transducer=False, use_ctc=True)
    assert fastasr.explain(asr)[""].reason == "has no transducer"


def test_another_version_of_the_loss_is_declined():
    class Changed(upstream.AsrModel):
        def forward_transducer(self, *args, **kwargs):
            return super().forward_transducer(*args, **kwargs)

    asr = asr_models.model()
    asr.__class__ = Changed
    row = fastasr.explain(asr)[""]
    assert row.status == "skipped"
    assert "overrides forward_transducer" in row.reason
