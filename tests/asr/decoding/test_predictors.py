# SPDX-License-Identifier: Apache-2.0
"""``greedy_search`` of each kind of transducer by label looping, against a loop over the model's own modules."""

import pytest
import torch
from logit_tables import same_in_chunks
from steps import seeded
from tiny_parakeet import SIZES
from tiny_recogniser import RECOGNISER, STREAMING

import fastasr
from fastasr.asr import decoding, recogniser
from fastasr.models import emformer_rnnt
from fastasr.models.transducer.predictors import find_predictor

LENGTHS = (23, 0, 9, 16)


def asr_model(context_size=2):
    model = recogniser.AsrModel(**RECOGNISER | STREAMING | {"vocab_size": 12, "context_size": context_size})
    with torch.no_grad():
        model.joiner.output_linear.weight.normal_()
        model.joiner.encoder_proj.weight.normal_(std=0.5)
        model.joiner.decoder_proj.weight.normal_(std=0.5)
    return model.eval()


def rnnt(layer_norm=False):
    """Returns torchaudio's RNN-T without an encoder worth the name."""
    predictor = emformer_rnnt.Predictor(
        9, 14, symbol_embedding_dim=10, num_lstm_layers=2, lstm_hidden_dim=10, lstm_layer_norm=layer_norm
    )
    model = emformer_rnnt.RNNT(torch.nn.Identity(), predictor, emformer_rnnt.Joiner(14, 9, activation="tanh"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.8)
    return model.eval()


def parakeet(durations, outputs=11, width=9):
    transformers = pytest.importorskip("transformers")
    more = {} if durations is None else {"durations": list(durations)}
    kind = "RNNT" if durations is None else "TDT"
    config = getattr(transformers, f"Parakeet{kind}Config")(
        vocab_size=outputs,
        decoder_hidden_size=width,
        blank_token_id=outputs - 1,
        pad_token_id=0,
        encoder_config=SIZES,
        **more,
    )
    model = getattr(transformers, f"ParakeetFor{kind}")(config).eval()
    with torch.no_grad():
        for part in (model.decoder, model.joint, model.encoder_projector):
            for parameter in part.parameters():
                parameter.normal_(std=0.7)
    return model


MODELS = {
    "AsrModel": (asr_model, 24),
    "AsrModel, one token": (lambda: asr_model(1), 24),
    "torchaudio's RNN-T": (lambda: rnnt(True), 14),
    "torchaudio's RNN-T without LayerNorm": (rnnt, 14),
    "Parakeet RNN-T": (lambda: parakeet(None), 24),
    "Parakeet TDT": (lambda: parakeet((0, 1, 2, 3, 4)), 24),
    "Parakeet TDT, other durations": (lambda: parakeet((2, 0, 5)), 24),
}


@torch.no_grad()
def by_hand(model, frames, most):
    """Returns tokens, timestamps and score of one utterance."""
    found, tokens, stamps, score, t, symbols = find_predictor(model), [], [], 0.0, 0, 0
    f = found.project(frames)
    while t < len(f):
        seen = [found.blank_id, *tokens]
        logits = found.call_modules(f[t].expand(len(seen), -1), seen)[-1]
        outputs = len(logits) - len(found.durations)
        log_probs = logits[:outputs].log_softmax(0)
        token = int(log_probs.argmax())
        score += float(log_probs[token])
        move = found.durations[int(logits[outputs:].argmax())] if found.durations else 0
        if token != found.blank_id:
            tokens.append(token)
            stamps.append(t)
            symbols = 0 if move else symbols + 1
            if symbols == most:
                move = 1
        else:
            move = max(move, 1)
        symbols = 0 if move else symbols
        t += move
    return tokens, stamps, score


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_greedy_search_on_a_gpu(name):
    seeded(1)
    made, channels = MODELS[name]
    model, found = made(), []
    x = 2 * torch.randn(3, 300, channels)  # enough to record a step
    for device in ("cpu", "cuda"):
        search = decoding.GreedySearch(model.to(device), 2)
        found.append(search.result(search.advance(search.start(3), x.to(device))))
    assert found[0].tokens == found[1].tokens
    assert found[0].timestamps == found[1].timestamps
    assert sum(map(len, found[0].tokens)) > 5


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_search(name, most):
    seeded(1)
    made, channels = MODELS[name]
    model = made()
    x = 2 * torch.randn(len(LENGTHS), max(LENGTHS), channels)
    expected = [by_hand(model, row[:length], most) for row, length in zip(x, LENGTHS, strict=True)]
    search = decoding.GreedySearch(model, max_sym_per_frame=most)
    assert search.reason == ""
    found = search.result(search.advance(search.start(len(LENGTHS)), x, torch.tensor(LENGTHS)))
    assert found.tokens == [tokens for tokens, _, _ in expected]
    assert found.timestamps == [stamps for _, stamps, _ in expected]
    assert found.scores == pytest.approx([score for *_, score in expected], rel=1e-4, abs=1e-5)
    assert sum(map(len, found.tokens)) > 5
    same_in_chunks(search, x, LENGTHS, 5, found)


@pytest.mark.parametrize("name", MODELS)
def test_without_the_native_call(name):
    """The networks called token by token, or the definition, give the same."""
    seeded(2)
    made, channels = MODELS[name]
    model, x = made(), torch.randn(3, 20, channels)
    native = decoding.greedy_search(model, x, max_sym_per_frame=2, blank_penalty=0.3)
    with fastasr.backend("eager"):
        search = decoding.GreedySearch(model, max_sym_per_frame=2, blank_penalty=0.3)
        assert search.reason == "the backend eager is in force"
        found = search.result(search.advance(search.start(3), x))
    assert found.tokens == native.tokens
    assert found.timestamps == native.timestamps
    assert found.scores == pytest.approx(native.scores, rel=1e-4)


@pytest.mark.parametrize("format", ["bf16", "fp16", "int8"])
def test_weights_in_fewer_bits(format):
    seeded(3)
    model, x = asr_model(), torch.randn(2, 20, 24)
    search = decoding.GreedySearch(model, weights=format)
    found = search.result(search.advance(search.start(2), x))
    assert abs(sum(map(len, found.tokens)) - sum(map(len, decoding.greedy_search(model, x).tokens))) <= 8
    with pytest.raises(ValueError, match="format: expected one of"):
        decoding.GreedySearch(model, weights="fp8")
    model.joiner.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="weights int8 need the native call: a submodule has hooks"):
        decoding.GreedySearch(model, weights="int8")


def test_a_model_in_int8_is_searched_by_the_native_call(monkeypatch):
    """Its predictor and joiner stay in float32: in int8 they would compute something else than the call does."""
    seeded(7)
    model, x = asr_model(), torch.randn(2, 20, 24)
    exact = decoding.greedy_search(model, x)
    monkeypatch.setattr("fastasr.swap.weights.SMALL", 0)
    rows = fastasr.accelerate(model, weights="int8").weights.rows
    heads = [row for row in rows if row.path.startswith(("joiner.", "decoder."))]
    assert {row.path for row in heads} >= {
        "joiner.encoder_proj",
        "joiner.decoder_proj",
        "joiner.output_linear",
    }
    assert {(row.format, row.reason) for row in heads} == {("float32", "a search compares its results")}
    assert any(row.format == "int8" for row in rows)
    assert decoding.GreedySearch(model).reason == ""
    assert decoding.greedy_search(model, x).tokens == exact.tokens
    fastasr.restore(model)


def test_a_change_of_weights_is_seen():
    seeded(4)
    model, x = asr_model(), torch.randn(2, 20, 24)
    before = decoding.greedy_search(model, x)
    with torch.no_grad():
        model.joiner.output_linear.bias[0] += 100
    assert decoding.greedy_search(model, x).tokens == [[], []]
    with torch.no_grad():
        model.joiner.output_linear.bias[0] -= 100
    assert decoding.greedy_search(model, x).tokens == before.tokens


def test_modules_that_compute_something_else_are_called():
    """A hook, a wrapped layer or another forward: the networks are called token by token."""
    seeded(5)
    x = torch.randn(2, 20, 24)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def hooked(model):
        model.joiner.register_forward_hook(lambda module, args, logits: logits.flip(-1))

    def wrapped(model):
        model.joiner.output_linear = Doubled(20, 12)

    def replaced(model):
        forward = model.decoder.forward
        model.decoder.forward = lambda *args, **kwargs: -forward(*args, **kwargs)

    for change, reason in (
        (hooked, "has hooks"),
        (wrapped, "expected a plain Linear"),
        (replaced, "forward"),
    ):
        model = asr_model()
        native = decoding.greedy_search(model, x)
        change(model)
        search = decoding.GreedySearch(model)
        assert reason in search.reason
        found = search.result(search.advance(search.start(2), x))
        assert found.tokens != native.tokens
        assert found.tokens == [by_hand(model, row, 1)[0] for row in x]


def test_models_that_cannot_be_searched():
    with pytest.raises(TypeError, match="this RNNT cannot be searched: it is in training mode"):
        decoding.GreedySearch(rnnt().train())


def test_a_stream_ends_when_its_weights_cannot_be_read():
    model, x = asr_model(), torch.randn(2, 5, 24)
    search = decoding.GreedySearch(model)
    state = search.advance(search.start(2), x)
    model.joiner.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="this AsrModel cannot be searched: a submodule has hooks"):
        search.advance(state, x)


def test_beam_search_of_an_unknown_subclass():
    """It calls the modules, whatever they compute; a beam of 1 is greedy search."""

    class Squashed(recogniser.AsrModel):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            self.joiner.output_linear = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Softsign())

    seeded(6)
    sizes = RECOGNISER | STREAMING | {"vocab_size": 12, "context_size": 2}
    model, x = Squashed(**sizes).eval(), 3 * torch.randn(2, 20, 24)
    with torch.no_grad():
        for part in (model.joiner, model.decoder):
            for parameter in part.parameters():
                parameter.normal_()
    greedy, beam = decoding.greedy_search(model, x), decoding.modified_beam_search(model, x, beam=1)
    assert greedy.tokens == beam.tokens == [by_hand(model, row, 1)[0] for row in x]
    assert any(greedy.tokens)
