# SPDX-License-Identifier: Apache-2.0
"""Speech encoders of other packages at their real width with few layers: as shipped, under torch.compile, and swapped.
They run forward; batches also take a training step with the encoder's dropout. torch.compile is measured on batches,
because it compiles for minutes at each shape.
"""

import copy
from collections.abc import Iterator, Sequence

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.encoders import ENCODERS
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models import unit
from fastasr.benchmarks.models.unit import BOTH, COMPILE, FASTASR, FORWARD, UPSTREAM, Run, benchmark, swapped
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, percent, times

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
                if run.compile_model and batch > 1:
                    torch._dynamo.reset()  # Graphs of an earlier shape would make this one's dynamic.
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


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a call of an encoder per line, its times and its peak memory."""
    figures = "upstream | `torch.compile` | **fastasr** | gain | memory | share of the limit"
    notes = sorted({f"{row.case}, {row.note}" for row in rows if row.note})
    return by_machine(rows, "", figures, _line, "\n".join(f"- {note}" for note in notes))


def _line(unit: Unit) -> list[list[str]]:
    shipped, ours = unit.row(UPSTREAM), unit.row(FASTASR)
    compiled = "fails" if shipped and shipped.note else duration(unit.median(COMPILE))
    peaks = [row.peak_bytes for row in (shipped, ours) if row and row.peak_bytes]
    label = f"{unit.first.case}, {unit.first.shape}" + (", training step" if unit.first.pass_ == BOTH else "")
    return [
        [
            label,
            duration(unit.median(UPSTREAM)),
            compiled,
            duration(unit.median(FASTASR)),
            times(unit.ratio(UPSTREAM)),
            " → ".join(f"{peak / 2**20:.0f}" for peak in peaks) + " MiB" if len(peaks) == 2 else "–",
            percent(ours.fraction_of_limit if ours else None),
        ]
    ]
