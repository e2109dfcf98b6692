# SPDX-License-Identifier: Apache-2.0
"""torchaudio's predictor swapped: equal results, verify and undo, the same draws, and the modules that are declined."""

import copy

import pytest
import torch
from steps import cotangent, numbers, seeded
from tiny_emformer_rnnt import tiny

import fastasr

rnnt = pytest.importorskip("torchaudio.models.rnnt")
LAYERS = ("lstm_layers.0", "lstm_layers.1")


def predictor(layer_norm=True):
    seeded(0)
    return rnnt._Predictor(9, 14, 12, 2, 16, layer_norm, 1e-3, 0.2)


def inputs():
    generator = numbers(1)
    return torch.randint(0, 9, (3, 7), generator=generator), torch.tensor([7, 5, 2])


def run(net):
    """Returns outputs and states, of the whole and of one label more."""
    labels, lengths = inputs()
    with torch.no_grad():
        y, _, states = net(labels, lengths)
        step, _, after = net(labels[:, :1], torch.ones_like(lengths), states)
    return [y, step, *(t for layer in (*states, *after) for t in layer)]


@pytest.mark.parametrize("layer_norm", [True, False])
def test_replaced_verified_and_restored(layer_norm):
    net = predictor(layer_norm)
    before = run(net.eval())
    report = fastasr.accelerate(net.train(), verify=inputs())
    rows = {r.path: r for r in report.rows if r.path in LAYERS}
    assert [rows[path].status for path in LAYERS] == ["replaced", "replaced"], str(report)
    assert rows[LAYERS[0]].kernels == ("layer_norm_lstm",)
    for a, b in zip(run(net.eval()), before, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    fastasr.restore(net)
    assert all("forward" not in vars(m) for m in net.modules())
    for a, b in zip(run(net), before, strict=True):
        assert torch.equal(a, b)


def test_training_draws_what_upstream_draws():
    found = []
    for swap in (False, True):
        net = predictor().train()
        if swap:
            fastasr.accelerate(net)
        seeded(4)
        # not the sum of squares, which is constant behind a layer norm: its gradients are rounding alone
        y = net(*inputs())[0]
        y.backward(cotangent(y))
        found.append([torch.rand(2), *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)


def test_compiled_and_copied():
    net = predictor().eval()
    before = run(net)
    fastasr.accelerate(net)
    compiled = torch.compile(net, backend="aot_eager")
    for other in (copy.deepcopy(net), compiled):
        for a, b in zip(run(other), before, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def _with_a_parameter(lstm):
    lstm.extra = torch.nn.Parameter(torch.ones(1))


def _with_one_norm(lstm):
    lstm.c_norm = torch.nn.Identity()


def _with_other_units(lstm):
    lstm.p2g = torch.nn.Linear(8, 32, bias=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_with_a_parameter, "extra"), (_with_one_norm, "c_norm"), (_with_other_units, "p2g.weight")],
)
def test_declined(change, reason):
    net = predictor()
    change(net.lstm_layers[0])
    rows = {r.path: r for r in fastasr.explain(net).rows}
    assert rows[LAYERS[0]].status == "skipped"
    assert reason in rows[LAYERS[0]].reason


def test_the_beam_search_of_torchaudio_runs_swapped():
    decoder = pytest.importorskip("torchaudio.models.rnnt_decoder")

    class Transcriber(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(5, 14)

        def forward(self, input, lengths):
            return self.linear(input), lengths

    seeded(2)
    model = rnnt.RNNT(Transcriber(), predictor(), rnnt._Joiner(14, 9)).eval()
    search, x = decoder.RNNTBeamSearch(model, 8), torch.randn(6, 5)
    with torch.no_grad():
        expected = search(x, torch.tensor(6), 3)
        fastasr.accelerate(model)
        found = search(x, torch.tensor(6), 3)
    assert [h[0] for h in found] == [h[0] for h in expected]
    assert [h[3] for h in found] == pytest.approx([h[3] for h in expected], rel=1e-4)


def test_a_whole_emformer_transducer_is_verified():
    seeded(3)
    model = tiny(rnnt)
    labels, lengths = inputs()
    sources = torch.randn(3, 28, 6), torch.tensor([24, 24, 24])
    report = fastasr.accelerate(model, verify=(*sources, labels, lengths))
    found = {r.path: r.status for r in report.rows}
    paths = [f"predictor.{path}" for path in LAYERS] + ["transcriber.transformer"]
    assert [found[path] for path in (*paths, "transcriber.transformer.emformer_layers.0")] == [
        "replaced"
    ] * 4, str(report)
