# SPDX-License-Identifier: Apache-2.0
"""Encoders of every kind of module, small enough for tests: shaped as Zipformer-S, as M, and causal."""

import copy

import torch
from steps import numbers

import fastasr

_COMMON = {
    "output_downsampling_factor": 2,
    "query_head_dim": (8,),
    "pos_head_dim": (4,),
    "value_head_dim": (6,),
    "pos_dim": 16,
    "warmup_batches": 4000.0,
}
# One width after the first stack; the last stack is as wide as any.
SMALL = {
    **_COMMON,
    "downsampling_factor": (1, 2, 4),
    "encoder_dim": (24, 32, 32),
    "num_encoder_layers": (2, 1, 1),
    "encoder_unmasked_dim": (24, 24, 24),
    "num_heads": (2, 2, 4),
    "feedforward_dim": (32, 48, 48),
    "cnn_module_kernel": (7, 7, 5),
}
# Widths rise and fall: the output takes its upper channels from an earlier stack.
MEDIUM = {
    **_COMMON,
    "downsampling_factor": (1, 2, 4, 2),
    "encoder_dim": (24, 32, 48, 32),
    "num_encoder_layers": (1, 1, 1, 1),
    "encoder_unmasked_dim": (24, 24, 32, 24),
    "num_heads": (2, 2, 4, 2),
    "feedforward_dim": (32, 48, 64, 48),
    "cnn_module_kernel": (9, 7, 5, 7),
}
CAUSAL = {**MEDIUM, "causal": True, "chunk_size": (8, 4, -1), "left_context_frames": (16, 32, -1)}
STREAMING = {**CAUSAL, "chunk_size": (8,), "left_context_frames": (16,)}
CONFIGS = {"S": SMALL, "M": MEDIUM, "causal": CAUSAL}
CHANNELS = 24


def batch(lengths=(37, 30, 12), channels=CHANNELS, seed=1, dtype=torch.float32):
    """Returns x (time, batch, channels), lengths, padding mask (batch, time)."""
    generator = numbers(seed)
    x = torch.randn(max(lengths), len(lengths), channels, generator=generator, dtype=torch.float64)
    lengths = torch.tensor(lengths)
    return x.to(dtype), lengths, torch.arange(x.shape[0]) >= lengths.unsqueeze(1)


def swapped(module, **options):
    """Returns a swapped copy of a module, whose own forward is replaced."""
    result = copy.deepcopy(module)
    assert fastasr.accelerate(result, **options)[""].status == "replaced"
    return result


def by_itself(module):
    """Returns a copy of which only the module's own forward is replaced, and no part's."""
    return swapped(module, only=lambda path, _: path == "")
