# SPDX-License-Identifier: Apache-2.0
"""FastConformer's RNN-T and TDT against transformers' Parakeet: logits, losses, gradients, states, ``generate``."""

import functools

import pytest
import torch
from steps import close, fixed, moved, same_state, seeded
from tiny_parakeet import SIZES, STILL

pytest.importorskip("transformers")

import transformers

import fastasr.compat.torchaudio
from fastasr.asr import decoding
from fastasr.models.fast_conformer import FastConformerRNNT, FastConformerTDT

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
TOKENS, BLANK, PAD, FRAMES = 12, 11, 0, 90
COUNTS = torch.tensor([4, 2, 3])
OURS = {"RNNT": FastConformerRNNT, "TDT": FastConformerTDT}
kinds = pytest.mark.parametrize("kind", OURS)


def pair(kind, dtype=torch.float64, scale=0.1, draw=lambda: seeded(0), **options):
    """Returns transformers' model with parameters away from their first values, and ours with the same."""
    draw()
    theirs = getattr(transformers, f"ParakeetFor{kind}")(_config(kind, **options))
    with torch.no_grad():
        for part in (theirs.encoder_projector, theirs.decoder, theirs.joint):
            moved(part, scale)
    model = OURS[kind].from_config(theirs.config)
    model.load_state_dict(theirs.state_dict())
    return theirs.to(dtype).eval(), model.to(dtype).eval()


def _config(kind, **options):
    more = {"pad_token_id": BLANK if kind == "RNNT" else PAD, "decoder_hidden_size": 9} | options
    encoder = SIZES | STILL | {"scale_input": False}
    return getattr(transformers, f"Parakeet{kind}Config")(
        vocab_size=TOKENS, num_decoder_layers=2, blank_token_id=BLANK, encoder_config=encoder, **more
    )


def batch(padded=True, dtype=torch.float64, draw=lambda: seeded(1)):
    """Returns features, their mask, and labels with padding that no model counts."""
    draw()
    lengths = torch.tensor([FRAMES, 61, 75] if padded else [FRAMES] * 3)
    mask = (torch.arange(FRAMES) < lengths[:, None]).long()
    x = 2 * torch.randn(3, FRAMES, SIZES["num_mel_bins"], dtype=dtype)
    return x, mask, torch.randint(1, BLANK, (3, int(COUNTS.max())))


def for_upstream(model, labels):
    """Returns its labels and the tokens that its prediction network reads."""
    behind = torch.arange(labels.shape[1]) >= COUNTS[:, None]
    contexts = torch.nn.functional.pad(labels, (1, 0), value=BLANK)
    return {"labels": labels.masked_fill(behind, model.config.pad_token_id), "decoder_input_ids": contexts}


@pytest.fixture
def wide(monkeypatch):
    """Lets upstream's losses, which convert logits to float32, compute in float64; RNN-T's needs a torchaudio."""

    def apply(model):
        loss = model.loss_function

        def in_float64(**kwargs):
            with monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "float", torch.Tensor.double)
                torch.set_default_dtype(torch.float64)
                try:
                    return loss(**kwargs)
                finally:
                    torch.set_default_dtype(torch.float32)

        model.loss_function = in_float64

    fastasr.compat.torchaudio.install()
    yield apply
    fastasr.compat.torchaudio.uninstall()


@kinds
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_losses_and_gradients(kind, training, padded, activation, wide):
    theirs, model = pair(kind, hidden_act=activation)
    wide(theirs)
    theirs.train(training), model.train(training)
    x, mask, labels = batch(padded)
    output = theirs(x, mask, **for_upstream(theirs, labels))
    found = model.loss(x, mask, labels=labels, label_lengths=COUNTS)
    assert found.dtype == torch.float64
    close(found, output.loss, 1e-10)
    expected = torch.autograd.grad(output.loss, list(theirs.parameters()), allow_unused=True)
    gradients = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    largest = max(g.abs().max() for g in expected if g is not None)
    for (name, _), g, g0 in zip(model.named_parameters(), gradients, expected, strict=True):
        assert (g is None) == (g0 is None), name
        assert g is None or (g - g0).abs().max() <= 1e-10 * largest, name


@kinds
@pytest.mark.parametrize("reduction", ["mean_volume", "mean_batch", "mean", "sum", "none"])
def test_reductions(kind, reduction, wide):
    theirs, model = pair(kind)
    wide(theirs)
    x, mask, labels = batch()
    model.joint.forward = None  # no logits
    more = {"sigma": 0.05} if kind == "TDT" else {}
    with torch.no_grad():
        expected = theirs(x, mask, **for_upstream(theirs, labels), reduction=reduction, **more).loss
        found = model.loss(x, mask, labels=labels, label_lengths=COUNTS, reduction=reduction, **more)
    close(found, expected, 1e-10)


@kinds
def test_logits_and_what_is_not_given(kind):
    theirs, model = pair(kind)
    x, mask, labels = batch(padded=False)
    with torch.no_grad():
        expected = theirs(x, mask, decoder_input_ids=for_upstream(theirs, labels)["decoder_input_ids"]).logits
        logits, out_mask = model(x, mask, labels=labels)
        close(logits, expected, 1e-10)
        assert out_mask.all()
        found, none = model(x, labels=labels)
        assert none is None
        close(found, expected, 1e-10)
        every = torch.full_like(COUNTS, labels.shape[1])
        close(model.loss(x, labels=labels), model.loss(x, mask, labels=labels, label_lengths=every), 1e-12)
        assert torch.isfinite(model.loss(x, mask, labels=labels[:, :0], reduction="sum"))


@kinds
def test_state_dicts_load_both_ways(kind):
    same_state(*reversed(pair(kind)))


def test_an_activation_of_neither_kind():
    with pytest.raises(ValueError, match="FastConformerTDT: activation: expected relu or tanh, got 'gelu'"):
        FastConformerTDT.from_config(_config("TDT", hidden_act="gelu"))


def searched(kind, dtype, seed, max_length=None, durations=None, limit=10):
    """Compares both searches. Returns columns and labels."""
    more = {"durations": durations} if durations else {}
    draw = functools.partial(fixed, seed)  # near ties of float32 are the same in every run
    theirs, model = pair(kind, dtype, 0.8, draw, max_symbols_per_step=limit, **more)
    x, mask, _ = batch(dtype=dtype, draw=draw)
    with torch.no_grad():
        frames = theirs.get_audio_features(x, mask).pooler_output  # made to differ from each other
        theirs.encoder_projector.bias -= frames.mean((0, 1))
        for parameter in theirs.encoder_projector.parameters():
            parameter *= 2 / frames.std((0, 1)).mean()
        theirs.joint.head.bias[BLANK] += seed / 2
        model.load_state_dict(theirs.state_dict())
    theirs.generation_config.decoder_start_token_id = BLANK
    outputs = theirs.joint.head.out_features
    theirs.generation_config.suppress_tokens = list(range(TOKENS, outputs)) or None
    options = {} if max_length is None else {"max_length": max_length}
    expected = theirs.generate(x, attention_mask=mask, **options)
    with torch.no_grad():
        encoded, out_mask = model.encoder(x, mask)
    for each in (model, theirs):
        sequences, moves = decoding.parakeet_generate(each, encoded, out_mask.sum(-1), max_length)
        assert torch.equal(sequences, expected.sequences)
        assert torch.equal(moves, expected.durations)
    ends = out_mask.sum(1)
    results = [decoding.greedy_search(each, encoded, ends) for each in (model, theirs)]
    assert results[0] == results[1]
    beams = [decoding.modified_beam_search(each, encoded, ends, 2) for each in (model, theirs)]
    assert beams[0] == beams[1]
    return sequences.shape[1], int((sequences != BLANK).sum())


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["native", "float64"])
def test_searches(kind, dtype):
    found = [searched(kind, dtype, seed) for seed in range(8)]
    assert len(set(found)) > 3
    assert max(labels for _, labels in found) > 5
    assert searched(kind, dtype, 3, max_length=4)[0] == 4
    searched(kind, dtype, 3, limit=2)


def test_durations_that_are_not_their_index():
    for seed in range(4):
        searched("TDT", torch.float32, seed, durations=[0, 1, 2, 4, 8])


@kinds
def test_training_mode_is_refused(kind):
    _, model = pair(kind)
    model.train()
    with pytest.raises(
        TypeError, match=f"this FastConformer{kind} cannot be searched: it is in training mode"
    ):
        decoding.parakeet_generate(model, torch.zeros(1, 3, SIZES["hidden_size"], dtype=torch.float64))
