# SPDX-License-Identifier: Apache-2.0
"""accelerate(weights=): what is reduced and what stays, the bound on the outputs, training, saving, undoing."""

import copy
import io
import threading

import pytest
import torch
from steps import moved, numbers, relative, seeded

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import ParakeetEncoder, ParakeetEncoderConfig

import fastasr
from fastasr.ops import _dispatch, _reduced_weights

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")
HAS_BF16 = not _reduced_weights.why_not("bf16")
FORMATS = [
    "int8",
    pytest.param("bf16", marks=pytest.mark.skipif(not HAS_BF16, reason="no BF16 instructions that gain")),
]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_mel_bins": 40,
    "subsampling_conv_channels": 16,
    "layerdrop": 0.0,
}


@pytest.fixture
def model():
    seeded(3)
    model = moved(ParakeetEncoder(ParakeetEncoderConfig(**SIZES)), 0.03).eval()
    yield model
    fastasr.restore(model)


@pytest.fixture
def inputs():
    return {"input_features": torch.randn(2, 131, 40, generator=numbers(4))}


def hidden(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.mark.parametrize("format", FORMATS)
def test_report_and_bound(model, inputs, format):
    exact, state = hidden(model, inputs), copy.deepcopy(model.state_dict())
    report = fastasr.accelerate(model, weights=format, verify=inputs)
    assert report.ok
    assert report.verified
    error = relative(hidden(model, inputs), exact)
    assert error == pytest.approx(report.weights.error, rel=1e-3)
    assert 0 < error < 0.05
    rows = {row.path: row for row in report.weights.rows}
    assert rows["layers.0.feed_forward1.linear1"].format == format
    assert rows["layers.1.conv.pointwise_conv1"].format == format
    assert rows["layers.0.feed_forward1.linear1"].error > 0
    # positions are projected once, so exactly, and this is said
    assert rows["layers.0.self_attn.relative_k_proj"].format == "float32"
    assert "not reach" in rows["layers.0.self_attn.relative_k_proj"].reason
    assert f"in {format}" in str(report)
    assert "not reach" in str(report)
    row = rows["layers.0.feed_forward1.linear1"]
    assert f"{row.path} (128, 64): {format}, error {row.error:.1e}" in report.table(every=True).splitlines()
    assert report.to_dict()["weights"]["format"] == format
    assert report.weights.bytes_after < 0.8 * report.weights.bytes_before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_without_inputs(model, inputs):
    exact = hidden(model, inputs)
    report = fastasr.accelerate(model, weights="int8")
    assert report.weights.error is None
    assert report.weights.reduced
    assert 0 < relative(hidden(model, inputs), exact) < 0.05


def test_any_calls_choose(model, inputs):
    """A callable measures as many calls as it makes, and bounds nothing if it returns nothing."""
    one, other = inputs, {"input_features": 9 * torch.randn(1, 90, 40)}

    def both(model):
        return [hidden(model, x) for x in (one, other)]

    exact = both(model)
    error = fastasr.accelerate(model, weights="int8", verify=both).weights.error
    assert error == pytest.approx(max(map(relative, both(model), exact)), rel=1e-3)
    report = fastasr.accelerate(model, weights="int8", verify=lambda model: both(model) and None)
    assert report.weights.error is None
    assert report.weights.reduced[0].error > 0
    assert "outputs change" not in str(report)


def test_processors_without_bf16_keep_float32(model, inputs, monkeypatch):
    exact = hidden(model, inputs)
    info = _dispatch.native_build_info() | {"bf16_gains": False}
    monkeypatch.setattr(_dispatch, "native_build_info", lambda: info)
    report = fastasr.accelerate(model, weights="bf16", verify=inputs)
    reason = "this processor has no instructions for bf16, or slow ones: float32 is as fast"
    assert {(row.format, row.reason) for row in report.weights.rows} == {("float32", reason)}
    assert reason in " ".join(str(report).split())
    assert relative(hidden(model, inputs), exact) < 1e-5
    assert model.train().training


def test_a_weight_that_stands_out_stays(model, inputs):
    # in int8 one large weight in a row leaves no levels for the others
    layer = model.layers[1].feed_forward2.linear2
    with torch.no_grad():
        layer.weight[:, 0] *= 1e-5
        layer.weight[:, 1] = 300 * layer.weight.abs().mean()
        model.layers[1].feed_forward2.linear1.weight[1] = 0  # which meets an input of 0
        model.layers[1].feed_forward2.linear1.bias[1] = 0
    report = fastasr.accelerate(model, weights="int8", verify=inputs)
    row = next(row for row in report.weights.rows if row.path == "layers.1.feed_forward2.linear2")
    assert row.format == "float32"
    assert "stands out" in row.reason
    assert row.error > 0.03
    assert len(report.weights.reduced) > 10


def test_bound_is_kept(model, inputs):
    exact = hidden(model, inputs)
    free = fastasr.accelerate(model, weights="int8", verify=inputs).weights
    bound = free.error / 2
    report = fastasr.accelerate(model, weights="int8", verify=inputs, weights_error=bound).weights
    assert report.error <= bound
    assert relative(hidden(model, inputs), exact) <= bound * 1.001
    assert len(report.reduced) < len(free.reduced)
    assert any("would change by more" in row.reason for row in report.rows)


def test_selection(model, inputs):
    report = fastasr.accelerate(model, weights="int8", exclude="layers.0.*")
    formats = {row.path: row for row in report.weights.rows}
    assert formats["layers.0.feed_forward1.linear1"].reason == "not selected"
    assert formats["layers.1.feed_forward1.linear1"].format == "int8"


def test_training_is_refused(model, inputs):
    fastasr.accelerate(model, weights="int8")
    with pytest.raises(RuntimeError, match=r"reduced for inference.*restore"):
        model.train()
    assert not model.training
    assert not model.layers[0].training
    model.eval()
    assert fastasr.restore(model)
    assert model.train().training
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        fastasr.accelerate(model, weights="int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int4"}, "expected None or one of bf16, int8, got 'int4'$"),
        ({"weights": "fp16"}, "got 'fp16': it only stores weights, in StreamingEncoder, GreedySearch"),
        ({"weights": "int8", "weights_error": 0}, "between 0 and 1, got 0"),
    ],
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        fastasr.accelerate(model, **options)


def test_restore_gives_the_same_bits(model, inputs):
    before = hidden(model, inputs)
    fastasr.accelerate(model, weights="int8", verify=inputs)
    fastasr.restore(model)
    assert torch.equal(hidden(model, inputs), before)
    assert not any(_reduced_weights.copy_of(p) for p in model.parameters())
    assert "train" not in vars(model)


def test_verify_and_eager_mode_are_exact(model, inputs):
    before = hidden(model, inputs)
    fastasr.accelerate(model, weights="int8")
    reduced = hidden(model, inputs)
    assert fastasr.verify(model, inputs).ok
    with fastasr.eager_mode(model):
        assert torch.equal(hidden(model, inputs), before)
    assert torch.equal(hidden(model, inputs), reduced)


def test_saved_loaded_and_copied(model, inputs):
    exact = hidden(model, inputs)
    fastasr.accelerate(model, weights="int8")
    reduced = hidden(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(hidden(loaded, inputs), exact)
    assert loaded.train().training  # a loaded model is neither swapped nor reduced
    loaded.eval()
    fastasr.accelerate(loaded, weights="int8")
    assert torch.equal(hidden(loaded, inputs), reduced)
    fastasr.restore(loaded)
    # new values in the same model: the copies follow
    model.load_state_dict({key: value * 1.01 for key, value in model.state_dict().items()})
    fresh = copy.deepcopy(model)
    assert fresh.train().training  # it has the swap, and no reduced weights
    fastasr.restore(fresh.eval())
    assert 0 < relative(hidden(model, inputs), hidden(fresh, inputs)) < 0.05


def test_exchanged_parameters(model, inputs):
    exact = hidden(model, inputs)
    fastasr.accelerate(model, weights="int8")
    reduced = hidden(model, inputs)
    assert not fastasr.why(model).to_dict().get("weights")
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert relative(hidden(model, inputs), exact) < 1e-5
    assert "other parameters" in fastasr.why(model)["weights"]
    fastasr.accelerate(model, weights="int8")
    assert torch.equal(hidden(model, inputs), reduced)
    assert not fastasr.why(model).to_dict().get("weights")


def test_from_several_threads(model, inputs):
    fastasr.accelerate(model, weights="int8")
    expected, results = hidden(model, inputs), []
    threads = [threading.Thread(target=lambda: results.append(hidden(model, inputs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_plain_linears_of_any_model():
    seeded(5)
    model = torch.nn.Sequential(torch.nn.Linear(320, 500), torch.nn.ReLU(), torch.nn.Linear(500, 320)).eval()
    x = torch.randn(7, 320)
    exact = model(x).detach()
    report = fastasr.accelerate(model, weights="int8", verify=x)
    assert [row.format for row in report.weights.rows] == ["int8", "int8"]
    assert report.weights.bytes_after <= 0.3 * report.weights.bytes_before
    with torch.no_grad():
        assert 0 < relative(model(x), exact) < 0.05
    fastasr.restore(model)


def test_where_nothing_can_be_reduced(model, inputs):
    report = fastasr.accelerate(model.double(), weights="int8")
    assert not report.weights.reduced
    assert {row.reason for row in report.weights.rows} == {"it is float64 on cpu, not float32 on the CPU"}
    assert model.train().training
