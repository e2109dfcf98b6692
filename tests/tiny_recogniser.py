# SPDX-License-Identifier: Apache-2.0
"""The arguments of an AsrModel that is small enough for tests, and of one that streams."""

RECOGNISER = {
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
    "decoder_dim": 16,
    "joiner_dim": 20,
}
WHOLE = {"chunk_size": "-1", "left_context_frames": "-1"}
STREAMING = {"causal": True, "chunk_size": "8", "left_context_frames": "16"}
