# SPDX-License-Identifier: Apache-2.0
"""torchaudio's predictor swapped: compiled, copied, with a dropout in place, and in torchaudio's beam search."""

import copy

import pytest
import torch
from steps import numbers, seeded

import fastasr

rnnt = pytest.importorskip("torchaudio.models.rnnt")


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


def test_compiled_and_copied():
    net = predictor().eval()
    before = run(net)
    fastasr.accelerate(net)
    compiled = torch.compile(net, backend="aot_eager")
    for other in (copy.deepcopy(net), compiled):
        torch.testing.assert_close(run(other), before, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_dropout_in_place(layer_norm):
    """It changes what a layer returns: neither the layer's backward pass nor its state may see that."""
    results = []
    for swapped in (False, True):
        net = predictor(layer_norm).train()
        net.dropout.inplace = True
        if swapped:
            fastasr.accelerate(net)
        y, _, states = net(*inputs())
        grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        results.append([y, *(t for layer in states for t in layer), *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


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
