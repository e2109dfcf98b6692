# SPDX-License-Identifier: Apache-2.0
"""Zipformer-M's front end alone: three convolutions, ConvNeXt, projection and norm; upstream as shipped, swapped.

It measures inference of a batch of 4 of 16 s, and a training step of 4 of 8 s, whose steps all draw the same random
numbers.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.case import Report, Settings
from fastasr.benchmarks.models.unit import BOTH, FASTASR, FORWARD, UPSTREAM, measure_unit
from fastasr.benchmarks.models.zipformer import shape_name
from fastasr.benchmarks.models.zipformer_training import training_step
from fastasr.benchmarks.rows import Row

NAME = "zipformer_front_end"
INFERENCE, TRAINING = "inference", "training step"
BATCH, FRAMES, TRAINING_FRAMES = 4, 1600, 800
QUICK = {"size": "tiny", "batch": 2, "frames": 200, "training_frames": 100, "inner_compile": False}


@torch.no_grad()
def _forward(module: torch.nn.Module, inputs: tuple) -> torch.Tensor:
    return module(*inputs)[0]


def measure(
    *,
    size: str = "medium",
    batch: int = BATCH,
    frames: int = FRAMES,
    training_frames: int = TRAINING_FRAMES,
    inner_compile: bool = True,
    settings: Settings | None = None,
    reps: int | None = None,
    compile_model: bool = False,
    skip: Callable[[str, str, str], bool] = lambda case, shape, pass_: False,
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Yields the rows of inference, then of a training step; ``skip(case, shape, pass)`` leaves one out,
    ``compile_model`` changes nothing. ``inner_compile`` keeps upstream's activations compiled, as shipped. Raises
    ``upstream.MissingUpstream``."""
    import fastasr

    settings = settings or Settings()
    shipped = upstream.zipformer(size, inner_compile=inner_compile).encoder_embed
    swapped = copy.deepcopy(shipped)
    fastasr.accelerate(swapped)
    modules = {UPSTREAM: shipped, FASTASR: swapped}
    for case, pass_, length in ((INFERENCE, FORWARD, frames), (TRAINING, BOTH, training_frames)):
        shape = shape_name(size, batch, length)
        if skip(case, shape, pass_):
            continue
        inputs = upstream.example(batch, length)
        for module in modules.values():
            module.train(case == TRAINING)
        make = training_step if case == TRAINING else lambda module, inputs: partial(_forward, module, inputs)
        runs = {name: make(module, inputs) for name, module in modules.items()}
        rounds = reps or min(settings.reps, 7) if case == TRAINING else reps or settings.reps
        yield measure_unit(NAME, case, pass_, shape, runs, settings, rounds, report)
