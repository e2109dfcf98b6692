# SPDX-License-Identifier: Apache-2.0
"""Recognisers of every kind, small enough for tests, and a batch for them."""

import tiny_recogniser
import torch
from steps import numbers
from tiny_recogniser import RECOGNISER, WHOLE

VOCABULARY = 19
_COMMON = (
    RECOGNISER
    | WHOLE
    | {
        "feature_dim": 20,
        "vocab_size": VOCABULARY,
        "attention_decoder_dim": 16,
        "attention_decoder_attention_dim": 16,
        "attention_decoder_num_heads": 2,
        "attention_decoder_feedforward_dim": 24,
    }
)
TRANSDUCER = {**_COMMON}
CTC = {**_COMMON, "use_transducer": False, "use_ctc": True}
ALL = {**_COMMON, "use_ctc": True, "use_attention_decoder": True, "label_smoothing": 0.1, "context_size": 1}
STREAMING = {**_COMMON, "use_ctc": True, **tiny_recogniser.STREAMING}
CONFIGS = {"transducer": TRANSDUCER, "CTC": CTC, "all": ALL, "streaming": STREAMING}
LENGTHS = (75, 61, 40)
TOKENS = [[3, 5, 5, 2, 9], [7, 1, 1], [4, 4]]


def batch(lengths=LENGTHS, features=20, seed=1, dtype=torch.float32):
    """Returns x (batch, time, features), lengths, tokens."""
    generator = numbers(seed)
    x = torch.randn(len(lengths), max(lengths), features, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.tensor(lengths), [list(tokens) for tokens in TOKENS[: len(lengths)]]
