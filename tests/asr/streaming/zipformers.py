# SPDX-License-Identifier: Apache-2.0
"""Streaming Zipformers of the published sizes and odd ones, with weights that hide no error."""

import torch
from steps import numbers, seeded

from fastasr.models.zipformer import Conv2dSubsampling, Zipformer

BINS = 80
PUBLISHED = {
    "small": ((192, 256, 256, 256, 256, 256), (2, 2, 2, 2, 2, 2), (512, 768, 768, 768, 768, 768)),
    "medium": ((192, 256, 384, 512, 384, 256), (2, 2, 3, 4, 3, 2), (512, 768, 1024, 1536, 1024, 768)),
    "large": ((192, 256, 512, 768, 512, 256), (2, 2, 4, 5, 4, 2), (512, 768, 1536, 2048, 1536, 768)),
}


class Model(torch.nn.Module):
    def __init__(self, encoder_embed, encoder):
        super().__init__()
        self.encoder_embed = encoder_embed
        self.encoder = encoder


def published(size):
    dim, layers, feedforward = PUBLISHED[size]
    return _model(
        0,
        encoder_dim=dim,
        num_encoder_layers=layers,
        feedforward_dim=feedforward,
        downsampling_factor=(1, 2, 4, 8, 4, 2),
        num_heads=(4, 4, 4, 8, 4, 4),
        cnn_module_kernel=(31, 31, 15, 15, 15, 31),
        query_head_dim=32,
        value_head_dim=12,
        pos_head_dim=4,
        pos_dim=48,
    )


def odd(seed=0):
    """Nothing in it is a multiple of a vector's lanes; the widest stack is neither the first nor the last."""
    return _model(
        seed,
        encoder_dim=(36, 52, 44),
        num_encoder_layers=(1, 2, 1),
        feedforward_dim=(24, 40, 20),
        downsampling_factor=(1, 2, 1),
        num_heads=(2, 3, 1),
        cnn_module_kernel=(5, 7, 3),
        query_head_dim=(10, 6, 7),
        value_head_dim=(20, 5, 16),
        pos_head_dim=(3, 4, 2),
        pos_dim=16,
    )


def _model(seed, **arguments):
    seeded(seed)
    encoder = Zipformer(**arguments, encoder_unmasked_dim=arguments["encoder_dim"], causal=True)
    model = Model(Conv2dSubsampling(BINS, arguments["encoder_dim"][0]), encoder)
    return liven(model).eval()


@torch.no_grad()
def liven(model):
    """Moves initial values that are zero, equal or tiny, which would hide errors."""
    for name, parameter in model.named_parameters():
        if name.endswith(("chunkwise_conv_scale", "sample.bias", "sample_output.bias")):
            parameter.normal_(0, 0.2)
        elif "bypass_scale" in name:
            parameter.uniform_(0.3, 0.9)
        elif "norm.log_scale" in name:
            parameter.uniform_(-0.5, 0.5)
        elif "out_proj.weight" in name:
            parameter.mul_(4.0)
        elif "self_attn_weights.in_proj.weight" in name:
            parameter.mul_(2.0)
    return model


def features(streams, steps, chunk_size, seed=0, bins=BINS):
    generator = numbers(seed)
    return [torch.randn(streams, 2 * chunk_size + 13, bins, generator=generator) for _ in range(steps)]
