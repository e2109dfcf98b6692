# SPDX-License-Identifier: Apache-2.0
"""Tiny searches of ESPnet and SpeechBrain with a decoder and a language model. ``tests/families.py`` says what a maker
returns."""

import pytest
import torch
from steps import numbers
from tiny_decoders import speechbrain_recogniser

WIDTH, TOKENS, FRAMES = 16, 19, 9


def speechbrain(name):
    """Returns a module of the package. Imported with this file, its lazy parts would be there for other tests."""
    return pytest.importorskip(f"speechbrain.{name}")


def speechbrain_lm(first=False, **options):
    home = speechbrain("lobes.models.transformer.TransformerLM")
    sizes = {"d_model": WIDTH, "nhead": 2, "num_encoder_layers": 2, "d_ffn": 32}
    return home.TransformerLM(TOKENS, **sizes, normalize_before=first, **options)


def speechbrain_search(beams=4, scorers=(), weights=None, first=True, **options):
    """Beam search, or greedy search for one beam."""
    home = speechbrain("decoders.seq2seq")
    sizes = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.9, "max_decode_ratio": 0.9}
    parts = [*speechbrain_recogniser(TOKENS, WIDTH, first=first)]
    if beams == 1:
        sizes |= {"min_decode_ratio": 0.0, "eos_index": -1}
        return home.S2STransformerGreedySearcher(parts, **sizes)
    scorer = None
    if scorers:
        scorer = speechbrain("decoders.scorer").ScorerBuilder(weights=weights, full_scorers=[*scorers])
    options = {"using_eos_threshold": False, "beam_size": beams} | options
    return home.S2STransformerBeamSearcher(parts, scorer=scorer, **sizes, **options)


def speechbrain_searches():
    """Both searches beside a language model, which alone is called."""
    ids = torch.randint(1, TOKENS, (2, 5), generator=numbers(1))
    parts = speechbrain_search(1), speechbrain_search(4), speechbrain_lm()
    return torch.nn.ModuleList(parts), lambda model: [model[2](ids)]


def espnet_lm(**options):
    home = pytest.importorskip("espnet2.lm.transformer_lm")
    sizes = {"embed_unit": 8, "att_unit": WIDTH, "head": 2, "unit": 32, "layer": 2}
    return home.TransformerLM(TOKENS, **sizes | options)


def espnet_search(batched=True, beams=4):
    home = pytest.importorskip("espnet.nets.batch_beam_search" if batched else "espnet.nets.beam_search")
    decoder = pytest.importorskip("espnet2.asr.decoder.transformer_decoder").TransformerDecoder
    sizes = {"attention_heads": 2, "linear_units": 32, "num_blocks": 2}
    scorers = {"decoder": decoder(TOKENS, WIDTH, **sizes), "lm": espnet_lm()}
    kind = home.BatchBeamSearch if batched else home.BeamSearch
    ends = TOKENS - 1, TOKENS - 1
    return kind(scorers, {"decoder": 1.0, "lm": 0.6}, beams, TOKENS, *ends, pre_beam_score_key=None)


def espnet_searches():
    """Both searches, of which the language model alone is called."""
    ids = torch.randint(1, TOKENS, (2, 5), generator=numbers(1))
    parts = espnet_search(batched=False), espnet_search()
    return torch.nn.ModuleList(parts), lambda model: [part.nn_dict.lm(ids, None)[0] for part in model]
