# SPDX-License-Identifier: Apache-2.0
"""The report names every module with a reason, as text, dictionary and JSON."""

import json
import sys

import pytest
from tiny_zipformer import medium

import fastasr
from fastasr.swap.rules import FAMILIES


def test_zipformer_m_every_module_with_a_reason():
    model = medium()
    report = fastasr.explain(model)
    assert [row.path for row in report.rows] == [name for name, _ in model.named_modules()]
    assert all(row.reason for row in report.rows)
    counts = {}
    for row in report.replaced:
        counts[row.class_name] = counts.get(row.class_name, 0) + 1
    layers = 2 + 2 + 3 + 4 + 3 + 2
    assert counts == {
        "SwooshL": 1,
        "SwooshR": 3,
        "ConvNeXt": 1,
        "Conv2dSubsampling": 1,
        "ConvolutionModule": 2 * layers,
        "RelPositionMultiheadAttentionWeights": layers,
        "BiasNorm": layers + 1,
        "BypassModule": 2 * layers + 5,
        "Balancer": 5 + 14 * layers,
        "Whiten": 2 + 11 * layers,
        "SelfAttention": 2 * layers,
        "NonlinAttention": layers,
        "ZipformerEncoderLayer": layers,
        "ActivationDropoutAndLinear": 5 * layers,
        "Linear": 1 + layers * (2 + 2 * 2 + 3 + 2 + 2),
    }
    assert report.summary.startswith("Encoder: ")


def test_the_front_end_does_not_hide_its_parts():
    report = fastasr.explain(medium())
    assert report["encoder_embed"].kernels == ()
    assert "channels_last" in report["encoder_embed"].reason
    parts = ["conv.3", "conv.6", "conv.9", "convnext", "convnext.activation", "out", "out_whiten", "out_norm"]
    assert all(report[f"encoder_embed.{part}"].status == "replaced" for part in parts)
    assert "container" in report["encoder_embed.conv"].reason


def test_convolution_modules_do_not_hide_their_parts():
    report, path = fastasr.explain(medium()), "encoder.encoders.1.encoder.layers.0.conv_module2"
    assert report[path].kernels == ("gated_depthwise_conv",)
    assert report[f"{path}.in_proj"].kernels == ("linear",)
    assert report[f"{path}.out_proj"].kernels == ("swoosh_linear",)
    assert report[f"{path}.depthwise_conv"].reason == "no rule for this class"


def test_every_kernel_of_a_rule_is_an_op():
    kernels = {name for family in FAMILIES for rule in family for name in rule.kernels}
    assert kernels <= set(fastasr.ops.__all__)


def test_dictionary_and_json(model, inputs):
    report = fastasr.accelerate(model, only="encoder_embed.*", verify=inputs)
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["model"] == "Encoder"
    assert data["verified"]
    assert data["counts"]["replaced"] == len(report.replaced)
    assert len(data["rows"]) == len(report) == len(list(model.named_modules()))
    row = next(row for row in data["rows"] if row["path"] == "encoder_embed.out_norm")
    assert row["class_name"] == "BiasNorm"
    assert row["rule"] == "zipformer.bias_norm"
    assert row["kernels"] == ["bias_norm"]
    assert row["status"] == "replaced"
    parts = {"values", "gradients"}
    assert row["errors"].keys() == parts | {f"upstream_{part}" for part in parts}
    assert all(0 < error < 1e-5 for error in row["errors"].values())


@pytest.mark.parametrize("rich", [True, False])
def test_as_text(model, monkeypatch, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
        monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setenv("COLUMNS", "150")
    report = fastasr.accelerate(model)
    text = str(report)
    assert report.summary in text
    assert "BiasNorm" in text
    assert "no rule for this class" in text
    every = report.table(every=True)
    assert len(every.splitlines()) >= len(report.rows)
    assert "would be replaced" in str(fastasr.explain(model))


def test_looking_up_a_row(model):
    report = fastasr.explain(model)
    assert report["encoder_embed.out"].class_name == "Linear"
    with pytest.raises(KeyError):
        report["nowhere"]
