# SPDX-License-Identifier: Apache-2.0
"""A training step of the recipe on real speech, and its peak memory; reading and writing files is left out.

A step is a batch's features, forward, backward, ScaledAdam and the averaged model, of ``examples/train_transducer.py``.
Batches are spread over an epoch, so a step's mean time times the batches of the epoch is the epoch's. "upstream" is the
PyPI package's model as shipped with fast_rnnt in k2's place, "swapped" that model after ``accelerate``, "eager" ours on
formulas in PyTorch. Schedules are those of step 4000, and the learning rate is 0, so that every round does the same
work. The memory is a step's peak above the process's memory before it; each implementation has a process
of its own.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.case import BOTH, Report
from fastasr.benchmarks.harness import LoadMeter, Timing, in_fresh_process, interleave, peak_bytes
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models.unit import FASTASR, UPSTREAM, Run, benchmark, timed_row
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration

NAME = "recipe_step"
CASE = "training step"
EAGER, SWAPPED = "eager", "swapped"
OPTIONS = {
    FASTASR: {},
    UPSTREAM: {"upstream": True, "swap": False},
    SWAPPED: {"upstream": True},
    EAGER: {"backend": "eager"},
}
DURATIONS = (15.0, 60.0)  # seconds of a batch: the recipe's own, and four times as much
BATCHES = 6  # batches of an epoch
STEADY = 4000
CACHE = Path("demo/cache")
TIMEOUT = 1200
QUICK = {"size": "tiny", "durations": (5.0,), "inner_compile": False}


def shape_name(size: str, duration: float) -> str:
    return f"{size}, batches of {duration:g} s"


def _made_up() -> tuple[list, list]:
    """Returns noise and letters for a quick run."""
    from fastasr.asr.recipe import speech

    generator = torch.Generator().manual_seed(0)
    found = [
        speech.Utterance(f"noise {i}", [torch.randn(120 + 10 * i, speech.BINS, generator=generator)], "a b c")
        for i in range(8)
    ]
    return found, found[:1]


def _speech(size: str, report: Report) -> tuple[list, list]:
    from fastasr.asr.recipe import speech

    if size == "tiny":
        return _made_up()
    try:
        return speech.load(CACHE, say=report)
    except (speech.NoSpeech, ImportError) as error:
        raise upstream.MissingUpstream(f"there is no speech to train on: {error}") from None


class Steps:
    """The chosen batches of an epoch, trained on by one implementation."""

    def __init__(self, implementation: str, size: str, duration: float, speeches, folder: Path):
        from fastasr.asr.recipe import training

        options = training.Options(
            out=folder,
            size=size,
            max_duration=duration,
            base_lr=0.0,
            backend=OPTIONS[implementation].get("backend", ""),
            upstream=OPTIONS[implementation].get("upstream", False),
            swap=OPTIONS[implementation].get("swap", True),
        )
        units = training.learn_units("char", speeches[0])
        try:
            self.trainer = training.Trainer(options, *speeches, units, say=lambda text: None)
        except ValueError as error:  # The error names missing packages: the PyPI package or fast_rnnt.
            raise upstream.MissingUpstream(f"{implementation}: {error}") from None
        count = len(self.trainer.epoch_batches(0))
        self.chosen = sorted({count * i // BATCHES for i in range(BATCHES)})

    def run(self) -> None:
        for index in self.chosen:
            self.step(index)

    def step(self, index: int) -> None:
        progress = self.trainer.progress
        progress.step, progress.epoch, progress.index = STEADY + index, 0, index
        self.trainer.step()


def _peak(implementation: str, size: str, duration: float, speeches, folder: Path) -> int:
    """Returns the peak bytes of a step in this process, which runs nothing else."""
    steps = Steps(implementation, size, duration, speeches, folder)
    steps.run()  # The first step makes what later steps reuse: optimizer states, choices of products.
    peaks = [peak_bytes(lambda index=index: steps.step(index), rounds=1) for index in steps.chosen]
    if None in peaks:
        raise OSError("/proc/self/clear_refs cannot be written: the peak cannot be measured here")
    return max(peaks)


@benchmark(NAME)
def measure(
    run: Run, *, size: str = "small", durations: tuple[float, ...] = DURATIONS, inner_compile: bool = True
) -> Iterator[list[Row]]:
    """Yields the rows of a step, one unit per duration of a batch. ``inner_compile`` keeps upstream's activations
    compiled, as shipped. Raises ``upstream.MissingUpstream`` without the package, fast_rnnt or the recordings.
    """
    wanted = [d for d in durations if not run.skip(CASE, shape_name(size, d), BOTH)]
    if not wanted:
        return
    speeches = _speech(size, run.report)
    with tempfile.TemporaryDirectory() as name, upstream.activations(compiled=inner_compile):
        folder = Path(name)
        torch.save(speeches, folder / "speech.pt")
        for duration in wanted:
            shape = shape_name(size, duration)
            made = {}
            for implementation in OPTIONS:
                run.report(f"{NAME}: {shape}: first steps of {implementation}")
                made[implementation] = Steps(implementation, size, duration, speeches, folder)
                made[implementation].run()
            rounds = run.reps or min(run.settings.reps, 7)
            run.report(f"{NAME}: {shape}: timing {', '.join(made)}, {rounds} rounds")
            load = LoadMeter()
            timings = interleave(
                {key: steps.run for key, steps in made.items()}, reps=rounds, warmup=1, sample_seconds=0.0
            )
            other = load.other_cores()
            count = len(made[FASTASR].chosen)
            del made
            rows = []
            for implementation, timing in timings.items():
                peak = None
                if run.settings.memory:
                    run.report(f"{NAME}: {shape}: peak memory of {implementation} in a fresh process")
                    peak = in_fresh_process(
                        __spec__.name, implementation, size, duration, folder, timeout=TIMEOUT
                    )
                per_step = Timing([seconds / count for seconds in timing.samples])
                fields = {"name": NAME, "case": CASE, "shape": shape, "pass_": BOTH, "load": other}
                rows.append(timed_row(per_step, implementation=implementation, peak_bytes=peak, **fields))
            yield rows


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a batch's duration and an implementation per line, time and peak memory beside
    fastasr's.
    """
    return by_machine(
        rows, " | ", "a step | times fastasr's | peak memory | times fastasr's", _implementations
    )


def _implementations(unit: Unit) -> list[list[str]]:
    ours, lines = unit.row(FASTASR), []
    for row in unit.rows:
        cells = [unit.first.shape, row.implementation, duration(row.median_ms)]
        cells.append(f"{row.median_ms / ours.median_ms:.2f}" if ours else "–")
        cells.append(f"{row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes else "–")
        known = ours and ours.peak_bytes and row.peak_bytes
        cells.append(f"{row.peak_bytes / ours.peak_bytes:.2f}" if known else "–")
        lines.append(cells)
    return lines


if __name__ == "__main__":
    chosen, of_size, of_duration, at = sys.argv[1:5]
    # the process that started this one wrote it
    kept = torch.load(Path(at) / "speech.pt", weights_only=False)
    print(json.dumps(_peak(chosen, of_size, float(of_duration), kept, Path(at))))
