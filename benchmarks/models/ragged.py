# SPDX-License-Identifier: Apache-2.0
"""Encoders on batches of recordings of unequal length: upstream and swapped on the padded batch, and swapped without
padding (``accelerate(ragged=True)``), in inference and for a training step.

Lengths are drawn like those of LibriSpeech (log-normal, 12 s ± 4 s) or are short commands (0.5 to 1.5 s). A batch is
drawn as it comes, or sorted: the middle one of eight batches of recordings in the order of length, as bucketing makes
them. The floor of all rows is that of the products on the frames that exist.
"""

import copy
import math
from collections.abc import Iterator

import torch

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
    product_limit,
    swapped,
    weighted_step,
)
from fastasr.benchmarks.rows import Row

NAME = "ragged"
RAGGED = "fastasr, ragged"
LIBRISPEECH, COMMANDS = "LibriSpeech-like", "short commands"
SIZE, LAYERS = "110M", 6
# kind of lengths, recordings
KINDS = ((LIBRISPEECH, 16), (COMMANDS, 64))
QUICK = {"size": "tiny", "layers": 1, "kinds": ((COMMANDS, 3),)}


def seconds(kind: str, count: int, ordered: bool) -> list[float]:
    """Returns the lengths of a batch, alike in every run."""
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


@benchmark(NAME)
def measure(run: Run, *, size: str = SIZE, layers: int = LAYERS, kinds: tuple = KINDS) -> Iterator[list[Row]]:
    """Yields the rows of Parakeet's encoder for each kind of lengths. Raises ``upstream.MissingUpstream``."""
    for kind, count in kinds:
        for ordered in (False, True):
            x, mask = batch_of(seconds(kind, count, ordered))
            share = mask.sum().item() / mask.numel()
            shape = f"{size}, {layers} of its layers, {count} {kind}, {'sorted' if ordered else 'unsorted'}"
            shape += f", {share:.0%} real"
            for pass_ in (FORWARD, BOTH):
                if run.skip("Parakeet's encoder", shape, pass_):
                    continue
                shipped = fast_conformer.encoder(size, layers)
                models = {UPSTREAM: shipped, FASTASR: swapped(shipped), RAGGED: copy.deepcopy(shipped)}
                _accelerate(models[RAGGED])
                if pass_ == BOTH:
                    with torch.no_grad():
                        weight = torch.randn_like(shipped(x, mask)[0])
                    runs = {
                        key: weighted_step(model.train(), weight, x, mask) for key, model in models.items()
                    }
                else:
                    runs = {key: inference(model, x, mask) for key, model in models.items()}
                for call in runs.values():
                    call()
                flops = round(share * product_flops(runs[UPSTREAM]))
                run.report(f"{NAME}: {shape}, {pass_}")
                yield run.rows(
                    {key: Variant(call) for key, call in runs.items()},
                    flops,
                    product_limit(flops),
                    case="Parakeet's encoder",
                    shape=shape,
                    pass_=pass_,
                    reps=run.reps or min(run.settings.reps, 7),
                )


def _accelerate(model):
    import fastasr

    fastasr.accelerate(model, ragged=True)
