# SPDX-License-Identifier: Apache-2.0
"""The RNN-T and its beam search against torchaudio's: values, gradients, random draws, steps, hypotheses."""

import pytest
import torch
from steps import cotangent, moved, numbers, same_state, seeded
from tiny_emformer_rnnt import tiny

from fastasr import rnnt
from fastasr.asr.decoding import RNNTBeamSearch
from fastasr.models import emformer_rnnt
from fastasr.models.emformer_rnnt import RNNT, CustomLSTM, Joiner, Predictor, emformer_rnnt_base

theirs = pytest.importorskip("torchaudio.models.rnnt")
SYMBOLS, CHANNELS = 11, 24


def shaken(module):
    """Gives parameters that no initialisation gives: norms that are not the identity, and gates that differ."""
    return moved(module, 0.3, 3).eval()


def pair(name, *arguments, dtype=torch.float64, **options):
    ours_class = {"_CustomLSTM": CustomLSTM, "_Predictor": Predictor, "_Joiner": Joiner}[name]
    expected = shaken(getattr(theirs, name)(*arguments, **options).to(dtype))
    actual = ours_class(*arguments, **options).to(dtype).eval()
    actual.load_state_dict(expected.state_dict())
    expected.load_state_dict(actual.state_dict())
    return expected, actual


def predictors(layer_norm=True, dtype=torch.float64, **options):
    options = {"num_lstm_layers": 2, "lstm_hidden_dim": 20, "lstm_layer_norm": layer_norm} | options
    return pair("_Predictor", SYMBOLS, CHANNELS, 20, **options, lstm_layer_norm_epsilon=1e-3, dtype=dtype)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_lstm(layer_norm, with_state):
    lstms = pair("_CustomLSTM", 7, 12, layer_norm=layer_norm, layer_norm_epsilon=1e-3)
    x, state = torch.randn(9, 3, 7).double(), [torch.randn(3, 12).double() for _ in range(2)]
    found = []
    for lstm in lstms:
        leaf, given = x.clone().requires_grad_(), [t.clone().requires_grad_() for t in state]
        y, (h, c) = lstm(leaf, given if with_state else None)
        inputs = [leaf, *lstm.parameters(), *(given if with_state else [])]
        found.append((y, h, c, *torch.autograd.grad((y * y).sum() + (h * c).sum(), inputs)))
    close(found[1], found[0])


@pytest.mark.parametrize("layer_norm", [True, False])
def test_predictor_whole_and_by_steps(layer_norm):
    expected, actual = predictors(layer_norm)
    labels, lengths = torch.randint(0, SYMBOLS, (3, 8)), torch.tensor([8, 5, 1])
    with torch.no_grad():
        whole = expected(labels, lengths)
        close(actual(labels, lengths), whole)
        state, steps = None, []
        for i in range(labels.shape[1]):
            y, _, state = actual(labels[:, i : i + 1], torch.ones(3, dtype=torch.int64), state)
            steps.append(y)
        close(torch.cat(steps, 1), whole[0])
        close(state, whole[2])


def test_predictor_in_training_draws_the_same():
    expected, actual = predictors(lstm_dropout=0.3)
    labels, lengths = torch.randint(0, SYMBOLS, (2, 6)), torch.tensor([6, 4])
    weight, found = torch.randn(2, 6, CHANNELS).double(), []
    for model in (expected.train(), actual.train()):
        seeded(5)
        y = model(labels, lengths)[0]
        grads = torch.autograd.grad((y * weight).sum(), list(model.parameters()))
        found.append((y, torch.get_rng_state(), *grads))
    close(found[1], found[0], 1e-11)


def test_initialisation_draws_the_same():
    models = []
    for make in (theirs._Predictor, Predictor):
        seeded(7)
        models.append(make(SYMBOLS, CHANNELS, 16, 2, 16, True))
    same_state(*models)


def test_float32_to_rounding():
    expected, actual = predictors(dtype=torch.float32)
    labels, lengths = torch.randint(0, SYMBOLS, (3, 30)), torch.tensor([30, 5, 1])
    with torch.no_grad():
        single, ours = expected(labels, lengths)[0], actual(labels, lengths)[0]
        exact = expected.double()(labels, lengths)[0]
    assert (ours - exact).abs().max() <= 2 * (single - exact).abs().max() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_joiner(activation):
    expected, actual = pair("_Joiner", CHANNELS, SYMBOLS, activation=activation)
    source, target = torch.randn(2, 7, CHANNELS).double(), torch.randn(2, 4, CHANNELS).double()
    lengths = torch.tensor([7, 5]), torch.tensor([4, 2])
    close(actual(source, lengths[0], target, lengths[1]), expected(source, lengths[0], target, lengths[1]))
    with pytest.raises(ValueError, match="activation"):
        Joiner(4, 4, activation="gelu")


class Transcriber(torch.nn.Module):
    """Stands in for an Emformer: a frame sees itself and the one before it."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(10, CHANNELS)

    def forward(self, input, lengths):
        previous = torch.nn.functional.pad(input, (0, 0, 1, 0))[:, :-1]
        return self.linear(torch.cat((previous, input), 2)), lengths

    def infer(self, input, lengths, states):
        previous = torch.zeros_like(input[:, :1]) if states is None else states[0][0]
        previous = torch.cat((previous, input), 1)
        y = self.linear(torch.cat((previous[:, :-1], input), 2))
        return y, lengths, [[previous[:, -1:]]]


def transducers(dtype=torch.float64):
    seeded(11)
    transcriber = shaken(Transcriber().to(dtype))
    predictor, joiner = predictors(dtype=dtype), pair("_Joiner", CHANNELS, SYMBOLS, dtype=dtype)
    expected, actual = (
        model(transcriber, predictor[i], joiner[i]).eval() for i, model in enumerate((theirs.RNNT, RNNT))
    )
    assert list(expected.state_dict()) == list(actual.state_dict())
    return expected, actual


def batch():
    generator = numbers(1)
    sources = torch.randn(2, 9, 5, generator=generator).double()
    targets = torch.randint(0, SYMBOLS - 1, (2, 4), generator=generator)
    return sources, torch.tensor([9, 6]), targets, torch.tensor([4, 3])


def test_transducer():
    expected, actual = transducers()
    close(actual(*batch()), expected(*batch()))
    sources, lengths, targets, target_lengths = batch()
    close(actual.transcribe(sources, lengths), expected.transcribe(sources, lengths))
    streamed = sources, lengths, None
    close(actual.transcribe_streaming(*streamed), expected.transcribe_streaming(*streamed))
    close(actual.predict(targets, target_lengths, None), expected.predict(targets, target_lengths, None))


def test_loss_is_that_of_the_logits():
    expected, actual = transducers()
    sources, lengths, targets, target_lengths = batch()
    blank = SYMBOLS - 1
    starts = torch.full((2, 1), blank)
    logits = expected(sources, lengths, torch.cat((starts, targets), 1), target_lengths + 1)[0]
    zeros = torch.zeros(2, dtype=torch.int64)
    boundary = torch.stack((zeros, zeros, target_lengths, lengths), 1)
    reference = rnnt.rnnt_loss(logits, targets, blank, boundary, reduction="none")
    found = actual.loss(*batch(), reduction="none")
    close(found, reference)
    reference, found = (
        torch.autograd.grad(value, list(model.parameters()), cotangent(value))
        for value, model in ((reference, expected), (found, actual))
    )
    close(found, reference, 1e-9)
    with pytest.raises(ValueError, match="blank"):
        actual.loss(*batch(), blank=SYMBOLS)


def same_hypotheses(actual, expected):
    assert [h[0] for h in actual] == [h[0] for h in expected]
    close([h[1] for h in actual], [h[1] for h in expected], 1e-4)
    close([h[2] for h in actual], [h[2] for h in expected], 1e-4)
    assert [h[3] for h in actual] == pytest.approx([h[3] for h in expected], rel=1e-4)


def same_streams(searches, pieces, beam):
    """Compares the hypotheses after every piece and returns each search's last ones and state."""
    streamed = [(None, None), (None, None)]
    for piece in pieces:
        streamed = [
            search.infer(piece, torch.tensor([piece.shape[-2]]), beam, state, hypotheses)
            for search, (hypotheses, state) in zip(searches, streamed, strict=True)
        ]
        same_hypotheses(streamed[1][0], streamed[0][0])
    return streamed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("beam", "options"), [(1, {}), (4, {}), (4, {"step_max_tokens": 2, "temperature": 1.3})]
)
def test_beam_search(seed, beam, options):
    decoder = pytest.importorskip("torchaudio.models.rnnt_decoder")
    expected, actual = transducers(torch.float32)
    blank = SYMBOLS - 1
    searches = decoder.RNNTBeamSearch(expected, blank, **options), RNNTBeamSearch(actual, blank, **options)
    x = torch.randn(12, 5, generator=numbers(seed))
    with torch.no_grad():
        for model in (expected, actual):  # whatever is drawn, some symbol beats blank
            model.joiner.linear.bias[blank] -= 2
        whole = [search(x, torch.tensor(12), beam) for search in searches]
        same_hypotheses(whole[1], whole[0])
        streamed = same_streams(searches, [x[None, i : i + 4] for i in range(0, 12, 4)], beam)
        same_hypotheses(streamed[1][0], whole[1])
    assert len(whole[1][0][0]) > 1, "nothing was recognised"
    with pytest.raises(ValueError, match="input"):
        searches[1](x[None, None], torch.tensor(12), beam)
    with pytest.raises(ValueError, match="length"):
        searches[1](x, torch.tensor([12, 3]), beam)


def emformer_models(seed=0, **changes):
    sizes = {"encoding_dim": CHANNELS, "num_symbols": SYMBOLS, "symbol_embedding_dim": 16}
    sizes |= {"transformer_num_layers": 2} | changes
    models = []
    for package in (theirs, emformer_rnnt):
        seeded(seed)
        models.append(tiny(package, **sizes).eval())
    assert [list(m.state_dict()) for m in models[:1]] == [list(m.state_dict()) for m in models[1:]]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    return models


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "transformer_max_memory_size": 2,
            "transformer_activation": "relu",
            "transformer_tanh_on_mem": False,
        },
        {
            "lstm_layer_norm": False,
            "transformer_weight_init_scale_strategy": None,
            "time_reduction_stride": 4,
        },
    ],
    ids=("base", "memory", "plain"),
)
def test_the_emformer_transducer(changes):
    expected, actual = emformer_models(**changes)
    generator = numbers(2)
    sources, lengths = torch.randn(2, 28, 6, generator=generator), torch.tensor([24, 24])
    targets, target_lengths = torch.randint(0, SYMBOLS, (2, 5), generator=generator), torch.tensor([5, 4])
    with torch.no_grad():
        close(actual.transcribe(sources, lengths), expected.transcribe(sources, lengths), 2e-5)
        batch = sources, lengths, targets, target_lengths
        close(actual(*batch), expected(*batch), 2e-5)
        states = [None, None]
        for i in range(0, 24, 8):
            segment = sources[:, i : i + 12], torch.tensor([12, 12])
            found = [
                m.transcribe_streaming(*segment, s) for m, s in zip((expected, actual), states, strict=True)
            ]
            close(found[1][0], found[0][0], 2e-5)
            close(found[1][1], found[0][1])
            states = [f[2] for f in found]


def test_beam_search_of_the_emformer_transducer():
    decoder = pytest.importorskip("torchaudio.models.rnnt_decoder")
    models = [shaken(model) for model in emformer_models()]
    blank, x = SYMBOLS - 1, torch.randn(28, 6, generator=numbers(3))
    searches = decoder.RNNTBeamSearch(models[0], blank), RNNTBeamSearch(models[1], blank)
    with torch.no_grad():
        whole = [search(x, torch.tensor(24), 4) for search in searches]
        same_hypotheses(whole[1], whole[0])
        same_streams(searches, [x[i : i + 12] for i in range(0, 24, 8)], 4)


def test_the_base_model():
    with torch.device("meta"):
        expected, actual = theirs.emformer_rnnt_base(50), emformer_rnnt_base(50)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (expected, actual)]
    assert shapes[0] == shapes[1]
