# SPDX-License-Identifier: Apache-2.0
"""A tiny E-Branchformer, Transformer and MEGA decoder of ESPnet, and its front ends.
``tests/families.py`` says what a maker returns."""

import copy

import pytest
import torch
from steps import maker, numbers
from tiny_transformers import HEADS, HIDDEN, WIDTH


def e_branchformer(**options):
    module = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")
    sizes = {"output_size": 24, "attention_heads": 3, "cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
    sizes |= {
        "num_blocks": 2,
        "linear_units": 28,
        "use_ffn": True,
        "macaron_ffn": True,
        "input_layer": "linear",
    }
    x, lengths = torch.randn(3, 27, 20, generator=numbers(1)), torch.tensor([27, 20, 11])
    model = module.EBranchformerEncoder(20, **sizes, **options)
    return model, lambda model: [model(x, lengths)[0]]


PLAIN_ATTENTION = {"attention_layer_type": "selfattn", "pos_enc_layer_type": "abs_pos"}  # as OWSM's


@maker
def espnet_transformer(lengths=(27, 20, 11), **options):
    module = pytest.importorskip("espnet2.asr.encoder.transformer_encoder")
    sizes = {"output_size": WIDTH, "attention_heads": HEADS, "linear_units": HIDDEN, "num_blocks": 2}
    x = torch.randn(len(lengths), max(lengths), 20, generator=numbers(1))
    model = module.TransformerEncoder(20, **sizes | {"input_layer": "linear"} | options)
    return model, lambda model: [model(x, torch.tensor(lengths))[0]]


class FrontEnds(torch.nn.Module):
    """Each of ESPnet's front ends on the same features."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x, mask):
        found = [layer(x, mask) for layer in self.layers]
        return [y * mask.transpose(1, 2) for (y, positions), mask in found]


def espnet_front_ends():
    module = pytest.importorskip("espnet.nets.pytorch_backend.transformer.subsampling")
    embedding = pytest.importorskip("espnet.nets.pytorch_backend.transformer.embedding")
    made = FrontEnds(
        getattr(module, f"Conv2dSubsampling{kind}")(
            20, WIDTH, 0.1, embedding.RelPositionalEncoding(WIDTH, 0.1)
        )
        for kind in ("", "1", "2", "6")
    )
    x, lengths = torch.randn(3, 27, 20, generator=numbers(1)), torch.tensor([27, 20, 11])
    mask = (torch.arange(27) < lengths.unsqueeze(1)).unsqueeze(1)
    return made, lambda model: model(x, mask)


def mega(**options):
    module = pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    labels = torch.randint(1, 12, (3, 9), generator=numbers(1))
    made = module.MEGADecoder(12, **sizes, num_blocks=2, max_positions=24, **options)
    start = made.init_state()

    def run(model):
        if model.training:
            return [model(labels)]
        model.score_cache.clear()
        found, states = [model(labels)], copy.deepcopy(start)
        for length in range(1, 4):
            y, states = model.score([0, 4, 7][:length], states)
            found.append(y)
        return found

    return made, run
