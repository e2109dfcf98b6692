# SPDX-License-Identifier: Apache-2.0
"""Models that the tests hand to ``fastasr swap``."""

import torch
from zipformer.modules import scaling

not_callable = 3


class Small(torch.nn.Module):
    """A linear layer, BiasNorm and SwooshL: what a rule recognises."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(16, 24)
        self.norm = scaling.BiasNorm(24)
        self.activation = scaling.SwooshL()

    def forward(self, x):
        return self.activation(self.norm(self.linear(x)))


def model():
    return Small().eval()


def inputs():
    return torch.randn(5, 2, 16)


def inputs_by_name():
    return {"x": torch.randn(5, 2, 16)}


def wrong_inputs():
    return torch.randn(5, 2, 3)


def espnet_decoder():
    from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder

    torch.manual_seed(0)
    decoder = MEGADecoder(20, block_size=32, linear_size=48, qk_size=16, v_size=64, num_blocks=2)
    with torch.no_grad():
        for p in decoder.parameters():
            p += 0.3 * torch.randn_like(p)
    return decoder.eval()


def labels():
    return torch.randint(1, 20, (2, 9))


def unknown_model():
    return torch.nn.Sequential(torch.nn.ReLU())


def broken_model():
    raise RuntimeError("no checkpoint here")


def not_a_model():
    return 3


def espnet_e_branchformer():
    from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder

    torch.manual_seed(0)
    sizes = {"cgmlp_linear_units": 96, "cgmlp_conv_kernel": 7, "linear_units": 64, "num_blocks": 2}
    return EBranchformerEncoder(20, 32, use_ffn=True, macaron_ffn=True, **sizes).eval()


def features():
    return torch.randn(2, 60, 20), torch.tensor([60, 45])
