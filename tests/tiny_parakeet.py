# SPDX-License-Identifier: Apache-2.0
"""Arguments of a tiny ``ParakeetEncoderConfig``, and those that leave nothing to chance in training."""

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
