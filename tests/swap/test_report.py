# SPDX-License-Identifier: Apache-2.0
"""The report names every module with a reason, as text, dictionary and JSON."""

import json

import families
import pytest
import torch
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


def test_as_text(model):
    report = fastasr.accelerate(model)
    text = str(report)
    assert text.endswith(report.summary)
    assert "BiasNorm" in text
    assert "no rule for this class" in text
    every = report.table(every=True)
    assert len(every.splitlines()) >= 2 * len(report.rows)
    assert "would be replaced" in str(fastasr.explain(model))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_it_fits_80_columns_and_names_every_reason(family):
    model, _ = families.make(family)
    report = fastasr.explain(model)
    for row in report.replaced[::3]:  # as verify fills them
        row.errors = {"values": 1.25e-7, "upstream_values": 1e-7}
        row.allowed = {"values": 9.5e-7}
    for row in report.replaced[1::3]:
        row.status, row.reason = "rolled back", f"verification: inference: {'error of the output ' * 9}"
    report.verified, report.ragged = True, {path: "a hook of yours " * 6 for path, _ in model.named_modules()}
    for every in (False, True):
        text = report.table(every=every)
        assert max(map(len, text.splitlines())) <= 80
        words = " ".join(text.split())
        assert all(part.strip() in words for row in report.rows for part in row.reason.split("; "))
        assert ("with fastasr.upstream_draws():" in text) == ("see upstream_draws" in words)
    assert "1.2e-07 of 9.5e-07" in text


def test_errors_beside_what_is_allowed(model, inputs):
    report = fastasr.accelerate(model, only="*norm", verify=inputs)
    for row in report.replaced:
        assert 0 < row.errors["values"] <= row.allowed["values"]
        assert 0 < row.errors["gradients"] <= row.allowed["gradients"]
    shares = [
        (row.errors[kind] / row.allowed[kind], row, kind) for row in report.replaced for kind in row.allowed
    ]
    _, row, kind = max(shares, key=lambda share: share[0])
    line = next(line for line in report.table(every=True).splitlines() if f" {row.path} " in line)
    assert line.endswith(f"{row.errors[kind]:.1e} of {row.allowed[kind]:.1e}")


def test_restored(model):
    count = len(fastasr.accelerate(model).replaced)
    foreign = model.encoder_embed.out_norm
    foreign.forward = lambda x: x
    done = fastasr.restore(model)
    assert done == count - 1
    assert f"{done} of them" == f"{count - 1} of them"
    lines = str(done).splitlines()
    assert repr(done) == str(done)
    modules = len(list(model.modules()))
    assert lines[0] == f"Encoder: restored {count - 1} of {modules} modules to their own forward"
    assert lines[1] == "left encoder_embed.out_norm: other code has bound its forward"
    assert done.left == ["encoder_embed.out_norm"]
    assert (
        str(fastasr.restore(torch.nn.Linear(2, 2))) == "Linear: restored 0 of 1 modules to their own forward"
    )


def test_restored_weights():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
    freed = len(fastasr.accelerate(model, weights="int8").weights.reduced)
    done = fastasr.restore(model)
    assert done.weights == freed
    assert (f"dropped the copies of {freed} weights in fewer bits" in str(done)) == bool(freed)


def test_looking_up_a_row(model):
    report = fastasr.explain(model)
    assert report["encoder_embed.out"].class_name == "Linear"
    with pytest.raises(KeyError):
        report["nowhere"]
