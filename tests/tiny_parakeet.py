# SPDX-License-Identifier: Apache-2.0
"""Arguments of a tiny ``ParakeetEncoderConfig``, those that leave nothing to chance in training, and a transducer."""

import pytest

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
