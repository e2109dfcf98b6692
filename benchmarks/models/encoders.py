# SPDX-License-Identifier: Apache-2.0
"""Speech encoders of transformers, NeMo and ZipVoice at their real width with few layers: as shipped, under
torch.compile, and swapped. They run forward; the first shape also takes a training step with the encoder's dropout.
"""

import copy
from collections.abc import Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.encoders import ENCODERS
from fastasr.benchmarks.models import unit
from fastasr.benchmarks.models.unit import BOTH, COMPILE, FASTASR, FORWARD, UPSTREAM, Run, benchmark, swapped
from fastasr.benchmarks.rows import Row

NAME = "encoders"
# layers, sequences, seconds of the longest
SHAPES = ((2, 1, 30), (2, 2, 12))
QUICK = {"names": ("nemo-transformer", "lasr"), "shapes": ((1, 1, 1),)}


@benchmark(NAME)
def measure(run: Run, *, names: tuple = tuple(ENCODERS), shapes: tuple = SHAPES) -> Iterator[list[Row]]:
    """Yields the rows of each encoder at each shape, and leaves out those whose package is missing."""
    for name in names:
        for layers, batch, seconds in shapes:
            shape = f"{layers} of its layers, {batch} x {seconds} s"
            for pass_ in (FORWARD, BOTH)[: 1 + (batch > 1)]:
                if run.skip(name, shape, pass_):
                    continue
                try:
                    shipped = ENCODERS[name].model(layers)
                except upstream.MissingUpstream as reason:
                    run.report(f"{NAME}: {name} is left out: {reason}")
                    continue
                models = {UPSTREAM: shipped, FASTASR: swapped(shipped)}
                if run.compile_model:
                    models[COMPILE] = torch.compile(copy.deepcopy(shipped))
                inputs = ENCODERS[name].inputs(batch, seconds)
                if pass_ == BOTH:
                    with torch.no_grad():
                        weight = torch.randn_like(unit.first(shipped(**inputs)))
                    calls = {
                        key: unit.weighted_step(model.train(), weight, **inputs)
                        for key, model in models.items()
                    }
                else:
                    calls = {key: unit.inference(model, **inputs) for key, model in models.items()}
                # A call takes seconds: five rounds tell as much as fifteen of a short one.
                yield run.unit(name, pass_, shape, calls, reps=5)
