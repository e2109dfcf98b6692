# SPDX-License-Identifier: Apache-2.0
"""Recognisers with an encoder and a decoder, handed over whole: one call swaps parts of both, no part fails
verification, and a search finds upstream's tokens."""

import argparse
import copy

import nemo_encoder
import pytest
import torch
from steps import moved, numbers, seeded
from tiny_conformers import nemo_conformer, with_position_biases
from tiny_decoders import speechbrain_recogniser

import fastasr

WIDTH, HEADS, TOKENS, MELS = 16, 2, 19, 20
X = torch.randn(2, 64, MELS, generator=numbers(1))
LENGTHS = torch.tensor([64, 48])
LABELS = torch.randint(1, TOKENS - 1, (2, 5), generator=numbers(2))


def espnet():
    home = pytest.importorskip("espnet2.asr.espnet_model")
    from espnet.nets.batch_beam_search import BatchBeamSearch
    from espnet2.asr.ctc import CTC
    from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
    from espnet2.asr.encoder.conformer_encoder import ConformerEncoder

    sizes = {"attention_heads": HEADS, "linear_units": 32, "num_blocks": 1}
    unused = dict.fromkeys(("frontend", "specaug", "normalize", "preencoder", "postencoder", "joint_network"))
    model = home.ESPnetASRModel(
        TOKENS,
        [str(i) for i in range(TOKENS)],
        encoder=ConformerEncoder(MELS, WIDTH, rel_pos_type="latest", **sizes),
        decoder=TransformerDecoder(TOKENS, WIDTH, **sizes),
        ctc=CTC(TOKENS, WIDTH),
        report_cer=False,
        report_wer=False,
        **unused,
    )

    def search(model):
        frames, _ = model.encode(X[:1], LENGTHS[:1])
        found = BatchBeamSearch(
            {"decoder": model.decoder},
            {"decoder": 1.0},
            4,
            TOKENS,
            model.sos,
            model.eos,
            pre_beam_score_key=None,
        )
        return [hyp.yseq.tolist() for hyp in found(frames[0], maxlenratio=0.5)]

    batch = {"speech": X, "speech_lengths": LENGTHS, "text": LABELS, "text_lengths": torch.tensor([5, 4])}
    return model, search, batch


def speechbrain():
    model, last = speechbrain_recogniser(TOKENS, WIDTH, MELS, layers=1)
    searches = pytest.importorskip("speechbrain.decoders.seq2seq")
    searcher = searches.S2STransformerBeamSearcher(
        [model, last], 1.0, bos_index=1, eos_index=2, min_decode_ratio=0.1, max_decode_ratio=0.2, beam_size=4
    )
    lengths = LENGTHS / len(X[0])

    def search(mods):
        return mods["decoder"](mods["encoder"].encode(X, lengths), lengths)[0]

    def both(mods):
        _, y = mods["encoder"](X, LABELS, lengths)
        return mods["decoder"].fc(y)

    return torch.nn.ModuleDict({"encoder": model, "decoder": searcher}), search, both


def firered():
    home = pytest.importorskip("fireredasr.models.fireredasr_aed")
    sizes = {
        "idim": MELS,
        "odim": TOKENS,
        "d_model": WIDTH,
        "n_head": HEADS,
        "n_layers_enc": 1,
        "n_layers_dec": 1,
    }
    rates = {"residual_dropout": 0.1, "dropout_rate": 0.1, "kernel_size": 5, "pe_maxlen": 64}
    tokens = {"sos_id": 3, "eos_id": 4, "pad_id": 2}
    model = home.FireRedAsrAed.from_args(argparse.Namespace(**sizes, **rates, **tokens))

    def search(model):
        found = model.transcribe(X, LENGTHS, beam_size=3, nbest=2, decode_max_len=7)
        return [hyp["yseq"].tolist() for hyps in found for hyp in hyps]

    return model, search, search


def nemo():
    """The parts of Canary, as its model holds them."""
    encoder = nemo_conformer()
    decoders, modules, generators = nemo_encoder.load_decoder()
    width = encoder.d_model
    decoder = torch.nn.ModuleDict(
        {
            "_embedding": modules.TransformerEmbedding(TOKENS, width, 32),
            "_decoder": decoders.TransformerDecoder(1, width, 32, HEADS, pre_ln=True),
        }
    )
    last = generators.TokenClassifier(width, TOKENS)
    kind = type("Greedy", (generators.GreedySequenceGenerator,), {"_init_confidence_method": lambda *_: None})
    x = torch.randn(2, encoder._feat_in, 64, generator=numbers(1))

    def search(model):
        frames, lengths = model["encoder"](audio_signal=x, length=LENGTHS)
        mask = (torch.arange(frames.shape[-1]) < lengths[:, None]).float()
        generate = kind(*model["transf_decoder"].values(), model["log_softmax"], max_sequence_length=9)
        return generate(encoder_hidden_states=frames.transpose(1, 2), encoder_input_mask=mask)[0].tolist()

    parts = {"encoder": encoder, "transf_decoder": decoder, "log_softmax": last}
    return torch.nn.ModuleDict(parts), search, search


RECOGNISERS = {made.__name__: made for made in (espnet, speechbrain, firered, nemo)}


@pytest.mark.parametrize("name", RECOGNISERS)
@torch.no_grad()
def test_a_whole_recogniser(name):
    seeded(name)
    model, search, inputs = RECOGNISERS[name]()
    moved(with_position_biases(model), 0.2).eval()
    expected = search(model)
    assert len(expected[0]) > 2
    report = fastasr.accelerate(model, verify=inputs)
    assert not report.rolled_back
    for part in ("encoder", "decoder"):  # beside linear layers
        assert any(part in row.path and row.class_name != "Linear" for row in report.replaced), part
    assert not [row for row in report.skipped if "known version" in row.reason]
    assert search(model) == expected
    assert search(copy.deepcopy(model)) == expected
    fastasr.restore(model)
    assert search(model) == expected
