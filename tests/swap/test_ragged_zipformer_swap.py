# SPDX-License-Identifier: Apache-2.0
"""The zipformer package's encoder swapped with ``ragged=True``: each recording's output is that of upstream's code for
the recording alone."""

import copy

import pytest
import torch
from steps import close, numbers, seeded, swapped

import fastasr
from fastasr.models.common import ragged

LENGTHS = [60, 33, 1, 0, 17]


def batch(lengths, dtype, more=3):
    frames = max(lengths) + more
    x = torch.randn(frames, len(lengths), 32, generator=numbers(1)).to(dtype)
    lengths = torch.tensor(lengths)
    return x, lengths, torch.arange(frames) >= lengths[:, None]


def test_each_recording_as_alone(model):
    upstream = model.encoder.eval().double()
    model = copy.deepcopy(upstream)
    x, x_lens, mask = batch(LENGTHS, torch.float64)
    report = fastasr.accelerate(model, ragged=True, verify=(x, x_lens, mask))
    assert report.ok, str(report)
    assert report.ragged == {"": None}
    assert (report[""].rule, report[""].status) == ("zipformer.encoder", "replaced")
    with torch.no_grad():
        found, counts = model(x, x_lens, mask)
        for i, n in enumerate(LENGTHS):
            if n:
                expected = upstream(x[:n, i : i + 1], torch.tensor([n]))[0][:, 0]
                close(found[: counts[i], i], expected, 1e-10)
            assert not found[counts[i] :, i].any()
        with ragged.padded():
            close(model(x, x_lens, mask)[0], upstream(x, x_lens, mask)[0], 1e-10)
    assert fastasr.verify(model, (x, x_lens, mask)).ok
    assert fastasr.restore(model) == len(report.replaced)
    with torch.no_grad():
        assert torch.equal(model(x, x_lens, mask)[0], upstream(x, x_lens, mask)[0])


@pytest.mark.parametrize("seed", range(2))
def test_a_training_step_as_of_upstream_without_padding(model, seed):
    upstream = model.encoder.train()
    ours = swapped(upstream, ragged=True)
    x, x_lens, mask = batch([40], torch.float32)
    results = []
    for each, inputs in ((ours, (x, x_lens, mask)), (upstream, (x[:40], x_lens, mask[:, :40]))):
        seeded(seed)
        y = each(*inputs)[0][:20]
        loss = y.sin().sum()
        results.append(
            (y.detach(), torch.autograd.grad(loss, list(each.parameters()), materialize_grads=True))
        )
    (y, found), (expected_y, expected) = results
    close(y, expected_y, 1e-4)
    largest = max(g.abs().max() for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * largest


def test_it_is_bound_only_if_asked_for(model):
    report = fastasr.accelerate(model)
    assert report.ragged is None
    assert "container" in report["encoder"].reason
    report = fastasr.accelerate(model, ragged=True)
    assert report.ragged == {"encoder": None}
    assert report["encoder"].reason == "container: see its submodules; runs without padding"
    assert "already swapped" in fastasr.accelerate(model)["encoder"].reason
    assert fastasr.explain(model).ragged == {"encoder": None}


@pytest.mark.parametrize("path", ["encoder.encoders.0.layers.0.conv_module1", "encoder"])
def test_an_encoder_that_cannot_says_why(model, path):
    report = fastasr.accelerate(model, ragged=True, exclude=path)
    expected = (
        "excluded by exclude=" if path == "encoder" else "conv_module1 of layer 0 of stack 0 is not swapped"
    )
    assert report.ragged == {"encoder": expected}
    assert "forward" not in vars(model.encoder)
