# SPDX-License-Identifier: Apache-2.0
"""Zipformer-M's front end alone: three convolutions, ConvNeXt, projection and norm; upstream as shipped, swapped.

It measures inference of a batch of 4 of 16 s, and a training step of 4 of 8 s, whose steps all draw the same random
numbers.
"""

from collections.abc import Iterator

from fastasr.benchmarks import upstream
from fastasr.benchmarks.models.unit import (
    BOTH,
    FASTASR,
    FORWARD,
    UPSTREAM,
    Run,
    benchmark,
    inference,
    swapped,
)
from fastasr.benchmarks.models.zipformer import shape_name
from fastasr.benchmarks.models.zipformer_training import training_step
from fastasr.benchmarks.rows import Row

NAME = "zipformer_front_end"
INFERENCE, TRAINING = "inference", "training step"
BATCH, FRAMES, TRAINING_FRAMES = 4, 1600, 800
QUICK = {"size": "tiny", "batch": 2, "frames": 200, "training_frames": 100, "inner_compile": False}


@benchmark(NAME)
def measure(
    run: Run,
    *,
    size: str = "medium",
    batch: int = BATCH,
    frames: int = FRAMES,
    training_frames: int = TRAINING_FRAMES,
    inner_compile: bool = True,
) -> Iterator[list[Row]]:
    """Yields the rows of inference, then of a training step.

    ``inner_compile`` keeps upstream's activations compiled, as shipped. Raises ``upstream.MissingUpstream``.
    """
    shipped = upstream.zipformer(size, inner_compile=inner_compile).encoder_embed
    modules = {UPSTREAM: shipped, FASTASR: swapped(shipped)}
    for case, pass_, length in ((INFERENCE, FORWARD, frames), (TRAINING, BOTH, training_frames)):
        shape = shape_name(size, batch, length)
        if run.skip(case, shape, pass_):
            continue
        inputs = upstream.example(batch, length)
        for module in modules.values():
            module.train(case == TRAINING)
        make = training_step if case == TRAINING else lambda module, inputs: inference(module, *inputs)
        runs = {name: make(module, inputs) for name, module in modules.items()}
        yield run.unit(case, pass_, shape, runs, min(run.settings.reps, 7) if case == TRAINING else None)
