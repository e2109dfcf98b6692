# SPDX-License-Identifier: Apache-2.0
"""Small MEGA decoders whose parameters all matter, and comparisons of the results of a step."""

import copy

import pytest
import torch

import fastasr
from fastasr.models.mega import MEGADecoder, decoding

SIZES = {"vocab_size": 50, "block_size": 40, "linear_size": 72, "qk_size": 24, "v_size": 100, "num_blocks": 3}
KINDS = [
    {},
    {"rel_pos_bias_type": "rotary"},
    {"chunk_size": 5},
    {"rel_pos_bias_type": "rotary", "chunk_size": 4},
]
KIND_IDS = ["simple", "rotary", "simple-chunked", "rotary-chunked"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def randomised(decoder):
    """Randomises biases and norms, and leaves no row of zeros in the embedding: ESPnet's initial values are
    ill-conditioned.
    """
    for name, parameter in decoder.named_parameters():
        if "normalization.weight" in name or "final_norm.weight" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim == 1 or "qk_bias" in name:
            parameter.normal_(std=0.2)
        elif "weight" in name:
            parameter.normal_(std=0.3 if "embed" in name else 0.15)
    return decoder.eval()


def ours(phantom=False, **options):
    return randomised(MEGADecoder(**SIZES | options, phantom_first_step=phantom))


def espnet(**options):
    pytest.importorskip("typeguard", reason="upstream's packages are not installed")
    module = pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")
    return randomised(module.MEGADecoder(**SIZES | options))


def labels_of(batch=1):
    return torch.randint(1, SIZES["vocab_size"], (batch, 1))


def unbatched(states):
    """Converts the states of ``init_state`` or of a batch of one to those of one hypothesis, as ``select_state``."""
    ranks = {"ema_state": 2, "prev_key": 2, "prev_value": 2}
    return [
        {name: t.squeeze(0) if t.ndim > ranks.get(name, t.ndim) else t for name, t in state.items()}
        for state in states
    ]


def block_by_block(decoder, labels, states):
    """Runs the path that ``step`` replaces."""
    decoder.packed_decoding = False
    try:
        return decoder.inference(labels, states)
    finally:
        del decoder.packed_decoding


def same(got, expected, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance or TOLERANCE)


def bits(got, expected):
    same(got, expected, rtol=0, atol=0)


def copied(states):
    return [{name: tensor.clone() for name, tensor in state.items()} for state in states]


def current(decoder):
    labels, states = labels_of(2), decoder.init_state(2)
    same(decoding.step(decoder, labels, states), block_by_block(decoder, labels, states))


def _optimizer(decoder):
    for parameter in decoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(decoder.parameters(), lr=0.1).step()


def _new_parameter(decoder):
    feed_forward = decoder.mega_blocks[1][1]
    feed_forward.linear1.weight = torch.nn.Parameter(torch.randn_like(feed_forward.linear1.weight))


def _new_module(decoder):
    mega = decoder.mega_blocks[2][0]
    mega.proj_h = torch.nn.Linear(mega.v_size, mega.size)


def _new_block(decoder):
    decoder.mega_blocks[1] = copy.deepcopy(ours().mega_blocks[0])


def _new_data(decoder):
    weight = decoder.mega_blocks[0][0].proj_v.weight
    weight.data = torch.randn_like(weight)


def _there_and_back(decoder):
    decoder.double()
    decoder.mega_blocks[0][0].qk_bias.mul_(-3)
    decoder.float()


# arguments that change what a decoder computes
CHANGES = {
    "load_state_dict": lambda decoder: decoder.load_state_dict(ours().state_dict()),
    "assign": lambda decoder: decoder.load_state_dict(ours().state_dict(), assign=True),
    "optimizer": _optimizer,
    "to": _there_and_back,
    "embed": lambda decoder: decoder.embed.weight.neg_(),
    "average": lambda decoder: decoder.mega_blocks[0][0].multihead_damped_ema.damping_factor.add_(1),
    "bias": lambda decoder: decoder.mega_blocks[2][0].rel_pos_bias.relative_position_bias.mul_(9),
    "final_norm": lambda decoder: decoder.final_norm.bias.add_(1),
    "new parameter": _new_parameter,
    "new module": _new_module,
    "new block": _new_block,
    "new data": _new_data,
    "eps": lambda decoder: (setattr(decoder.final_norm, "eps", 0.5), fastasr.refresh(decoder)),
    "written through .data": lambda decoder: decoder.final_norm.weight.data.neg_(),
}
