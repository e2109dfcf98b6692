# SPDX-License-Identifier: Apache-2.0
"""torchaudio's Emformer swapped: equal results, streaming, verify and undo, and the modules that are declined."""

import pytest
import torch
from steps import numbers, seeded

import fastasr

emformer = pytest.importorskip("torchaudio.models.emformer")


def model(**options):
    seeded(0)
    sizes = {"left_context_length": 5, "right_context_length": 2, "max_memory_size": 2, "dropout": 0.1}
    return emformer.Emformer(12, 3, 20, 2, 4, **sizes | options)


def inputs():
    generator = numbers(1)
    return torch.randn(3, 23, 12, generator=generator), torch.tensor([21, 15, 9])


def streamed(net):
    """Returns every output and state of three steps."""
    x, states, found = inputs()[0], None, []
    with torch.no_grad():
        for step in range(3):
            y, lengths, states = net.infer(x[:, 4 * step : 4 * step + 6], torch.tensor([6, 6, 6]), states)
            found += [y, lengths, *(t.clone() for layer in states for t in layer)]
    return found


def statuses(report):
    return {r.path: r.status for r in report.rows if r.rule is not None and r.rule.startswith("torchaudio")}


def test_a_layer_left_out_still_gets_its_mask():
    net = model().eval()
    expected, _ = net(*inputs())
    fastasr.accelerate(net, exclude="emformer_layers.1")
    y, lengths = net(*inputs())
    valid = (torch.arange(21) < lengths[:, None])[..., None]
    torch.testing.assert_close(y * valid, expected * valid, rtol=2e-5, atol=2e-5)
    streamed(net)


class _Louder(emformer._EmformerLayer):
    def _process_attention_output(self, rc_output, utterance, right_context):
        return 2 * super()._process_attention_output(rc_output, utterance, right_context)


def test_unknown_code_is_declined():
    net = model()
    net.emformer_layers[0].__class__ = _Louder
    report = fastasr.explain(net)
    assert statuses(report)["emformer_layers.0"] == "skipped"
    assert statuses(report)["emformer_layers.1"] == "replaced"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer.attention, "negative_inf", -5.0), "negative_inf"),
        (lambda layer: setattr(layer.attention, "scaling", 1.0), "scaling"),
    ],
    ids=("negative_inf", "scaling"),
)
def test_instances_that_differ_are_declined(change, reason):
    net = model()
    change(net.emformer_layers[0])
    row = next(r for r in fastasr.explain(net).rows if r.path == "emformer_layers.0")
    assert row.status == "skipped"
    assert reason in row.reason
