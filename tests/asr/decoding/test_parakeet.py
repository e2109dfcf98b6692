# SPDX-License-Identifier: Apache-2.0
"""Searches of transformers' Parakeet against its own ``generate``: tokens and timestamps."""

import itertools

import pytest
import torch
from steps import seeded
from test_predictors import parakeet
from tiny_parakeet import SIZES

from fastasr.asr import decoding

transformers = pytest.importorskip("transformers")


def batch():
    lengths = torch.tensor([200, 90, 130])
    mask = (torch.arange(200) < lengths[:, None]).long()
    return {"input_features": 2 * torch.randn(3, 200, SIZES["num_mel_bins"]), "attention_mask": mask}


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4)], ids=["RNN-T", "TDT"])
def test_greedy_search_of_transducers(durations):
    """generate goes on behind the end of a sequence; up to there the steps are those of the search."""
    seeded(1)
    assert sum(_labels(parakeet(durations), bias) for bias in (0.0, 1.0, 2.0, 4.0, 6.0)) > 3


@torch.no_grad()
def _labels(model, bias):
    """Compares both searches of a model with a bias for blank. Returns the number of labels."""
    inputs, blank = batch(), model.config.blank_token_id
    tdt = hasattr(model.config, "durations")
    model.generation_config.decoder_start_token_id = blank
    model.generation_config.suppress_tokens = list(range(blank + 1, blank + 6)) if tdt else None
    frames = model.get_audio_features(**inputs).pooler_output  # made to differ from each other
    model.encoder_projector.bias -= frames.mean((0, 1))
    for parameter in model.encoder_projector.parameters():
        parameter *= 2 / frames.std((0, 1)).mean()
    model.joint.head.bias[blank] += bias
    expected = model.generate(**inputs)
    encoded = model.encoder(**inputs, output_attention_mask=True)
    lengths = encoded.attention_mask.sum(1)
    search = decoding.GreedySearch(model, 1000 if tdt else None)  # generate has no limit for TDT
    found, labels = search.result(search.advance(search.start(3), encoded.last_hidden_state, lengths)), 0
    for n, length in enumerate(lengths.tolist()):
        moves = expected.durations[n]
        at = (moves.cumsum(0) - moves).tolist()
        steps = zip(expected.sequences[n, 1:].tolist(), at[1:], strict=True)
        steps = [(token, t) for token, t in steps if token != blank and t < length]
        ours = list(zip(found.tokens[n], found.timestamps[n], strict=True))
        if int(moves.sum()) < length:  # generate was cut off by its limit
            ours = ours[: len(steps)]
        assert ours == steps
        labels += len(steps)
    return labels


@torch.no_grad()
def ctc_model():
    """Returns a ParakeetForCTC whose labels change with the frame, its inputs, log-probabilities and lengths."""
    config = transformers.ParakeetCTCConfig(vocab_size=7, pad_token_id=6, encoder_config=SIZES)
    model, inputs = transformers.ParakeetForCTC(config).eval(), batch()
    model.ctc_head.weight.normal_()
    model.ctc_head.bias -= model(**inputs).logits.mean((0, 1))
    lengths = model._get_output_attention_mask(inputs["attention_mask"]).sum(1)
    return model, inputs, model(**inputs).logits.log_softmax(-1), lengths


@torch.no_grad()
def test_beam_search_of_ctc():
    """A score is at most the transcript's probability, and at least that of greedy search's path. Each token has a
    frame."""
    seeded(4)
    *_, log_probs, lengths = ctc_model()
    found = decoding.ctc_prefix_beam_search(log_probs, lengths, beam=200, blank_id=6)
    counts = torch.tensor([len(tokens) for tokens in found.tokens])
    targets = torch.zeros(3, max(counts), dtype=torch.int64)
    for row, tokens in zip(targets, found.tokens, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    exact = -torch.nn.functional.ctc_loss(
        log_probs.double().transpose(0, 1), targets, lengths, counts, blank=6, reduction="none"
    )
    assert (torch.tensor(found.scores).double() <= exact + 1e-4).all()
    greedy = decoding.ctc_greedy_search(log_probs, lengths, blank_id=6)
    assert all(score >= path for score, path in zip(found.scores, greedy.scores, strict=True))
    for stamps, count, length in zip(found.timestamps, counts.tolist(), lengths.tolist(), strict=True):
        assert len(stamps) == count > 0
        assert sorted(set(stamps)) == stamps
        assert 0 <= stamps[0] <= stamps[-1] < length


@torch.no_grad()
def test_greedy_search_of_ctc():
    seeded(2)
    model, inputs, log_probs, lengths = ctc_model()
    found = decoding.ctc_greedy_search(log_probs, lengths, blank_id=6)
    for n, path in enumerate(model.generate(**inputs).tolist()):
        runs = [
            (label, [t for t, _ in run]) for label, run in itertools.groupby(enumerate(path), lambda p: p[1])
        ]
        expected = [(label, times[0]) for label, times in runs if label != 6]
        assert list(zip(found.tokens[n], found.timestamps[n], strict=True)) == expected
