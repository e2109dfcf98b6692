# SPDX-License-Identifier: Apache-2.0
"""ESPnet's E-Branchformer swapped, and the modules that its Branchformer and Conformer share with it: equal results,
training steps, and undo."""

import pytest
import torch

pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")

from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from steps import close, moved, numbers, seeded

import fastasr
from fastasr import ops

SWAPPED = {
    "EBranchformerEncoderLayer",
    "RelPositionMultiHeadedAttention",
    "ConvolutionalGatingMLP",
    "ConvolutionalSpatialGatingUnit",
    "PositionwiseFeedForward",
}


def encoder(**arguments):
    seeded(0)
    sizes = {"output_size": 24, "attention_heads": 3, "cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
    options = {"num_blocks": 2, "linear_units": 28, "use_ffn": True, "macaron_ffn": True}
    return moved(EBranchformerEncoder(20, **{**sizes, **options, **arguments}), 0.1).eval()


def batch():
    generator = numbers(1)
    return torch.randn(3, 47, 20, generator=generator), torch.tensor([47, 40, 21])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_ffn": False, "macaron_ffn": False},
        {"gate_activation": "swish", "merge_conv_kernel": 5, "attention_dropout_rate": 0.1},
        {"use_linear_after_conv": True, "zero_triu": True, "input_layer": "linear"},
    ],
    ids=["macaron", "no-feed-forward", "swish-gate", "linear-after-convolution"],
)
def test_swap_and_verify(arguments):
    model = encoder(**arguments)
    expected, lengths, _ = model(*batch())
    report = fastasr.accelerate(model, verify=batch())
    assert report.ok, str(report)
    replaced = {row.class_name for row in report.replaced}
    assert replaced >= (SWAPPED if model.encoders[0].feed_forward else SWAPPED - {"PositionwiseFeedForward"})
    assert all(row.errors for row in report.replaced if row.class_name in SWAPPED)
    y, found, _ = model(*batch())
    assert found.tolist() == lengths.tolist()
    close(y, expected)
    with torch.no_grad():
        close(model(*batch())[0], expected)
    assert fastasr.restore(model) == len(report.replaced)


def test_dropout_of_the_attention_is_the_kernels(monkeypatch):
    model = encoder(dropout_rate=0.2, attention_dropout_rate=0.1).train()
    fastasr.accelerate(model)
    results = []
    for definition in (False, True):
        if definition:
            monkeypatch.setattr(ops, "rel_attention", ops.rel_attention.definition)
        seeded(4)
        y = model(*batch())[0]
        results.append(
            (y, *torch.autograd.grad(y.sin().sum(), list(model.parameters()), materialize_grads=True))
        )
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(b.abs().max(), 1e-2)


def test_the_report_names_kernels_and_what_differs():
    report = fastasr.explain(encoder())
    gate = report["encoders.0.cgmlp.csgu"]
    assert gate.kernels == ("conv_spatial_gate",)
    assert gate.reason == "same source as espnet 202511"
    assert "the weights are not kept in attn" in report["encoders.1.attn"].reason


@pytest.mark.parametrize("kind", ["branchformer", "conformer"])
def test_the_same_classes_elsewhere(kind):
    seeded(0)
    if kind == "branchformer":
        sizes = {"cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
        model = BranchformerEncoder(20, 24, attention_heads=3, num_blocks=1, **sizes).eval()
        expected_classes = {"RelPositionMultiHeadedAttention", "ConvolutionalSpatialGatingUnit"}
    else:
        options = {"rel_pos_type": "latest", "macaron_style": True, "cnn_module_kernel": 5}
        model = ConformerEncoder(20, 24, attention_heads=3, num_blocks=1, linear_units=28, **options).eval()
        expected_classes = {"RelPositionMultiHeadedAttention", "PositionwiseFeedForward"}
    expected = model(*batch())[0]
    report = fastasr.accelerate(model, verify=batch())
    assert report.ok, str(report)
    assert {row.class_name for row in report.replaced} >= expected_classes
    close(model(*batch())[0], expected)
