# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step of transformers' Parakeet encoder with the dropout it ships with: shipped and swapped.

``python -m fastasr.benchmarks.studies.training_memory [--results FILE]`` measures each in a fresh process and adds the
rows to the file. The memory is the resident set's high-water mark over what the process held after a first step, which
makes gradients and what is kept between steps. It is that of activations, of which some are kept for the backward pass.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastasr.benchmarks.harness import peak_bytes
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models.fast_conformer import batch_of, encoder, shape_name
from fastasr.benchmarks.models.unit import BOTH, FASTASR, UPSTREAM, swapped
from fastasr.benchmarks.rows import Row, merge
from fastasr.benchmarks.studies.long_audio import ROOT, in_fresh_process
from fastasr.benchmarks.table import Unit, percent

STUDY, NAME = "training_memory", "fast_conformer_training_memory"
# size, layers, sequences, seconds of audio
SHAPES = (("110M", 6, 4, 16), ("110M", 2, 1, 60), ("0.6B", 2, 1, 30))


def run(implementation: str, size: str, layers: int, batch: int, seconds: int) -> dict[str, float]:
    """Returns seconds and peak bytes of one step in this process."""
    model = encoder(size, layers)
    model = (swapped(model) if implementation == FASTASR else model).train()
    inputs, taken = batch_of(batch, seconds), {}

    def step():
        begun = time.perf_counter()
        model.zero_grad(set_to_none=False)
        model(*inputs)[0].square().mean().backward()
        taken["seconds"] = time.perf_counter() - begun

    step()
    peak = peak_bytes(step, rounds=1)
    if peak is None:
        raise OSError(f"{STUDY}: /proc/self/clear_refs cannot be written: the peak cannot be measured here")
    return {**taken, "peak_bytes": peak}


def measure(size: str, layers: int, batch: int, seconds: int) -> list[Row]:
    """Returns the rows of both implementations. Raises RuntimeError when one fails."""
    shape, rows = (size, layers, batch, seconds), []
    for implementation in (UPSTREAM, FASTASR):
        arguments = ["--run", implementation, *map(str, shape)]
        found = in_fresh_process(STUDY, arguments, f"{STUDY}: {implementation}, {shape_name(*shape)}")
        milliseconds = round(found["seconds"] * 1e3, 3)
        rows.append(
            Row.measured(
                suite="models",
                name=NAME,
                case="encoder",
                shape=shape_name(*shape),
                dtype="float32",
                device="cpu",
                pass_=BOTH,
                implementation=implementation,
                median_ms=milliseconds,
                q1_ms=milliseconds,
                q3_ms=milliseconds,
                reps=1,
                peak_bytes=found["peak_bytes"],
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a shape per line, the MiB of both and the share that fastasr needs of upstream's."""
    return by_machine(rows, "training step", "upstream | fastasr | share", _line)


def _line(unit: Unit) -> list[list[str]]:
    bytes_ = [row.peak_bytes if (row := unit.row(name)) else 0 for name in (UPSTREAM, FASTASR)]
    share = bytes_[1] / bytes_[0] if all(bytes_) else None
    return [[unit.first.shape, *(f"{n / 2**20:.0f} MiB" for n in bytes_), percent(share)]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m fastasr.benchmarks.studies.{STUDY}", description=__doc__
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.jsonl")
    parser.add_argument(
        "--shape", nargs=4, metavar=("SIZE", "LAYERS", "BATCH", "SECONDS"), help="measure this one"
    )
    parser.add_argument(
        "--run", nargs=5, metavar="VALUE", help="measure an implementation and shape in this process"
    )
    options = parser.parse_args(arguments)
    if options.run:
        implementation, size, *numbers = options.run
        print(json.dumps(run(implementation, size, *map(int, numbers))))
        return 0
    shapes = [(options.shape[0], *map(int, options.shape[1:]))] if options.shape else SHAPES
    for shape in shapes:
        rows = measure(*shape)
        merge(options.results, rows)
        print(table(rows).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
