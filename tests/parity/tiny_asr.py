# SPDX-License-Identifier: Apache-2.0
"""Recognisers of every kind, small enough for tests, and a batch for them."""

import torch

VOCABULARY = 19
_COMMON = {
    "feature_dim": 20,
    "downsampling_factor": "1,2",
    "encoder_dim": "16,24",
    "num_encoder_layers": "1,1",
    "encoder_unmasked_dim": "16,16",
    "query_head_dim": "6",
    "pos_head_dim": "4",
    "value_head_dim": "4",
    "num_heads": "2,2",
    "feedforward_dim": "24,32",
    "cnn_module_kernel": "7,5",
    "pos_dim": 12,
    "chunk_size": "-1",
    "left_context_frames": "-1",
    "vocab_size": VOCABULARY,
    "decoder_dim": 16,
    "joiner_dim": 20,
    "attention_decoder_dim": 16,
    "attention_decoder_attention_dim": 16,
    "attention_decoder_num_heads": 2,
    "attention_decoder_feedforward_dim": 24,
}
TRANSDUCER = {**_COMMON}
CTC = {**_COMMON, "use_transducer": False, "use_ctc": True}
ALL = {**_COMMON, "use_ctc": True, "use_attention_decoder": True, "label_smoothing": 0.1, "context_size": 1}
STREAMING = {**_COMMON, "use_ctc": True, "causal": True, "chunk_size": "8", "left_context_frames": "16"}
CONFIGS = {"transducer": TRANSDUCER, "CTC": CTC, "all": ALL, "streaming": STREAMING}
LENGTHS = (75, 61, 40)
TOKENS = [[3, 5, 5, 2, 9], [7, 1, 1], [4, 4]]


def batch(lengths=LENGTHS, features=20, seed=1, dtype=torch.float32):
    """Returns x (batch, time, features), lengths, tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), features, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.tensor(lengths), [list(tokens) for tokens in TOKENS[: len(lengths)]]
