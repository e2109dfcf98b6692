# SPDX-License-Identifier: Apache-2.0
"""A model of every framework is verified when it is swapped, and undone it is what it was; under autocast it is as
exact as upstream's."""

import ambient
import families
import pytest
import torch
from steps import relative, seeded, swapped

import fastasr
from fastasr.testing import seeds

UNCALLED = {  # a call reaches other methods of these, runs packed frames, or leaves them out
    "emformer stream": {"torchaudio.emformer", "torchaudio.emformer_layer"},
    "zipformer, causal": {"zipformer.causal_encoder"},
    "zipformer, ragged": {"zipformer.encoder"},
    "espnet searches": {"espnet.beam_search", "espnet.batch_beam_search", "espnet.decoder_layer"},
    "speechbrain searches": {"speechbrain.beam_search", "speechbrain.greedy_search", "speechbrain.decoder"},
    "wav2vec2 conformer": {"transformers.Wav2Vec2ConformerPositionalConvEmbedding"},
}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_verified_and_restored(name):
    model, run = families.make(name)
    with torch.no_grad():
        expected = run(model)  # upstream's first call may set attributes
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    report = fastasr.accelerate(model, verify=run, **families.SWAP.get(name, {}))
    assert report.ok, str(report)
    rows = {
        rule: [row for row in report.replaced if row.rule == rule]
        for rule in {r.rule for r in report.replaced}
    }
    assert {rule for rule, found in rows.items() if not any(row.errors for row in found)} <= UNCALLED.get(
        name, set()
    )
    assert fastasr.restore(model) == len(report.replaced)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    with torch.no_grad():
        assert all(map(torch.equal, run(model), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make", [families.wav2vec2("Wav2Vec2", implementation="eager"), families.torchaudio_wav2vec2()]
)
def test_a_mask_that_is_added_has_no_gradient(make, dtype):
    """The attention reads the mask as a bool, and verification runs it, not upstream's code in its place."""
    with ambient.ambient(dtype):
        model, run = make()
    report = fastasr.accelerate(model.to(dtype), verify=run)
    assert report.ok, str(report)
    assert "attention" in str([row.class_name for row in report.replaced]).lower()
    assert not fastasr.why(model).to_dict()


NOT_IN_HALF_PRECISION = {
    "speechbrain conformer",
    "speechbrain decoder",
    "speechbrain searches",
    "emformer stream",
    "openai whisper",
    "openai whisper, decoder",
}  # upstream's positions, states or norms are float32


@pytest.mark.parametrize("name", sorted(families.FAMILIES.keys() - NOT_IN_HALF_PRECISION))
def test_verified_in_half_precision(name):
    """In one of the types, which the run's seed chooses."""
    dtype = (torch.bfloat16, torch.float16)[seeds.seeded(name) % 2]
    with ambient.ambient(dtype):
        model, run = families.make(name)
    report = fastasr.accelerate(model.to(dtype), verify=run, **families.SWAP.get(name, {}))
    assert report.ok, str(report)


# those left out give tokens
@pytest.mark.parametrize("name", sorted(families.FAMILIES.keys() - {"parakeet rnn-t", "parakeet tdt"}))
def test_autocast(name):
    """The results have upstream's dtype and are as near to those in float32 as upstream's."""
    theirs, run = families.make(name)
    ours = swapped(theirs, **families.SWAP.get(name, {}))
    results = []
    for model, enabled in ((theirs, False), (theirs, True), (ours, True)):
        seeded("call")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(run(model))
    for exact, expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        errors = [relative(y, exact) for y in (found, expected)]
        assert errors[0] <= 1.15 * errors[1] + 5e-4, errors
