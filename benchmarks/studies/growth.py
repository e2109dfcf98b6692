# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of a whole encoder over the length and the number of recordings: upstream's and swapped.

    python -m fastasr.benchmarks.studies.growth zipformer --seconds 10 60 600 3600      # one recording, inference
    python -m fastasr.benchmarks.studies.growth fast_conformer --training --seconds 16 --batches 1 4 16
    python -m fastasr.benchmarks.studies.growth zipformer --seconds                     # only draws, from the rows

Each size runs in a fresh process that may take ``--memory`` GiB and ``--limit`` seconds; an implementation that needs
more is not measured at larger sizes. The memory is the resident set's high-water mark beyond the process with the
model loaded; for a training step, beyond the process after a first step, which holds gradients and other kept memory.
Rows are added to a file, which resumes a run that was interrupted, and the picture of the model is drawn from them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fastasr import files
from fastasr.benchmarks import harness, upstream
from fastasr.benchmarks.harness import limit_memory, peak_bytes
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models import fast_conformer
from fastasr.benchmarks.models.unit import BOTH, FASTASR, FORWARD, UPSTREAM, swapped
from fastasr.benchmarks.plots import COLOURS, plain, png, pyplot
from fastasr.benchmarks.rows import Row, merge, read
from fastasr.benchmarks.runner import measured_units
from fastasr.benchmarks.studies.results import ROOT
from fastasr.benchmarks.table import Unit, duration, percent, times

ENDING = "_growth"
SIZES = {"zipformer": upstream.SIZES, "fast_conformer": fast_conformer.SIZES}  # the first of each by default
SECONDS = (10, 60, 300, 600, 1800, 3600)
LEFT_CONTEXT = 128
NO_MEMORY = ("can't allocate memory", "bad_alloc", "not enough memory", "fastasr: no memory for")


@dataclass(frozen=True)
class Point:
    """One measurement: a model of a size (``layers``: of a FastConformer), a number of recordings and their seconds,
    ``chunk_size`` frames of a causal Zipformer or 0, and the GiB that its process may take."""

    model: str
    size: str
    batch: int
    seconds: float
    implementation: str = FASTASR
    layers: int = 2
    chunk_size: int = 0
    training: bool = False
    memory: float = 0.0

    @property
    def case(self) -> str:
        if self.model != "zipformer":
            return f"{self.size}, {self.layers} of its layers"
        return f"{self.size}, chunks of {self.chunk_size}" if self.chunk_size else f"{self.size}, whole"

    @property
    def shape(self) -> str:
        return f"{self.batch} x {self.seconds:g} s"

    @property
    def pass_(self) -> str:
        return BOTH if self.training else FORWARD


def encoder(point: Point) -> Callable[[int], Callable[[], torch.Tensor]]:
    """Returns a function of a number of frames that returns a call of the model on recordings of that length."""
    if point.model == "zipformer":
        chunks = {"causal": True, "chunk_size": (point.chunk_size,), "left_context_frames": (LEFT_CONTEXT,)}
        shipped = upstream.zipformer(point.size, inner_compile=False, **(chunks if point.chunk_size else {}))
    else:
        shipped = fast_conformer.encoder(point.size, point.layers)
    model = swapped(shipped) if point.implementation == FASTASR else shipped
    model.train(point.training)
    features = torch.randn(point.batch, round(100 * point.seconds), upstream.BINS)

    def inputs(frames: int):
        lengths = torch.full((point.batch,), min(frames, features.shape[1]))
        of_all = torch.ones(point.batch, lengths[0].item()).long()
        return features[:, : lengths[0]], of_all if point.model == "fast_conformer" else lengths

    def call(frames: int):
        given = inputs(frames)

        def step():
            if not point.training:
                with torch.inference_mode():
                    return model(*given)[0]
            model.zero_grad(set_to_none=False)
            y = model(*given)[0]
            y.square().mean().backward()
            return y

        return step

    return call


def run(point: Point) -> dict:
    """Returns seconds and peak bytes of one call in this process, or that its memory was not enough."""
    torch.manual_seed(0)
    if point.memory:
        limit_memory(int(point.memory * 2**30))
    outcome = {}
    try:
        call = encoder(point)
        whole = call(round(100 * point.seconds))

        def timed():
            begun = time.perf_counter()
            y = whole()
            outcome.update(seconds=time.perf_counter() - begun, finite=bool(torch.isfinite(y).all()))

        # The first call makes packed weights, tables and gradients.
        (whole if point.training else call(600))()
        peak = peak_bytes(timed, rounds=1)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY):
            return {"out_of_memory": True}
        raise
    if peak is None:
        raise OSError("growth: /proc/self/clear_refs cannot be written: the peak cannot be measured here")
    if not outcome["finite"]:
        raise FloatingPointError(f"growth: the output of {point.shape} is not finite")
    return {"seconds": outcome["seconds"], "peak_bytes": peak}


def in_fresh_process(point: Point, limit: float | None = None) -> dict:
    """Returns the result of ``run`` in a process of its own. Raises RuntimeError if it fails, or takes longer than
    ``limit`` seconds."""
    try:
        found = harness.in_fresh_process(
            __spec__.name, point.model, "--run", json.dumps(asdict(point)), timeout=limit
        )
        if "out_of_memory" in found:
            raise RuntimeError(f"out of memory ({point.memory:g} GiB)")
    except RuntimeError as error:
        label = f"growth: {point.model}, {point.case}, {point.shape}, {point.implementation}"
        raise RuntimeError(f"{label}: {error}") from None
    return found


def row(point: Point, found: dict) -> Row:
    milliseconds = round(found["seconds"] * 1e3, 3)
    return Row.measured(
        suite="models",
        name=point.model + ENDING,
        case=point.case,
        shape=point.shape,
        dtype="float32",
        device="cpu",
        pass_=point.pass_,
        implementation=point.implementation,
        median_ms=milliseconds,
        q1_ms=milliseconds,
        q3_ms=milliseconds,
        reps=1,
        peak_bytes=found["peak_bytes"],
        limit=f"{point.memory:g} GiB" if point.memory else None,
    )


def measure(points: Sequence[Point], results: Path, limit: float | None, report=lambda line: None) -> None:
    """Measures both implementations at each point, smallest first, until they fail, and adds the rows to the file."""
    done, left = measured_units(results, "cpu", 1), {UPSTREAM, FASTASR}
    for point in sorted(points, key=lambda point: point.batch * point.seconds):
        unit = ("models", point.model + ENDING, point.case, point.shape, point.pass_, "float32")
        if (*unit, torch.get_num_threads()) in done:
            continue
        found = []
        for implementation in sorted(left, reverse=True):
            one = replace(point, implementation=implementation)
            try:
                found.append(row(one, in_fresh_process(one, limit)))
            except RuntimeError as error:
                report(str(error))
                left.discard(implementation)
                continue
            last = found[-1]
            values = f"{last.peak_bytes / 2**20:.0f} MiB, {duration(last.median_ms)}"
            report(f"{point.case}, {point.shape}, {point.pass_}, {implementation}: {values}")
        merge(results, found)


# --------------------------------------------------------------------------- the page
def size_of(found: Row) -> tuple[int, float]:
    """Returns the recordings and seconds of a row."""
    batch, _, seconds, _ = found.shape.split()
    return int(batch), float(seconds)


def growth(rows: Sequence[Row]) -> float:
    """Returns how much faster than its length memory grows, from the shortest to the longest: 1 is linear."""
    first, last = min(rows, key=size_of), max(rows, key=size_of)
    return (last.peak_bytes / first.peak_bytes) / (size_of(last)[1] / size_of(first)[1])


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a size per line, time and MiB of both, and fastasr's share of upstream's."""
    figures = "upstream | fastasr | gain | upstream, MiB | fastasr, MiB | share"
    note = "–: beyond the memory or the time that a process was given."
    return by_machine(sorted(rows, key=lambda r: (r.case, r.pass_, size_of(r))), "", figures, _line, note)


def _line(unit: Unit) -> list[list[str]]:
    first = unit.first
    bytes_ = [row.peak_bytes if (row := unit.row(name)) else None for name in (UPSTREAM, FASTASR)]
    share = bytes_[1] / bytes_[0] if all(bytes_) else None
    mebibytes = ("–" if n is None else f"{n / 2**20:.0f}" for n in bytes_)
    spent = (duration(unit.median(name)) for name in (UPSTREAM, FASTASR))
    what = f"{first.case}, {first.shape}" + (", training step" if first.pass_ == BOTH else "")
    return [[what, *spent, times(unit.ratio(UPSTREAM)), *mebibytes, percent(share)]]


def figure(rows: Sequence[Row]):
    """Draws memory and time over the seconds of one recording, and over the number of recordings where there are
    several: a line per case, pass and implementation."""
    plt = pyplot()
    batches = {size_of(row)[0] for row in rows}
    several = [
        row for row in rows if len({size_of(r)[0] for r in rows if size_of(r)[1] == size_of(row)[1]}) > 1
    ]
    panels = [("seconds of one recording", [row for row in rows if size_of(row)[0] == min(batches)], 1)]
    panels += [("recordings", several, 0)] if several else []
    shape = {"figsize": (7.2, 3.6 * len(panels)), "layout": "constrained", "squeeze": False}
    picture, axes = plt.subplots(len(panels), 2, **shape)
    values = (
        (lambda r: r.peak_bytes / 2**30, "peak over the model, GiB"),
        (lambda r: r.median_ms / 1e3, "seconds"),
    )
    for line, (label, shown, axis) in zip(axes, panels, strict=True):
        kinds = sorted({(row.case, row.pass_, size_of(row)[1 - axis]) for row in shown})
        for panel, (value, unit) in zip(line, values, strict=True):
            for i, (case, pass_, other) in enumerate(kinds):
                of_kind = [
                    r for r in shown if (r.case, r.pass_, size_of(r)[1 - axis]) == (case, pass_, other)
                ]
                for name in (UPSTREAM, FASTASR):
                    points = sorted((size_of(r)[axis], value(r)) for r in of_kind if r.implementation == name)
                    note = f"{name}: {case}, {pass_}" + ("" if axis else f", {other:g} s")
                    style = {"ls": ("-", "--", ":", "-.")[i % 4], "color": COLOURS[name], "label": note}
                    if points:
                        panel.plot(*zip(*points, strict=True), "o", ms=3, **style)
            panel.set(xscale="log", yscale="log")
            panel.set_xlabel(label, fontsize=8)
            panel.set_ylabel(unit, fontsize=8)
            plain(panel)
        line[0].legend(fontsize=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))  # above all lines
    picture.suptitle(f"{rows[0].name.removesuffix(ENDING)}, CPU, float32, {rows[0].device_name}", fontsize=9)
    return picture


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastasr.benchmarks.studies.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=sorted(SIZES))
    parser.add_argument("--seconds", type=float, nargs="*", default=SECONDS, help="of each recording")
    parser.add_argument("--batches", type=int, nargs="*", default=(1,))
    parser.add_argument("--size", help="medium, or 110M")
    parser.add_argument("--layers", type=int, default=2, help="of a FastConformer")
    parser.add_argument("--chunk-size", type=int, default=0, help="frames of a chunk of a causal Zipformer")
    parser.add_argument("--training", action="store_true", help="forward and backward, as shipped")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB that a process may take; 0: all")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a process may take")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.jsonl")
    parser.add_argument("--out", type=Path, help="the picture; default: growth_MODEL.png of the docs")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run is not None:
        print(json.dumps(run(Point(**json.loads(options.run)))))
        return 0
    size = options.size or next(iter(SIZES[options.model]))
    if size not in SIZES[options.model]:
        parser.error(f"--size: expected one of {', '.join(SIZES[options.model])}, got {size!r}")
    kind = {"layers": options.layers, "chunk_size": options.chunk_size, "training": options.training}
    points = [
        Point(options.model, size, batch, seconds, memory=options.memory, **kind)
        for batch in options.batches
        for seconds in options.seconds
    ]
    try:
        measure(points, options.results, options.limit, report=lambda line: print(line, flush=True))
    except upstream.MissingUpstream as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [row for row in read(options.results) if row.name == options.model + ENDING]
    if not rows:
        print(f"no rows of {options.model} in {options.results}", file=sys.stderr)
        return 1
    newest = max(rows, key=lambda row: row.date).device_name
    out = options.out or ROOT / "docs" / "plots" / f"growth_{options.model}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, png(figure([row for row in rows if row.device_name == newest])))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
