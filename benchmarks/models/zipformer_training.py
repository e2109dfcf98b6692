# SPDX-License-Identifier: Apache-2.0
"""A training step of Zipformer-M, forward and backward of a batch of 4 of 8 s: upstream as shipped, swapped.

Every step draws the same random numbers, so that both drop the same layers and run the same regularisers. There is no
row of torch.compile: schedules, layer dropout and regularisers make it recompile without end.
"""

import copy
import random
from collections.abc import Callable, Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.case import Report, Settings
from fastasr.benchmarks.models.unit import BOTH, FASTASR, UPSTREAM, measure_unit
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


def measure(
    *,
    size: str = "medium",
    batch: int = BATCH,
    frames: int = FRAMES,
    inner_compile: bool = True,
    settings: Settings | None = None,
    reps: int | None = None,
    compile_model: bool = False,
    skip: Callable[[str, str, str], bool] = lambda case, shape, pass_: False,
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Yields the rows of one training step; ``skip(case, shape, pass)`` leaves it out, ``compile_model`` changes
    nothing. ``inner_compile`` keeps upstream's activations compiled, as shipped. Raises ``upstream.MissingUpstream``.
    """
    import fastasr

    settings = settings or Settings()
    shape = shape_name(size, batch, frames)
    if skip(CASE, shape, BOTH):
        return
    shipped = upstream.zipformer(size, inner_compile=inner_compile).train()
    swapped = copy.deepcopy(shipped)
    fastasr.accelerate(swapped)
    inputs = upstream.example(batch, frames)
    runs = {UPSTREAM: training_step(shipped, inputs), FASTASR: training_step(swapped, inputs)}
    yield measure_unit(NAME, CASE, BOTH, shape, runs, settings, reps or min(settings.reps, 7), report)
