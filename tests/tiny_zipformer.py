# SPDX-License-Identifier: Apache-2.0
"""Upstream's Zipformer from the ``zipformer`` package, small enough for tests, its published size M, and a tiny
ZipVoice. ``tests/families.py`` says what a maker returns."""

import importlib.util
import sys

import pytest
import torch
from steps import draws, maker, numbers, seeded, set_batch_count
from tiny_recogniser import RECOGNISER, WHOLE
from upstream_precision import computing_in

import fastasr.compat.k2
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


def zipformer(lengths=None):
    pytest.importorskip("zipformer")
    x, of_batch = batch()
    lengths = of_batch if lengths is None else torch.tensor(lengths)
    return tiny(), lambda model: [model(x, lengths)[0]]


def causal_zipformer():
    """A chunk of a stream in eval mode, whole recordings in training."""
    module = pytest.importorskip("zipformer.modules.zipformer")
    chunks = {"causal": True, "chunk_size": (8,), "left_context_frames": (16,)}
    with plain_swoosh():
        made = set_batch_count(module.Zipformer(**TINY, **chunks, dropout=0.1), 20000.0)
    x, lengths = torch.randn(32, 2, 32, generator=numbers(1)), torch.tensor([32, 32])
    of_chunk = torch.tensor([16, 16])
    mask = torch.zeros(2, 32, dtype=torch.bool)
    start = made.get_init_states(2)

    def run(model):
        if model.training:
            return [model(x, lengths, mask)[0]]
        found, states = [], [state.clone() for state in start]
        for chunk in x.split(16):
            y, _, states = model.streaming_forward(chunk, of_chunk, states, mask)
            found.append(y)
        return found

    return made, run


def zipformer_recogniser():
    """The losses of an AsrModel with a transducer; k2's are those of fastasr.compat."""
    module = pytest.importorskip("zipformer.modules.model")
    sizes = RECOGNISER | WHOLE | {"feature_dim": 20, "vocab_size": 11}
    with plain_swoosh():
        made = set_batch_count(module.AsrModel(**sizes), 20000.0)
    x, lengths = torch.randn(2, 60, 20, generator=numbers(1)), torch.tensor([60, 52])

    def run(model):
        module.k2 = fastasr.compat.k2
        return list(model(x, lengths, [[3, 5, 5, 2], [7, 1]], prune_range=3)[:2])

    return made, run


@maker
def zipvoice(time=2, padded=True, stream=None, **options):
    """ZipVoice's decoder or encoders. ``time``: the dimensions of the time step, or None without. ``stream``: the pairs
    of widths of the dialogue model, and which of them the input has."""
    pytest.importorskip("zipvoice")
    from zipvoice.models.modules import zipformer as of_one
    from zipvoice.models.modules import zipformer_two_stream as of_two

    sizes = {"downsampling_factor": (1, 2, 1), "num_encoder_layers": (1, 2, 1), "num_heads": 4}
    sizes |= {"encoder_dim": 32, "query_head_dim": 8, "value_head_dim": 6, "feedforward_dim": 48}
    sizes |= {"cnn_module_kernel": (7, 5, 7), "pos_dim": 16, "time_embed_dim": 12}
    sizes |= {"use_time_embed": time is not None, "in_dim": 10, "out_dim": 6}
    if stream is None:
        model, width = of_one.TTSZipformer(**sizes | options), 10
    else:
        (first, second), which = stream
        model = of_two.TTSZipformerTwoStream(**sizes | {"in_dim": (first, second), "out_dim": (6, 12)})
        width = stream[0][which]
    x = torch.randn(2, 21, width, generator=numbers(1))
    t = None if time is None else torch.rand((2, 21)[:time], generator=numbers(2))
    padding = torch.arange(21) >= torch.tensor([21, 15])[:, None] if padded else None
    return model, lambda model: [model(x, t, padding)]
