# SPDX-License-Identifier: Apache-2.0
"""An op or a swapped model over the sizes that users run: ``fastasr bench --sweep NAME``.

A *cell* is a number of frames and of sequences, a dtype and a number of threads. It is measured in a process of its
own, with limits of memory and time, and its rows are written pass by pass, so that a sweep goes on where
it was interrupted. Frames and sequences are the first two sizes of the function ``sized`` beside the benchmark of the
op or model.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fastasr import files
from fastasr._nearest import nearest_or_all
from fastasr.benchmarks import models, ops, rows, upstream
from fastasr.benchmarks.case import TRAINING, Report, Settings, measure
from fastasr.benchmarks.harness import limit_memory
from fastasr.benchmarks.isolate import PROCESSES, isolated
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, fastest_other, ratio_to_fastest, times, units
from fastasr.testing.speed import BOTH, FORWARD, Case

SUITE = "sweep"
FRAMES = (1, 16, 100, 500, 1500, 6000, 30000, 90000)  # up to 30 minutes at 50 frames per second
BATCHES = (1, 4, 16, 40)
DTYPES = ("float32", "bfloat16")
PASSES = (FORWARD, BOTH, TRAINING)  # gradients come first: with them an op measures which products serve it
ENOUGH = 0.97  # Below this share of the best other's speed, ours counts as slower.


def subjects() -> dict[str, Callable[[int, int], Case]]:
    """Returns name -> ``sized``, which takes frames and sequences first, of every op, and of models that have it."""
    of_ops = {module.CASES[0].op: module.sized for module in ops.MODULES}
    of_models = {name: module.sized for name, module in models.MODULES.items() if hasattr(module, "sized")}
    return of_ops | {name: partial(_of_model, sized) for name, sized in of_models.items()}


def _of_model(sized: Callable[[int, int], Case], frames: int, batch: int) -> Case:
    """Returns the case of no fewer frames than the models' front ends take."""
    return sized(max(frames, upstream.SHORTEST), batch)


@dataclass(frozen=True)
class Cell:
    """One size of one sweep, and the bytes that its process may take beyond what an empty one has."""

    name: str
    frames: int
    batch: int
    dtype: str
    threads: int
    device: str = "cpu"
    memory: int = 0

    @property
    def case(self) -> str:
        return f"{self.frames} x {self.batch}"


@dataclass(frozen=True)
class Options:
    """A sweep: ``seconds`` is the limit of a cell, ``memory`` the limit of its process in bytes, by default half of the
    machine's. ``fresh`` also measures units that the file has for this commit.
    """

    names: tuple[str, ...]
    out: Path
    frames: tuple[int, ...] = FRAMES
    batches: tuple[int, ...] = BATCHES
    dtypes: tuple[str, ...] = DTYPES
    threads: tuple[int, ...] = ()
    device: str = "cpu"
    compile: bool = False
    fresh: bool = False
    reps: int = 7
    seconds: float = 60.0
    memory: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)

    def settings(self) -> Settings:
        """Returns settings with which a pass of three implementations takes no more than a quarter of the limit, even
        if it is measured again.
        """
        return Settings(
            self.reps,
            1,
            0.005,
            compile=self.compile,
            memory=False,
            limits=False,
            seconds=self.seconds / 8,
            doubted=ENOUGH,
        )

    def cells(self) -> list[Cell]:
        """Returns the cells, smallest sizes first. Raises ``ValueError`` for a name that has no sizes."""
        known = subjects()
        names = tuple(known) if self.names == ("all",) else self.names
        for name in names:
            if name not in known:
                raise ValueError(f"no sweep is called {name!r}{nearest_or_all(name, [*known, 'all'])}")
        threads = self.threads or tuple(sorted({1, min(2, os.cpu_count() or 1), torch.get_num_threads()}))
        sizes = sorted(itertools.product(self.frames, self.batches), key=lambda size: size[0] * size[1])
        return [
            Cell(name, *size, dtype, count, self.device, self.memory)
            for name, size, dtype, count in itertools.product(names, sizes, self.dtypes, threads)
        ]


def _measure(tell: Callable, cell: Cell, settings: Settings, done: Sequence[str]) -> None:
    """Measures a cell in this process and tells {"rows": rows of a pass} and {"note": text}."""
    try:
        torch.set_num_threads(cell.threads)
        if torch.device(cell.device).type == "cpu":
            limit_memory(cell.memory)
        case = subjects()[cell.name](cell.frames, cell.batch)
        options = {"device": cell.device, "dtype": getattr(torch, cell.dtype), "settings": settings}
        passes = [p for p in PASSES if p in case.passes or (p == TRAINING and BOTH in case.passes)]
        found = measure(
            case, passes=passes, skip=done.__contains__, report=lambda note: tell({"note": note}), **options
        )
        for unit in found:
            for row in unit:
                row.suite, row.name, row.case = SUITE, cell.name, cell.case
            tell({"rows": unit})
    except Exception as error:  # The sweep goes on with the next cell.
        first = (str(error).strip().splitlines() or [""])[0]
        tell({"note": f"failed: {type(error).__name__}: {first[:160]}"})


def run(
    options: Options, report: Report = lambda _: None, on_rows: Callable[[list[Row]], None] = lambda _: None
) -> list[Row]:
    """Measures the rows that the file lacks and returns all its rows of these sweeps. Raises ``ValueError`` for a wrong
    name."""
    from fastasr.benchmarks.runner import measured_units

    PROCESSES.set_forkserver_preload([__name__])  # The server has imported everything and computed nothing.
    cells = options.cells()
    measured = set() if options.fresh else measured_units(options.out, options.device, options.reps)
    item = {name: getattr(torch, name).itemsize for name in options.dtypes}
    for cell in cells:
        label = f"{cell.name} {cell.case}, {cell.dtype}, {cell.threads} threads"
        case = subjects()[cell.name](cell.frames, cell.batch)
        of_passes = case.costs(item[cell.dtype])
        if max((cost.bytes for cost in of_passes.values()), default=0) > cell.memory:
            report(f"{label}: left out: it needs more than {cell.memory / 2**30:.1f} GiB")
            continue
        key = case.shape, cell.dtype, cell.threads
        done = [p for p in PASSES if (SUITE, cell.name, cell.case, key[0], p, *key[1:]) in measured]
        if len(done) == len(PASSES):
            continue

        def heard(message: dict, label: str = label) -> None:
            if "note" in message:
                report(f"{label}: {message['note']}")
            else:
                rows.merge(options.out, message["rows"])
                on_rows(message["rows"])

        outcome = isolated(_measure, (cell, options.settings(), done), options.seconds, heard)
        if outcome.ended:
            report(f"{label}: {outcome.ended}")
    wanted = {(cell.name, cell.case, cell.dtype, cell.threads) for cell in cells}
    return [row for row in rows.read(options.out) if (row.name, row.case, row.dtype, row.threads) in wanted]


# --------------------------------------------------------------------------- what a sweep found
def ratio(unit: Unit) -> float | None:
    return ratio_to_fastest(unit.medians)


def worst(found: Sequence[Unit]) -> str:
    """Returns a line that names the cell where ours is the slowest beside the others."""
    rated = [(ratio(unit), unit) for unit in found if ratio(unit) is not None]
    if not rated:
        return "no cell has both implementations"
    least, unit = min(rated, key=lambda pair: pair[0])
    first, other = unit.first, fastest_other(unit.medians)
    below = sum(r < ENOUGH for r, _ in rated)
    beside = f": {duration(unit.median('fastasr'))} beside {duration(unit.median(other))} of {other}"
    threads = f"{first.threads} thread{'s' * (first.threads != 1)}"
    return (
        f"{first.name}: {below} of {len(rated)} cells below {ENOUGH:g}×; the worst: {first.case}, {first.pass_}, "
        f"{first.dtype}, {threads}: {times(least)}" + (beside if other else "")
    )


def table(found: Sequence[Row]) -> str:
    """Returns a Markdown table per machine: a line per op or model with its worst cell, and the maps."""
    from fastasr.benchmarks.markdown import NONE_YET, by_name, conditions, grid, mark

    blocks = []
    for measured in by_name(found, "device_name"):
        lines = []
        of_names = {of[0].name: units(of) for of in by_name(measured, "name")}
        for name, cells in of_names.items():
            rated = sorted(((r, u) for u in cells if (r := ratio(u)) is not None), key=lambda pair: pair[0])
            if not rated:
                continue
            (least, unit), middle = rated[0], rated[len(rated) // 2][0]
            first = unit.first
            where = f"{first.case}, {first.pass_}, {first.dtype}, {first.threads} thr."
            below = sum(r < ENOUGH for r, _ in rated)
            old = mark(*(u.first for u in cells))
            lines.append([f"`{name}`{old}", where, times(least), len(rated), times(middle), below])
        lines = grid(("", "worst cell", "", "cells", "median", "below 0.97×"), lines, 4)
        machine = measured[0].device_name
        pictures = [
            f"![Sweep of {name}](plots/sweep_{name}.png)"
            for name in of_names
            if _newest(found, name) == machine
        ]
        blocks.append("\n".join([conditions(measured), "", *lines, "", *pictures]))
    return "\n\n".join(blocks) or NONE_YET


def _newest(found: Sequence[Row], name: str) -> str:
    """Returns the machine of the last sweep of ``name``, whose map is drawn."""
    return max((row for row in found if row.name == name), key=lambda row: row.date).device_name


def figure(found: Sequence[Row]):
    """Draws the map of one op or model: sizes down, passes, dtypes and threads across. Colour is our speed beside
    the fastest of the others, in one scale for all maps.
    """
    from fastasr.benchmarks.plots import pyplot

    plt = pyplot()
    from matplotlib.colors import TwoSlopeNorm

    cells = units(found)
    sizes = sorted({u.first.case for u in cells}, key=lambda case: [int(n) for n in case.split(" x ")])
    ways = sorted({(u.first.dtype, u.first.threads, PASSES.index(u.first.pass_)) for u in cells})
    values = [[float("nan")] * len(ways) for _ in sizes]
    for unit in cells:
        first = unit.first
        way = ways.index((first.dtype, first.threads, PASSES.index(first.pass_)))
        rated = ratio(unit)
        values[sizes.index(first.case)][way] = float("nan") if rated is None else rated
    size = max(4.6, 1.8 + 0.46 * len(ways)), max(3.4, 2.4 + 0.24 * len(sizes))
    picture, axes = plt.subplots(figsize=size, layout="constrained")
    shown = [[min(max(value, 0.25), 4.0) for value in line] for line in values]
    image = axes.imshow(shown, norm=TwoSlopeNorm(1.0, 0.25, 4.0), cmap="RdBu", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value == value:
                text = {float("inf"): "only", 0.0: "none"}.get(value, f"{value:.2f}")
                axes.text(x, y, text, ha="center", va="center", fontsize=6)
    axes.set_yticks(range(len(sizes)), sizes, fontsize=7)
    axes.set_ylabel("frames x sequences", fontsize=8)
    labels = [f"{PASSES[p]}, {dtype}, {threads} thr." for dtype, threads, p in ways]
    axes.set_xticks(range(len(ways)), labels, fontsize=7, rotation=60, ha="right")
    bar = picture.colorbar(image, ax=axes, ticks=[0.25, 0.5, 0.75, 1, 2, 3, 4])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("× the fastest other", fontsize=8)
    title = f"{found[0].name}: speed beside the fastest other\n{found[0].device_name}"
    picture.suptitle(title, fontsize=8, x=0.01, ha="left")
    return picture


def draw(found: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the map of each op and model that has rows of sweeps, of the newest machine; returns the paths."""
    from fastasr.benchmarks.markdown import by_name
    from fastasr.benchmarks.plots import png

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for of_name in by_name([row for row in found if row.suite == SUITE], "name"):
        newest = _newest(of_name, of_name[0].name)
        path = folder / f"sweep_{of_name[0].name}.png"
        files.write(path, png(figure([row for row in of_name if row.device_name == newest])))
        paths.append(path)
    return paths
