# SPDX-License-Identifier: Apache-2.0
"""Beam search of transducers whose predictor has a state, TDT above all: against all paths and greedy search."""

import math

import pytest
import torch
from logit_tables import same_in_chunks
from steps import seeded
from test_predictors import parakeet, rnnt

from fastasr.asr import decoding
from fastasr.models.transducer.predictors import find_predictor

LENGTHS = (17, 0, 9, 12)
MOST = 2  # tokens on a frame
MODELS = {
    "TDT": (lambda: parakeet((0, 1, 2, 3, 4)), 24),
    "TDT, other durations": (lambda: parakeet((2, 0, 5)), 24),
    "Parakeet RNN-T": (lambda: parakeet(None), 24),
    "torchaudio's RNN-T": (lambda: rnnt(True), 14),
}


def tiny(durations):
    """Returns a TDT of few outputs, with which all paths can be walked."""
    return parakeet(durations, outputs=3, width=5)


@torch.no_grad()
def all_paths(model, frames, most):
    """Returns tokens -> log-probability."""
    found, made = find_predictor(model), {}
    f, durations, blank = found.project(frames), found.durations, found.blank_id
    cache = {}

    def scores(tokens, t):
        if (tokens, t) not in cache:
            seen = [blank, *tokens]
            logits = found.call_modules(f[t].expand(len(seen), -1), seen)[-1].double()
            split = len(logits) - len(durations)
            cache[tokens, t] = logits[:split].log_softmax(0), logits[split:].log_softmax(0)
        return cache[tokens, t]

    def walk(t, symbols, tokens, total):
        if t >= len(f):
            made.setdefault(tokens, []).append(total)
            return
        of_tokens, of_durations = scores(tokens, t)
        for token, p in enumerate(of_tokens.tolist()):
            for d, q in zip(durations, of_durations.tolist(), strict=True):
                if token == blank:
                    walk(t + max(d, 1), 0, tokens, total + p + q)
                elif d or symbols + 1 == most:
                    walk(t + (d or 1), 0, (*tokens, token), total + p + q)
                else:
                    walk(t, symbols + 1, (*tokens, token), total + p + q)

    walk(0, 0, (), 0.0)
    return {tokens: torch.tensor(totals).logsumexp(0).item() for tokens, totals in made.items()}


@pytest.mark.parametrize("durations", [(0, 1, 2), (1, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("draw", range(3))
def test_a_beam_that_keeps_everything_finds_the_best_of_all(durations, draw):
    seeded((durations, draw))
    model, x = tiny(durations), torch.randn(1, 3, 24)
    expected = all_paths(model, x[0], 2)
    assert math.log(sum(map(math.exp, expected.values()))) == pytest.approx(0, abs=1e-5)
    search = decoding.ModifiedBeamSearch(model, beam=100_000, max_sym_per_frame=2)
    state = search.advance(search.start(), x)
    totals = {}
    for h in state.beams[0]:
        assert h.frame >= 3
        totals.setdefault(h.tokens[1:], []).append(h.log_prob)
    assert totals.keys() == expected.keys()
    for tokens, parts in totals.items():
        assert torch.tensor(parts).logsumexp(0).item() == pytest.approx(expected[tokens], abs=2e-4)
    found = search.result(state)
    best = max(expected, key=lambda tokens: expected[tokens] / (len(tokens) + 1))
    assert tuple(found.tokens[0]) == best
    assert found.scores[0] == pytest.approx(expected[best], abs=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_beam_of_one_is_greedy_search(name):
    seeded(name)
    made, channels = MODELS[name]
    model, x = made(), 2 * torch.randn(len(LENGTHS), max(LENGTHS), channels)
    most = MOST if "TDT" in name else None
    greedy = decoding.greedy_search(model, x, torch.tensor(LENGTHS), max_sym_per_frame=most or 1)
    beam = decoding.modified_beam_search(model, x, torch.tensor(LENGTHS), beam=1, max_sym_per_frame=most)
    assert beam.tokens == greedy.tokens
    assert beam.timestamps == greedy.timestamps


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_single_sequences_give_what_the_batch_gives(name):
    seeded(name)
    made, channels = MODELS[name]
    model, x = made(), 2 * torch.randn(len(LENGTHS), max(LENGTHS), channels)
    search = decoding.ModifiedBeamSearch(model, beam=3, temperature=1.5, blank_penalty=0.3)
    whole = search.result(search.advance(search.start(len(LENGTHS)), x, torch.tensor(LENGTHS)))
    assert any(whole.tokens)
    same_in_chunks(search, x, LENGTHS, 5, whole)
    for n, length in enumerate(LENGTHS):
        alone = search.result(search.advance(search.start(), x[n : n + 1, :length]))
        assert alone.tokens == [whole.tokens[n]]


def test_hypotheses_on_the_same_frame_differ_in_their_tokens():
    seeded("frames")
    model, x, frames = tiny((0, 1, 2)), torch.randn(1, 20, 24), set()
    search = decoding.ModifiedBeamSearch(model, beam=20)
    state = search.start()
    for t in range(20):
        beam = search.advance(state, x[:, t : t + 1]).beams[0]
        assert len({(h.tokens, h.frame) for h in beam}) == len(beam) <= 20
        scores = [h.log_prob for h in beam]
        assert scores == sorted(scores, reverse=True)
        frames |= {h.frame - t for h in beam}
    assert frames == {1, 2}  # where they wait


def test_what_is_refused():
    with pytest.raises(ValueError, match="max_sym_per_frame: expected None, or at least 1 for a TDT, got 2"):
        decoding.ModifiedBeamSearch(rnnt(), max_sym_per_frame=2)
    with pytest.raises(
        TypeError, match="ModifiedBeamSearch: this RNNT cannot be searched: it is in training mode"
    ):
        decoding.ModifiedBeamSearch(rnnt().train())
