# SPDX-License-Identifier: Apache-2.0
"""torchaudio's Emformer swapped: equal results, streaming, verify and undo, and the modules that are declined."""

import pytest
import torch
from steps import cotangent, numbers, seeded

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


@pytest.mark.parametrize(
    "options",
    [{}, {"max_memory_size": 0, "activation": "gelu"}, {"tanh_on_mem": True, "activation": "silu"}],
    ids=("memory", "no memory", "tanh"),
)
def test_replaced_verified_and_restored(options):
    net = model(**options)
    before = streamed(net.eval())
    report = fastasr.accelerate(net.train(), verify=inputs())
    paths = ("", "emformer_layers.0", "emformer_layers.1")
    assert statuses(report) == dict.fromkeys(paths, "replaced"), str(report)
    assert type(net).infer is not net.infer.__func__
    for a, b in zip(streamed(net.eval()), before, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    fastasr.restore(net)
    assert all("forward" not in vars(m) and "infer" not in vars(m) for m in net.modules())
    for a, b in zip(streamed(net), before, strict=True):
        assert torch.equal(a, b)


def test_training_draws_what_upstream_draws():
    found = []
    for swap in (False, True):
        net = model().train()
        if swap:
            fastasr.accelerate(net)
        seeded(4)
        x, lengths = inputs()
        y, _ = net(x, lengths)
        y.backward(cotangent(y) * (torch.arange(21) < lengths[:, None])[..., None])
        found.append([torch.rand(2), *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1.0, b.abs().max().item()))


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
