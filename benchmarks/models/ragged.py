# SPDX-License-Identifier: Apache-2.0
"""Encoders on batches of recordings of unequal length: upstream and swapped on the padded batch, and swapped without
padding (``accelerate(ragged=True)``), in inference and for a training step.

Lengths are drawn like those of LibriSpeech (log-normal, 12 s ± 4 s) or are short commands (0.5 to 1.5 s). A batch is
drawn as it comes, or sorted: the middle one of eight batches of recordings in the order of length, as bucketing makes
them. The floor of all rows is the time of the products on the frames that exist.
"""

import copy
import math
import random
from collections.abc import Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.encoders import ENCODERS
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.models import fast_conformer
from fastasr.benchmarks.models.unit import (
    BOTH,
    FASTASR,
    FORWARD,
    UPSTREAM,
    Run,
    benchmark,
    inference,
    product_flops,
    swapped,
    weighted_step,
)
from fastasr.benchmarks.rows import Row

NAME = "ragged"
RAGGED = "fastasr, ragged"
LIBRISPEECH, COMMANDS = "LibriSpeech-like", "short commands"
SIZES = "110M", "medium", "0.6B"  # of Parakeet and w2v-BERT, of which LAYERS layers run, and of Zipformer
LAYERS = 6
# kind of lengths, recordings
KINDS = ((LIBRISPEECH, 16), (COMMANDS, 64))
QUICK = {"sizes": ("tiny", "tiny", "0.6B"), "layers": 1, "kinds": ((COMMANDS, 3),)}


def seconds(kind: str, count: int, ordered: bool) -> list[float]:
    """Returns the lengths of a batch, the same in every run."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(8 * count, generator=generator)
    if kind == LIBRISPEECH:
        variance = math.log1p((4 / 12) ** 2)
        drawn = torch.exp(math.log(12) - variance / 2 + variance**0.5 * drawn)
    else:
        drawn = 0.5 + torch.rand(8 * count, generator=generator)
    if ordered:
        drawn = drawn.sort().values[4 * count :]
    return drawn[:count].tolist()


def batch_of(lengths: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features of 100 frames a second, 0 in padding, and the mask."""
    frames = torch.tensor(lengths).mul(100).long()
    mask = torch.arange(int(frames.max())) < frames[:, None]
    x = torch.randn(*mask.shape, 80, generator=torch.Generator().manual_seed(1))
    return x * mask[..., None], mask.long()


def _parakeet(size: str, layers: int, lengths: list[float]) -> tuple[torch.nn.Module, tuple, float]:
    """Returns the encoder, its inputs, and the share of frames that exist."""
    x, mask = batch_of(lengths)
    return fast_conformer.encoder(size, layers), (x, mask), mask.sum().item() / mask.numel()


def _zipformer(size: str, layers: int, lengths: list[float]) -> tuple[torch.nn.Module, tuple, float]:
    """Returns encoder, inputs and share for Zipformer behind its front end, which gives 50 frames a second."""
    encoder = upstream.zipformer(size, inner_compile=False).encoder
    frames = torch.tensor(lengths).mul(50).long()
    mask = torch.arange(int(frames.max())) >= frames[:, None]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(mask.shape[1], len(frames), encoder.encoder_dim[0], generator=generator)
    return encoder.eval(), (x, frames, mask), 1 - mask.sum().item() / mask.numel()


def _w2v_bert(size: str, layers: int, lengths: list[float]) -> tuple[torch.nn.Module, tuple, float]:
    """Returns the same for w2v-BERT 2.0, which has one size and stacks two of 100 frames a second."""
    x, mask = batch_of(lengths)
    frames = x.shape[1] // 2
    x, mask = x[:, : 2 * frames].reshape(len(x), frames, -1), mask[:, : 2 * frames : 2]
    return ENCODERS["w2v-bert-2"].model(layers), (x, mask), mask.sum().item() / mask.numel()


CASES = {"Parakeet's encoder": _parakeet, "Zipformer's encoder": _zipformer, "w2v-BERT's encoder": _w2v_bert}


@benchmark(NAME)
def measure(
    run: Run, *, sizes: tuple = SIZES, layers: int = LAYERS, kinds: tuple = KINDS
) -> Iterator[list[Row]]:
    """Yields the rows of each encoder for each kind of lengths. Raises ``upstream.MissingUpstream``."""
    for (case, made), size in zip(CASES.items(), sizes, strict=True):
        for kind, count in kinds:
            for ordered in (False, True):
                order = "sorted" if ordered else "unsorted"
                lengths = seconds(kind, count, ordered)
                shape = f"{size}, {count} {kind}, {order}"
                passes = [pass_ for pass_ in (FORWARD, BOTH) if not run.skip(case, shape, pass_)]
                if passes:
                    shipped, inputs, share = made(size, layers, lengths)
                for pass_ in passes:
                    yield _rows(run, case, shape, pass_, shipped, inputs, share)


def _rows(run, case, shape, pass_, shipped, inputs, share):
    models = {UPSTREAM: shipped, FASTASR: swapped(shipped), RAGGED: copy.deepcopy(shipped)}
    _accelerate(models[RAGGED])
    runs = {key: inference(model.eval(), *inputs) for key, model in models.items()}
    if pass_ == BOTH:
        weight = torch.randn_like(runs[UPSTREAM]()[0])
        runs = {key: _seeded(weighted_step(model.train(), weight, *inputs)) for key, model in models.items()}
    for key, call in runs.items():
        run.report(f"{NAME}: {case}, {shape}, {pass_}: first call of {key}")
        call()
    flops = round(share * product_flops(runs[UPSTREAM]))
    return run.rows(
        {key: Variant(call) for key, call in runs.items()},
        flops,
        case=case,
        shape=shape,
        pass_=pass_,
        reps=run.reps or min(run.settings.reps, 7),
    )


def _seeded(step):
    """Seeds every step with the same random numbers, so that all drop the same layers and run the same regularisers."""

    def run():
        torch.manual_seed(0)
        random.seed(0)
        step()

    return run


def _accelerate(model):
    import fastasr

    fastasr.accelerate(model, ragged=True)
