# SPDX-License-Identifier: Apache-2.0
"""A tiny RNN-T of torchaudio with an Emformer."""


def tiny(rnnt, **sizes):
    """Returns a model of ``rnnt``, torchaudio.models.rnnt or our package, with these sizes in place of its own."""
    options = {
        "input_dim": 6,
        "encoding_dim": 14,
        "num_symbols": 9,
        "segment_length": 8,
        "right_context_length": 4,
        "time_reduction_input_dim": 8,
        "time_reduction_stride": 2,
        "transformer_num_heads": 2,
        "transformer_ffn_dim": 12,
        "transformer_num_layers": 1,
        "transformer_dropout": 0.1,
        "transformer_activation": "gelu",
        "transformer_left_context_length": 5,
        "transformer_max_memory_size": 0,
        "transformer_weight_init_scale_strategy": "depthwise",
        "transformer_tanh_on_mem": True,
        "symbol_embedding_dim": 12,
        "num_lstm_layers": 2,
        "lstm_layer_norm": True,
        "lstm_layer_norm_epsilon": 1e-3,
        "lstm_dropout": 0.3,
    }
    return rnnt.emformer_rnnt_model(**options | sizes)
