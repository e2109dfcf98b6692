# SPDX-License-Identifier: Apache-2.0
"""Tiny FastConformers of transformers: Parakeet's encoder and transducers, Nemotron's and LASR's encoder.
``SIZES`` are arguments of a ``ParakeetEncoderConfig``, ``STILL`` those that leave nothing to chance in training;
``tests/families.py`` says what a maker returns."""

import pytest
import torch
from steps import maker, numbers
from tiny_transformers import batch, transformers_encoder

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_mel_bins": 16,
    "subsampling_conv_channels": 8,
    "conv_kernel_size": 5,
}
STILL = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout", "layerdrop"), 0.0)


def transducer(kind, sizes, **options):
    """Returns a ``ParakeetForTDT`` or ``ParakeetForRNNT`` behind an encoder of these sizes."""
    transformers = pytest.importorskip("transformers")
    durations = {"durations": [0, 1, 2, 3, 4]} if kind == "TDT" else {}
    config = getattr(transformers, f"Parakeet{kind}Config")(
        vocab_size=12,
        decoder_hidden_size=9,
        num_decoder_layers=1,
        blank_token_id=11,
        pad_token_id=11 if kind == "RNNT" else 0,
        encoder_config={**sizes, "scale_input": False},
        **durations,
        **options,
    )
    return getattr(transformers, f"ParakeetFor{kind}")(config)


def parakeet(lengths=(75, 50, 9), **options):
    names = "parakeet", "ParakeetEncoder", "ParakeetEncoderConfig"
    model = transformers_encoder(*names, SIZES, None, **options)
    x, mask = batch(lengths, SIZES["num_mel_bins"])
    return model, lambda model: [model(x, attention_mask=mask.long()).last_hidden_state]


@maker
def parakeet_transducer(kind):
    """The loss in training, ``generate`` in eval mode."""
    model = transducer(kind, SIZES | {"num_hidden_layers": 1})
    model.generation_config.decoder_start_token_id = 11
    if kind == "TDT":
        model.generation_config.suppress_tokens = list(range(12, 17))
    with torch.no_grad():
        for parameter in [*model.decoder.parameters(), *model.joint.parameters()]:
            parameter.normal_(std=0.8)
        model.encoder_projector.weight.normal_(std=2.0)
    lengths = torch.tensor([90, 61, 75])
    labels = torch.randint(1, 11, (3, 4), generator=numbers(2))
    inputs = {
        "input_features": torch.randn(3, 90, SIZES["num_mel_bins"], generator=numbers(1)),
        "attention_mask": (torch.arange(90) < lengths[:, None]).long(),
    }
    contexts = torch.nn.functional.pad(labels, (1, 0), value=11)

    def run(model):
        if not model.training:
            return [model.generate(**inputs, max_new_tokens=20).sequences.float()]
        import fastasr.compat.torchaudio

        fastasr.compat.torchaudio.install()  # upstream's RNN-T loss needs a torchaudio
        try:
            return [model(**inputs, decoder_input_ids=contexts, labels=labels).loss]
        finally:
            fastasr.compat.torchaudio.uninstall()

    return model, run


def nemotron(**options):
    pytest.importorskip("transformers.models.nemotron_asr_streaming")
    from transformers import NemotronAsrStreamingEncoder
    from transformers.models.nemotron_asr_streaming import (
        configuration_nemotron_asr_streaming as configuration,
    )

    config = configuration.NemotronAsrStreamingEncoderConfig(**{**SIZES, "sliding_window": 15, **options})
    x, mask = batch((75, 50, 9), SIZES["num_mel_bins"])
    model = NemotronAsrStreamingEncoder(config)
    return model, lambda model: [model(input_features=x, attention_mask=mask.long()).last_hidden_state]


def lasr():
    shared = "subsampling_conv_channels", "num_mel_bins", "num_hidden_layers", "intermediate_size"
    sizes = {name: SIZES[name] for name in shared} | {"hidden_size": 24, "num_attention_heads": 2}
    sizes |= {"conv_kernel_size": 6, "layerdrop": 0.0}
    model = transformers_encoder("lasr", "LasrEncoder", "LasrEncoderConfig", sizes, None)
    x, mask = batch((75, 50, 30), sizes["num_mel_bins"])
    return model, lambda model: [model(x, attention_mask=mask).last_hidden_state]
