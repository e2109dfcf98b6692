# SPDX-License-Identifier: Apache-2.0
"""Models that the tests hand to ``fastasr swap``."""

import torch
from zipformer.modules import scaling

not_callable = 3


class Small(torch.nn.Module):
    """A linear layer, BiasNorm and SwooshL, which rules recognise."""

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


def unknown_model():
    return torch.nn.Sequential(torch.nn.ReLU())


def broken_model():
    raise RuntimeError("no checkpoint here")


def not_a_model():
    return 3


def recogniser():
    from tiny_recogniser import RECOGNISER, WHOLE

    from fastasr.asr.recogniser import AsrModel

    return AsrModel(**RECOGNISER | WHOLE).eval()
