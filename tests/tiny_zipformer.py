# SPDX-License-Identifier: Apache-2.0
"""Upstream's Zipformer from the ``zipformer`` package, small enough for tests, and its published size M."""

import importlib.util
import sys

import torch
from steps import draws, numbers, seeded, set_batch_count
from upstream_precision import computing_in

from fastasr.benchmarks.upstream import MEDIUM, activations

TINY = {
    "output_downsampling_factor": 2,
    "downsampling_factor": (1, 2),
    "encoder_dim": (32, 48),
    "num_encoder_layers": (1, 1),
    "encoder_unmasked_dim": (24, 32),
    "query_head_dim": (8,),
    "pos_head_dim": (4,),
    "value_head_dim": (6,),
    "pos_dim": 16,
    "num_heads": (2, 2),
    "feedforward_dim": (48, 64),
    "cnn_module_kernel": (7, 7),
    "warmup_batches": 4000.0,
}


def plain_swoosh():
    """Keeps Swoosh functions plain by upstream's own switch: upstream compiles them when a module is built."""
    return activations(compiled=False)


class Encoder(torch.nn.Module):
    """Runs front end and encoder as upstream's AsrModel.forward_encoder does. x is (batch, time, features)."""

    def __init__(self, config, features, dim, channels, dropout=(0.3, 0.1)):
        from zipformer.modules.scaling import ScheduledFloat
        from zipformer.modules.subsampling import Conv2dSubsampling
        from zipformer.modules.zipformer import Zipformer

        super().__init__()
        dropout = ScheduledFloat((0.0, dropout[0]), (20000.0, dropout[1]))
        self.encoder_embed = Conv2dSubsampling(features, dim, *channels, dropout=dropout)
        self.encoder = Zipformer(**config, dropout=dropout)

    def forward(self, x, x_lens):
        from zipformer.utils import make_pad_mask

        x, x_lens = self.encoder_embed(x, x_lens)
        mask = make_pad_mask(x_lens)
        out, lens = self.encoder(x.permute(1, 0, 2), x_lens, mask)
        return out.permute(1, 0, 2), lens


def tiny(batch_count=20000.0, seed=0):
    """Returns a model with dropout 0.5: upstream rounds 1 / (1 - p) to fp32, which would show in fp64 with another
    rate.
    """
    seeded(seed)
    with plain_swoosh():
        return set_batch_count(Encoder(TINY, 20, 32, (4, 8, 16), dropout=(0.5, 0.5)), batch_count)


def medium():
    seeded(0)
    with plain_swoosh():
        return set_batch_count(Encoder(MEDIUM, 80, 192, ()), 20000.0)


def batch(seed=1):
    return torch.randn(2, 60, 20, generator=numbers(seed)), torch.tensor([60, 52])


def training_step(model, inputs, seed):
    """Returns loss, gradients by name, and the random states afterwards."""
    model.train()
    model.zero_grad(set_to_none=True)
    seeded(seed)
    with computing_in(inputs[0].dtype):
        out, _ = model(*inputs)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        loss = (out * weight).sum() / out.shape[1]
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, draws()


def from_file(path, monkeypatch):
    """Returns the module of a file, under the file's name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module
