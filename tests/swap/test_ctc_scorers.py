# SPDX-License-Identifier: Apache-2.0
"""CTC's scorers in searches of ESPnet and SpeechBrain: scores are upstream's, of all tokens or of candidates."""

import copy
from contextlib import ExitStack

import pytest
import torch
from steps import moved, numbers, seeded
from tiny_searches import FRAMES, TOKENS, WIDTH, espnet_search, speechbrain, speechbrain_search

import fastasr
from fastasr.ops import _dispatch
from fastasr.swap.forwards import ctc_prefix, ctc_scorers

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="no native library")
BLANK, END = 0, 2


class Projection(torch.nn.Module):
    """CTC's head, as ESPnet calls it and as SpeechBrain does."""

    def __init__(self, sharp=1.0):
        super().__init__()
        self.linear, self.sharp = torch.nn.Linear(WIDTH, TOKENS), sharp

    def forward(self, x):
        return self.sharp * self.linear(x)

    def log_softmax(self, x):
        return self(x).log_softmax(-1)


def head(sharp):
    seeded(f"ctc {sharp}")
    return moved(Projection(sharp), 0.5).float().eval()


def recordings(count):
    return torch.randn(count, FRAMES, WIDTH, generator=numbers(count))


# --------------------------------------------------------------------------- scores of single steps
def speechbrain_scorer(ctc, lengths):
    scorer = speechbrain("decoders.scorer").CTCScorer(ctc, BLANK, END)
    return scorer, lambda: scorer.reset_mem(recordings(len(lengths)), torch.tensor(lengths))


def steps_of_speechbrain(ctc, lengths, beams, candidates, tokens):
    """Returns the scores of each step."""
    scorer, begin = speechbrain_scorer(ctc, lengths)
    begin()
    memory, found = None, []
    last = torch.full((len(lengths) * beams,), 1)
    for places in tokens:
        scores, memory = scorer.score(last, memory, candidates, None)
        found.append(scores.clone())
        memory = scorer.permute_mem(memory, places)
        last = (places % TOKENS).flatten()
    return found


class Table:
    """Log-probabilities in the place of CTC's head."""

    def __init__(self, x):
        self.x = x

    def log_softmax(self, x):
        return self.x.clone()


def steps_of_espnet(x, beams, candidates, tokens, served=True, impossible=False):
    """``impossible``: whether hypotheses whose probability is 0 keep their scores, which are differences."""
    home = pytest.importorskip("espnet.nets.scorers.ctc")
    scorer, found, possible = home.CTCPrefixScorer(Table(x), END), [], torch.tensor([True] * beams)
    with ctc_scorers.served([scorer] if served else []):
        scorer.batch_init_state(x[0])
        states, ys = [None] * beams, torch.full((beams, 1), 1)
        for places in tokens:
            scores, state = scorer.batch_score_partial(ys, candidates, states, x[0])
            found.append(torch.where(possible[:, None] | impossible, scores, -1e10))
            rows, ids = places[0] // TOKENS, places[0] % TOKENS
            possible = possible[rows] & (scores[rows, ids] > -1e9)
            states = [
                scorer.select_state(state, int(row), int(token)) for row, token in zip(rows, ids, strict=True)
            ]
            ys = torch.cat((ys[rows], ids[:, None]), 1)
    return found


def compare(found, expected):
    for a, b in zip(found, expected, strict=True):
        likely, b = b > -1e9, b.float()
        torch.testing.assert_close(a[likely], b[likely], rtol=2e-5, atol=2e-4)
        assert bool((a[~likely] < -1e9).all())


def chosen(recordings, beams, candidates, steps):
    """Draws the hypotheses of each step and their tokens, of which some repeat the last one: as in a search neither
    blanks nor ends."""
    draw, found = numbers(7), []
    for _ in range(steps):
        rows = torch.randint(0, beams, (recordings, beams), generator=draw)
        if candidates is None:
            tokens = torch.randint(3, TOKENS, (recordings, beams), generator=draw)
        else:
            column = torch.randint(0, candidates.shape[1], (recordings, beams), generator=draw)
            first = torch.arange(recordings)[:, None] * beams
            tokens = candidates[rows + first, column]
        tokens[:, 0] = found[-1][:, 0] % TOKENS if found and candidates is None else tokens[:, 0]
        found.append(rows * TOKENS + tokens)
    return found


@pytest.mark.parametrize("part", [False, True], ids=["all tokens", "candidates"])
@pytest.mark.parametrize(("sharp", "short"), [(1.0, 5), (40.0, 5), (1.0, 0)])
def test_steps_of_speechbrain(sharp, short, part):
    """Two recordings, one of which has padding, until no frame is left. A short one's frames may round to none."""
    ctc, lengths, beams = head(sharp), [FRAMES, short], 3
    candidates = (
        torch.stack([torch.randperm(16, generator=numbers(i))[:6] + 3 for i in range(6)]) if part else None
    )
    tokens = chosen(2, beams, candidates, FRAMES + 1)
    expected = steps_of_speechbrain(ctc, lengths, beams, candidates, tokens)
    home = speechbrain("decoders.scorer").CTCScorer
    original = home.__init__

    def made(self, *args, **kwargs):
        original(self, *args, **kwargs)
        stack.enter_context(ctc_scorers.served([self]))

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(home, "__init__", made)
        compare(steps_of_speechbrain(ctc, lengths, beams, candidates, tokens), expected)


@pytest.mark.parametrize("part", [False, True], ids=["all tokens", "candidates"])
@pytest.mark.parametrize("sharp", [1.0, 40.0, 400.0])
def test_steps_of_espnet(sharp, part):
    """Upstream computes in float64 here: at the sharpest its float32 has errors of 0.6."""
    beams = 3
    candidates = (
        torch.stack([torch.randperm(16, generator=numbers(i))[:6] + 3 for i in range(3)]) if part else None
    )
    tokens = chosen(1, beams, candidates, FRAMES + 1)
    x = head(sharp).log_softmax(recordings(1)).detach()
    found = steps_of_espnet(x, beams, candidates, tokens)
    compare(found, steps_of_espnet(x.double(), beams, candidates, tokens, served=False))


def steps_of_prefixes(x, candidates, tokens, ours):
    """Returns the scores of each step of SpeechBrain's, for log-probabilities x (1, T, V)."""
    scorer = speechbrain("decoders.ctc").CTCPrefixScore(x.clone(), torch.tensor([x.shape[1]]), BLANK, END)
    scorer = ctc_scorers._SpeechBrains(scorer) if ours else scorer
    states, last, found = None, torch.full((tokens[0].numel(),), 1), []
    for places in tokens:
        scores, memory = scorer.forward_step(last, states, candidates)
        found.append(scores)
        states, last = scorer.permute_mem(memory, places), places.flatten() % TOKENS
    return found


def possible_tokens(count=6):
    """Returns candidates of three hypotheses."""
    return torch.stack([torch.randperm(16, generator=numbers(i))[:count] + 3 for i in range(3)])


def log_probabilities():
    return head(1.0).log_softmax(recordings(1)).detach()


def test_a_token_that_is_no_candidate():
    """A search without better ones chooses it. Upstream goes on with the state of its first or last candidate."""
    candidates, x = possible_tokens(), log_probabilities()
    tokens = chosen(1, 3, candidates, 5)
    other = next(t for t in range(3, TOKENS) if not (candidates == t).any(1).any())
    tokens[0][0, 1] = TOKENS + other
    found, expected = (steps_of_prefixes(x, candidates, tokens, ours) for ours in (True, False))
    compare(found, expected)
    found = steps_of_espnet(x, 3, candidates, tokens, impossible=True)
    compare(found, steps_of_espnet(x.double(), 3, candidates, tokens, served=False, impossible=True))


@pytest.mark.parametrize("part", [False, True], ids=["all tokens", "candidates"])
def test_numbers_that_are_none(part):
    """A frame of NaN stays NaN, also behind tokens that need later frames. A token and a blank of probability 0 give no
    NaN."""
    candidates = possible_tokens(16) if part else None
    tokens = [torch.tensor([[5, 6, 7]]) + torch.arange(3) * TOKENS * (n > 0) for n in range(4)]
    x, without = log_probabilities(), log_probabilities()
    x[0, 0] = torch.nan
    found, expected = (steps_of_prefixes(x, candidates, tokens, ours) for ours in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    without[0, :, 5] = without[0, 1, BLANK] = -torch.inf
    assert not any(t.isnan().any() for t in steps_of_prefixes(without, candidates, tokens, ours=True))


# --------------------------------------------------------------------------- whole searches
@pytest.fixture
def scored(monkeypatch):
    """Collects how many tokens the hypotheses of each step have."""
    found, scores = [], ctc_prefix.PrefixScores.scores

    def watched(self, of, length, candidates):
        found.append(length)
        return scores(self, of, length, candidates)

    monkeypatch.setattr(ctc_prefix.PrefixScores, "scores", watched)
    return found


def speechbrain_models(full, window=0):
    seeded("speechbrain ctc")
    home = speechbrain("decoders.scorer")
    scorer = home.CTCScorer(Projection(), BLANK, END, ctc_window_size=window)
    search = speechbrain_search(scorers=[scorer] if full else [], weights={"ctc": 0.4})
    if not full:
        search.scorer = home.ScorerBuilder(
            weights={"ctc": 0.4}, partial_scorers=[scorer], scorer_beam_scale=1.5
        )
    theirs = moved(torch.nn.ModuleList((search, scorer.ctc_fc)), 0.3).float().eval()
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    return theirs, ours


def speechbrain_found(model):
    with torch.no_grad():
        tokens, _, scores, _ = model[0](recordings(2), torch.tensor([1.0, 0.6]))
    return tokens, scores


@pytest.mark.parametrize("full", [True, False], ids=["full scorer", "partial scorer"])
def test_speechbrain(full, scored):
    theirs, ours = speechbrain_models(full)
    for _ in range(2):
        (tokens, scores), (expected, others) = map(speechbrain_found, (ours, theirs))
        assert tokens == expected
        torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-4)
        assert scored == [*range(len(scored))]
        assert len(scored) > 5
        scored.clear()
    builder = ours[0].scorer
    (scorer,) = (builder.full_scorers if full else builder.partial_scorers).values()
    assert type(scorer.ctc_score).__name__ == "CTCPrefixScore"  # upstream's is there again
    assert "reset_mem" not in vars(scorer)


def test_a_window_is_upstreams(scored):
    theirs, ours = speechbrain_models(True, window=3)
    assert speechbrain_found(ours)[0] == speechbrain_found(theirs)[0]
    assert not scored


def test_a_users_scorer_is_upstreams(scored):
    theirs, ours = speechbrain_models(True)
    for model in (theirs, ours):
        (scorer,) = model[0].scorer.full_scorers.values()
        kind = type(scorer)

        class CTCScorer(kind):
            def score(self, *args, kind=kind):
                found, memory = kind.score(self, *args)
                return 0.5 * found, memory

        scorer.__class__ = CTCScorer
    assert speechbrain_found(ours)[0] == speechbrain_found(theirs)[0]
    assert not scored


def espnet_models():
    seeded("espnet ctc")
    home = pytest.importorskip("espnet.nets.scorers.ctc")
    batched = pytest.importorskip("espnet.nets.batch_beam_search").BatchBeamSearch
    parts = dict(espnet_search().nn_dict.items())
    ctc = torch.nn.ModuleDict(parts | {"ctc": Projection()})
    found = []
    theirs = moved(ctc, 0.3).float().eval()
    for model in (theirs, copy.deepcopy(theirs)):
        scorers = {
            "decoder": model["decoder"],
            "lm": model["lm"],
            "ctc": home.CTCPrefixScorer(model["ctc"], TOKENS - 1),
        }
        weights = {"decoder": 0.6, "lm": 0.3, "ctc": 0.4}
        found.append(batched(scorers, weights, 4, TOKENS, TOKENS - 1, TOKENS - 1, pre_beam_score_key="full"))
    fastasr.accelerate(found[1])
    return found


def espnet_found(search):
    with torch.no_grad():
        found = search(recordings(1)[0], maxlenratio=0.9)
    return [hyp.yseq.tolist() for hyp in found], [float(hyp.score) for hyp in found]


def test_espnet(scored):
    theirs, ours = espnet_models()
    for _ in range(2):
        (tokens, scores), (expected, others) = map(espnet_found, (ours, theirs))
        assert tokens == expected
        assert scores == pytest.approx(others, rel=1e-4)
        assert scored == [*range(len(scored))]
        assert len(scored) > 5
        scored.clear()
    assert not {"batch_init_state", "select_state", "batch_score_partial"} & {*vars(ours.scorers["ctc"])}
    assert not hasattr(ours.scorers["ctc"].impl, "prefixes")  # no table is left


def test_float64_is_upstreams(scored):
    theirs, ours = espnet_models()
    for search in (theirs, ours):
        search.double(), search.scorers["ctc"].ctc.double()
    with torch.no_grad():
        found, expected = (
            [hyp.yseq.tolist() for hyp in search(recordings(1)[0].double(), maxlenratio=0.9)]
            for search in (ours, theirs)
        )
    assert found == expected
    assert not scored


def test_small_probabilities():
    """Scores whose probabilities float64 does not have are found by logarithms."""
    x = torch.full((1, 6, 3), -1.0)
    x[0, :, 1], x[0, 3:, 2] = -500.0, -800.0
    prefixes = ctc_prefix.PrefixScores(x, torch.tensor([5]), 0, 2, -1e10, 0)
    start = prefixes.start(torch.tensor([7]) % 3)
    first = prefixes.scores(start, 0, None)
    second = prefixes.scores(prefixes.chosen(first, torch.tensor([0]), torch.tensor([1])), 1, None)
    assert second.table[0, 1] == pytest.approx(-1001.0, abs=3.0)
