# SPDX-License-Identifier: Apache-2.0
"""A training step of Zipformer-M, forward and backward of a batch of 4 of 8 s: upstream as shipped, swapped.

Every step draws the same random numbers, so that both drop the same layers and run the same regularisers. There is no
row of torch.compile: schedules, layer dropout and regularisers make it recompile without end.
"""

import random
from collections.abc import Callable, Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.models.unit import BOTH, FASTASR, UPSTREAM, Run, benchmark, swapped
from fastasr.benchmarks.models.zipformer import shape_name
from fastasr.benchmarks.rows import Row

NAME = "zipformer_training"
CASE = "training step"
BATCH, FRAMES = 4, 800
QUICK = {"size": "tiny", "batch": 2, "frames": 200, "inner_compile": False}


def training_step(model: torch.nn.Module, inputs: tuple) -> Callable[[], None]:
    """Runs forward and backward of one batch, with the same random numbers at every call."""
    parameters = list(model.parameters())

    def run():
        for p in parameters:
            p.grad = None
        torch.manual_seed(0)
        random.seed(0)
        model(*inputs)[0].square().mean().backward()

    return run


@benchmark(NAME)
def measure(
    run: Run, *, size: str = "medium", batch: int = BATCH, frames: int = FRAMES, inner_compile: bool = True
) -> Iterator[list[Row]]:
    """Yields the rows of one training step.

    ``inner_compile`` keeps upstream's activations compiled, as shipped. Raises ``upstream.MissingUpstream``.
    """
    shape = shape_name(size, batch, frames)
    if run.skip(CASE, shape, BOTH):
        return
    shipped = upstream.zipformer(size, inner_compile=inner_compile).train()
    models, inputs = {UPSTREAM: shipped, FASTASR: swapped(shipped)}, upstream.example(batch, frames)
    runs = {name: training_step(model, inputs) for name, model in models.items()}
    yield run.unit(CASE, BOTH, shape, runs, min(run.settings.reps, 7))
