# SPDX-License-Identifier: Apache-2.0
"""torchaudio's Emformer swapped: in part, and the modules that are declined."""

import families
import pytest
import torch

import fastasr

emformer = pytest.importorskip("torchaudio.models.emformer")


def statuses(report):
    return {r.path: r.status for r in report.rows if r.rule is not None and r.rule.startswith("torchaudio")}


@pytest.mark.parametrize("family", ["emformer", "emformer stream"])
def test_a_layer_left_out_still_gets_its_mask(family):
    net, run = families.make(family)
    with torch.no_grad():
        expected = run(net)
        fastasr.accelerate(net, exclude="emformer_layers.1")
        torch.testing.assert_close(run(net), expected, rtol=2e-5, atol=2e-5)


class _Louder(emformer._EmformerLayer):
    def _process_attention_output(self, rc_output, utterance, right_context):
        return 2 * super()._process_attention_output(rc_output, utterance, right_context)


def test_unknown_code_is_declined():
    net, _ = families.make("emformer")
    net.emformer_layers[0].__class__ = _Louder
    report = fastasr.explain(net)
    assert statuses(report)["emformer_layers.0"] == "skipped"
    assert statuses(report)["emformer_layers.1"] == "replaced"
