# SPDX-License-Identifier: Apache-2.0
"""Encoders of every kind of module, small enough for tests: shaped as Zipformer-S, as M, and causal."""

import random

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
CAUSAL = {
    **MEDIUM,
    "causal": True,
    "chunk_size": (8, 4, -1),
    "left_context_frames": (16, 32, -1),
}
STREAMING = {**CAUSAL, "chunk_size": (8,), "left_context_frames": (16,)}
CONFIGS = {"S": SMALL, "M": MEDIUM, "causal": CAUSAL}
CHANNELS = 24


def seeded(seed):
    random.seed(seed)
    torch.manual_seed(seed)


def draws():
    return random.getstate(), torch.get_rng_state().tolist()


def batch(lengths=(37, 30, 12), channels=CHANNELS, seed=1, dtype=torch.float32):
    """Returns x (time, batch, channels), lengths, padding mask (batch, time)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(max(lengths), len(lengths), channels, generator=generator, dtype=torch.float64)
    lengths = torch.tensor(lengths)
    return x.to(dtype), lengths, torch.arange(x.shape[0]) >= lengths.unsqueeze(1)


def randomized(model, seed=3):
    """Returns the model with every parameter moved, so that none is at its initial 0 or 0.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def set_batch_count(model, count):
    """Sets the batch count as icefall's train.py does."""
    for name, module in model.named_modules():
        if hasattr(module, "batch_count"):
            module.batch_count = count
        if hasattr(module, "name"):
            module.name = name
    return model


def relative_error(actual, expected):
    scale = expected.abs().max().clamp_min(1e-12) if expected.numel() else torch.tensor(1.0)
    return ((actual - expected).abs().max() / scale).item() if expected.numel() else 0.0


class InFp64(TorchDispatchMode):
    """Makes casts of fp64 tensors to fp32, as in the backward passes of upstream's softmax and regularisers, copy
    instead.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float32
        if cast and args[0].dtype is torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
