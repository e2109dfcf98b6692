# SPDX-License-Identifier: Apache-2.0
"""Searches against brute force on tiny lattices and against themselves chunk by chunk, and the calls that
they refuse.
"""

import logit_tables
import pytest
import torch
from steps import numbers, seeded
from tiny_recogniser import RECOGNISER, STREAMING

from fastasr.asr import decoding, recogniser

LENGTHS = (23, 9, 16)
CONFIG = RECOGNISER | STREAMING | {"vocab_size": 12, "use_ctc": True}


@pytest.fixture(scope="module")
def model():
    """Returns a model whose random weights make tokens about as likely as blank."""
    seeded(0)
    made = recogniser.AsrModel(**CONFIG).eval()
    with torch.no_grad():
        made.joiner.output_linear.weight.normal_(std=1.0)
        made.joiner.encoder_proj.weight.normal_(std=0.5)
        made.joiner.decoder_proj.weight.normal_(std=0.5)
        made.ctc_output[1].weight.normal_(std=2.0)
    return made


@pytest.fixture(scope="module")
def encoder_out():
    return torch.randn(len(LENGTHS), max(LENGTHS), 24, generator=numbers(1))


def _searches(model):
    return {
        "greedy": decoding.GreedySearch(model),
        "greedy, 3 per frame": decoding.GreedySearch(model, max_sym_per_frame=3, blank_penalty=0.5),
        "beam": decoding.ModifiedBeamSearch(model, beam=3),
        "CTC greedy": decoding.CtcGreedySearch(),
        "CTC beam": decoding.CtcPrefixBeamSearch(beam=3),
    }


def _input(name, model, encoder_out):
    with torch.no_grad():
        return model.ctc_output(encoder_out) if name.startswith("CTC") else encoder_out


# --------------------------------------------------------------------------- brute force
@pytest.mark.parametrize("seed", range(4))
def test_beam_search_finds_the_best_of_all(seed):
    model = logit_tables.TableTransducer(seed=seed)
    frames = torch.randn(5, 3, generator=numbers(seed + 50))
    expected = logit_tables.transducer_probabilities(model, frames)
    best = max(expected, key=lambda tokens: expected[tokens] / (len(tokens) + 1))
    found = decoding.modified_beam_search(model, frames[None], beam=1000)
    assert tuple(found.tokens[0]) == best
    assert found.scores[0] == pytest.approx(expected[best], abs=1e-4)
    search = decoding.ModifiedBeamSearch(model, beam=1000)
    state = search.advance(search.start(), frames[None])
    assert {h.tokens[1:]: pytest.approx(h.log_prob, abs=1e-4) for h in state.beams[0]} == expected


@pytest.mark.parametrize("search", ["GreedySearch", "ModifiedBeamSearch"])
def test_the_predictor_reads_only_new_tokens(search, monkeypatch):
    model, read = logit_tables.TableTransducer(), []
    step = model.run_decoder
    monkeypatch.setattr(model, "run_decoder", lambda y: read.append(len(y)) or step(y))
    frames = torch.zeros(1, 6, 3)
    frames[..., 0] = 50  # blank
    frames[:, 2, 1] = 100
    made = decoding.ModifiedBeamSearch(model, beam=1) if "Beam" in search else decoding.GreedySearch(model)
    found = made.result(made.advance(made.start(), frames))
    assert (found.tokens, found.timestamps, read) == ([[1]], [[2]], [1, 1])


@pytest.mark.parametrize("seed", range(4))
def test_prefix_beam_search_finds_the_best_of_all(seed):
    log_probs = torch.randn(6, 3, generator=numbers(seed)).log_softmax(-1)
    expected = logit_tables.ctc_probabilities(log_probs)
    best = max(expected, key=expected.get)
    found = decoding.ctc_prefix_beam_search(log_probs[None], beam=1000)
    assert tuple(found.tokens[0]) == best
    assert found.scores[0] == pytest.approx(expected[best], abs=1e-5)
    search = decoding.CtcPrefixBeamSearch(beam=1000)
    state = search.advance(search.start(), log_probs[None])
    assert {h.tokens: pytest.approx(h.log_prob, abs=1e-5) for h in state.beams[0]} == expected


def test_greedy_search_step_by_step():
    model = logit_tables.TableTransducer(seed=3)
    frames = torch.randn(9, 3, generator=numbers(5))
    tokens, stamps, score = [], [], 0.0
    for t, row in enumerate(frames):
        log_probs = (row + model.after[tokens[-1] if tokens else 0]).log_softmax(-1)
        choice = int(log_probs.argmax())
        score += float(log_probs[choice])
        if choice:
            tokens.append(choice)
            stamps.append(t)
    found = decoding.greedy_search(model, frames[None])
    assert found.tokens == [tokens]
    assert found.timestamps == [stamps]
    assert found.scores[0] == pytest.approx(score, abs=1e-5)


def test_ctc_greedy_search_by_hand():
    path = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 1, 0, 0]])
    log_probs = torch.nn.functional.one_hot(path, 3).float().log_softmax(-1)
    found = decoding.ctc_greedy_search(log_probs)
    assert found.tokens == [[1, 1, 2, 1]]
    assert found.timestamps == [[1, 4, 5, 7]]
    assert decoding.ctc_greedy_search(log_probs, torch.tensor([5])).tokens == [[1, 1]]


# --------------------------------------------------------------------------- properties
@pytest.mark.parametrize("name", _searches(logit_tables.TableTransducer()))
@pytest.mark.parametrize("step", [1, 4])
def test_chunks_give_what_the_whole_gives(model, encoder_out, name, step):
    """This holds across "a blank a" and "a a" at the boundaries, and with streams that end."""
    search, x = _searches(model)[name], _input(name, model, encoder_out)
    whole = search.result(search.advance(search.start(len(LENGTHS)), x, torch.tensor(LENGTHS)))
    logit_tables.same_in_chunks(search, x, LENGTHS, step, whole)
    assert any(whole.tokens)
    for tokens, stamps in zip(whole.tokens, whole.timestamps, strict=True):
        assert len(tokens) == len(stamps)
        assert stamps == sorted(stamps)


@pytest.mark.parametrize("name", _searches(logit_tables.TableTransducer()))
def test_a_batch_gives_what_its_sequences_give(model, encoder_out, name):
    search, x = _searches(model)[name], _input(name, model, encoder_out)
    batch = search.result(search.advance(search.start(len(LENGTHS)), x, torch.tensor(LENGTHS)))
    for n, length in enumerate(LENGTHS):
        alone = search.result(search.advance(search.start(), x[n : n + 1, :length]))
        assert alone.tokens == [batch.tokens[n]]
        assert alone.timestamps == [batch.timestamps[n]]
        assert alone.scores == pytest.approx([batch.scores[n]], rel=1e-4)


def test_nothing_heard():
    for search in _searches(logit_tables.TableTransducer()).values():
        found = search.result(search.advance(search.start(2), torch.zeros(2, 0, 3)))
        assert found.tokens == [[], []]


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_frame_in_which_nothing_is_possible_decides_nothing(value):
    log_probs = torch.randn(1, 6, 5, generator=numbers(3)).log_softmax(-1)
    expected = decoding.ctc_prefix_beam_search(torch.cat([log_probs[:, :3], log_probs[:, 4:]], 1))
    log_probs[:, 3] = value
    found = decoding.ctc_prefix_beam_search(log_probs)
    assert found.tokens == expected.tokens
    assert found.scores == expected.scores


def test_a_wider_beam_is_not_less_likely():
    for seed in range(5):
        model = logit_tables.TableTransducer(vocabulary=5, seed=seed)
        frames = torch.randn(1, 12, 5, generator=numbers(seed))
        narrow, wide = (
            decoding.ctc_prefix_beam_search(frames.log_softmax(-1), beam=b).scores[0] for b in (1, 50)
        )
        assert wide >= narrow - 1e-6
        search = [decoding.modified_beam_search(model, frames, beam=b).scores[0] for b in (1, 200)]
        assert search[1] >= search[0] - 1e-4 or search[1] > -12


# --------------------------------------------------------------------------- from features, whole and streaming
def test_features_in_chunks():
    chunks = decoding.FeatureChunks(chunk_size=8)
    x = torch.arange(60.0).unsqueeze(1).expand(60, 4)
    found = [c for part in x.split(7) for c in chunks.accept(part)]
    found += chunks.finish()
    assert [len(c) for c in found] == [29] * 4  # 60 frames, 16 per chunk
    assert [int(c[0, 0]) for c in found] == [0, 16, 32, 48]
    assert found[-1][12:].eq(decoding.chunks.SILENCE).all()
    assert chunks.finish() == []
    with pytest.raises(ValueError, match="after finish"):
        chunks.accept(x)
    assert decoding.FeatureChunks(8).finish() == []
    with pytest.raises(ValueError, match="chunk_size"):
        decoding.FeatureChunks(0)
    with pytest.raises(ValueError, match=r"\(frames, channels\)"):
        decoding.FeatureChunks(8).accept(x[0])


@pytest.mark.parametrize("ctc", [False, True], ids=["transducer", "CTC"])
def test_a_stream_hears_what_the_whole_utterance_says(model, ctc):
    """Chunk by chunk, the encoder's frames are those of the simulated streaming of a whole utterance."""
    x = torch.randn(1, 16 * 4 + 13, 80)
    encoder = decoding.ChunkEncoder(model, ctc=ctc)
    chunks = decoding.FeatureChunks(encoder.chunk_size)
    streamed = torch.cat([encoder(chunk.unsqueeze(0)) for chunk in chunks.accept(x[0])], dim=1)
    whole, lengths = decoding.encode(model, x, torch.tensor([x.shape[1]]), ctc=ctc)
    frames = streamed.shape[1]
    assert frames == 4 * 4
    # The front end sees 3 frames ahead in both; the whole utterance has them after the last chunk too.
    torch.testing.assert_close(streamed, whole[:, :frames], rtol=1e-4, atol=1e-4)
    search = decoding.CtcGreedySearch() if ctc else decoding.GreedySearch(model)
    one = search.result(search.advance(search.start(), streamed))
    other = search.result(search.advance(search.start(), whole, lengths.clamp(max=frames)))
    assert one.tokens == other.tokens


# --------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m, x: decoding.greedy_search(torch.nn.Linear(2, 2), x),
            TypeError,
            "with a transducer, got Linear",
        ),
        (lambda m, x: decoding.greedy_search(m, x, max_sym_per_frame=0), ValueError, "max_sym_per_frame"),
        (
            lambda m, x: decoding.modified_beam_search(m, x, beam=0),
            ValueError,
            "beam must be at least 1, got 0",
        ),
        (lambda m, x: decoding.modified_beam_search(m, x, temperature=0), ValueError, "temperature"),
        (lambda m, x: decoding.ctc_prefix_beam_search(x, beam=0), ValueError, "beam"),
        (lambda m, x: decoding.greedy_search(m, x[0]), ValueError, r"got \(23, 24\)"),
        (
            lambda m, x: decoding.greedy_search(m, x, torch.tensor([24, 1, 1])),
            ValueError,
            "at most 23 frames",
        ),
        (lambda m, x: decoding.greedy_search(m, x, torch.tensor([3])), ValueError, "expected 3 lengths"),
        (
            lambda m, x: decoding.greedy_search(m, x, torch.tensor([3.0, 1, 1])),
            TypeError,
            "expected integers",
        ),
        (lambda m, x: decoding.ctc_greedy_search(x, blank_id=-1), ValueError, "from 0 to 23, got -1"),
        (lambda m, x: decoding.ctc_prefix_beam_search(x, blank_id=24), ValueError, "from 0 to 23, got 24"),
    ],
)
def test_bad_arguments(model, encoder_out, call, error, message):
    with pytest.raises(error, match=message):
        call(model, encoder_out)


def test_states_that_cannot_be_joined():
    with pytest.raises(ValueError, match="at least one"):
        decoding.join_states([])
    states = decoding.CtcGreedySearch().start(), decoding.CtcPrefixBeamSearch().start()
    for one, other in (states, states[::-1]):
        with pytest.raises(ValueError, match="of one search"):
            decoding.join_states([one, other])


def test_models_in_training_mode_are_not_decoded():
    model = recogniser.AsrModel(**CONFIG)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        decoding.encode(model, torch.zeros(1, 30, 80), torch.tensor([30]))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        decoding.ChunkEncoder(model)
    without = recogniser.AsrModel(**{**CONFIG, "use_ctc": False}).eval()
    with pytest.raises(ValueError, match="no CTC output"):
        decoding.ChunkEncoder(without, ctc=True)
