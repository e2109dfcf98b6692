# SPDX-License-Identifier: Apache-2.0
"""torchaudio's wav2vec 2.0, Emformer and RNN-T, small enough for tests. ``tests/families.py`` says what a
maker returns."""

import pytest
import tiny_emformer_rnnt
import torch
from steps import maker, numbers
from tiny_transformers import HEADS, HIDDEN, WIDTH


@maker
def torchaudio_wav2vec2(make="wav2vec2_model", lengths=(400, 310, 90), masked=True, **options):
    """torchaudio's wav2vec 2.0, HuBERT and, without lengths, WavLM, on the waveform."""
    models = pytest.importorskip("torchaudio.models")
    sizes = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [(16, 4, 2), (12, 3, 2), (20, 2, 2)],
        "extractor_conv_bias": False,
        "encoder_embed_dim": WIDTH,
        "encoder_pos_conv_kernel": 4,
        "encoder_pos_conv_groups": 2,
        "encoder_num_layers": 2,
        "encoder_num_heads": HEADS,
        "encoder_ff_interm_features": HIDDEN,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
        "encoder_attention_dropout": 0.0,
        "aux_num_out": None,
    }
    parts = ("projection_dropout", "ff_interm_dropout", "dropout")
    sizes |= {f"encoder_{part}": 0.1 for part in parts}
    if make == "wavlm_model":
        sizes |= {"encoder_num_buckets": 8, "encoder_max_distance": 10}
    model = getattr(models, make)(**sizes | options)
    x = torch.randn(len(lengths), max(lengths), generator=numbers(1))
    given = (torch.tensor(lengths),) if masked else ()
    return model, lambda model: [model(x, *given)[0]]


LARGE = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}


def emformer(streams=False):
    """Whole utterances, or the segments of a stream."""
    module = pytest.importorskip("torchaudio.models.emformer")
    sizes = {"left_context_length": 5, "right_context_length": 2, "max_memory_size": 2, "dropout": 0.1}
    x, lengths, of_segment = (
        torch.randn(3, 23, 12, generator=numbers(1)),
        *map(torch.tensor, ([21, 15, 9], [6] * 3)),
    )

    def segments(model):
        states, found = None, []
        for begin in range(0, 12, 4):
            y, _, states = model.infer(x[:, begin : begin + 6], of_segment, states)
            found.append(y)
        return found

    made = module.Emformer(12, 3, 20, 2, 4, **sizes)
    return made, segments if streams else lambda model: [model(x, lengths)[0]]


def emformer_rnnt():
    module = pytest.importorskip("torchaudio.models.rnnt")
    x, lengths = torch.randn(2, 40, 6, generator=numbers(1)), torch.tensor([36, 28])
    labels, counts = torch.randint(0, 9, (2, 5), generator=numbers(2)), torch.tensor([5, 3])

    def run(model):
        return [model(x, lengths, labels, counts)[0]]

    return tiny_emformer_rnnt.tiny(module), run
