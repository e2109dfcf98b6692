# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a joiner and its loss over rows and outputs: of the pruned joiner, from the rows of
``pruned_transducer``, or of a TDT's, from the rows of ``tdt_loss``.

``python -m fastasr.benchmarks.studies.transducer_memory [--tdt] [--results DIR] [--out FILE]`` writes the picture.
``scripts/tables.py`` writes the TDT's, and its table, into docs/rnnt.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from fastasr import files
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models import pruned_transducer, tdt_loss
from fastasr.benchmarks.models.unit import FASTASR, UPSTREAM
from fastasr.benchmarks.plots import COLOURS, plain, png, pyplot
from fastasr.benchmarks.rows import Row, read_all
from fastasr.benchmarks.studies.results import ROOT
from fastasr.benchmarks.table import Unit, percent


@dataclass(frozen=True)
class Kind:
    """Which rows are drawn, where, and how: the names of both implementations and of the joiner's rows."""

    name: str
    case: str
    upstream: str
    rows: str
    title: str
    out: str


PRUNED = Kind(
    pruned_transducer.NAME,
    pruned_transducer.PART,
    "fast_rnnt and an eager joiner",
    "rows B·T·R",
    "Pruned joiner and loss, forward and backward: peak memory besides the inputs",
    "pruned_transducer_memory.png",
)
TDT = Kind(
    tdt_loss.NAME,
    tdt_loss.MEMORY,
    "transformers",
    "rows B·T·(U + 1)",
    "TDT's joiner and loss, forward and backward: peak memory besides the inputs",
    "tdt_memory.png",
)


def joined(row: Row) -> int:
    """Returns the rows of the joiner, B T R or B T (U + 1)."""
    sizes = [int(size) for size in row.shape.split(",")[0].split("x")]
    if row.name == TDT.name:
        batch, frames, symbols, _ = sizes
        return batch * frames * (symbols + 1)
    batch, frames, _, s_range, _ = sizes
    return prod((batch, frames, s_range))


def outputs(row: Row) -> int:
    return int(row.shape.split("V=")[1])


def memory_rows(rows: Sequence[Row], kind: Kind = PRUNED) -> list[Row]:
    """Returns the newest measurement of each size and implementation."""
    found = [row for row in rows if (row.name, row.case) == (kind.name, kind.case) and row.peak_bytes]
    newest = {(row.shape, row.implementation): row for row in sorted(found, key=lambda row: row.date)}
    return sorted(newest.values(), key=lambda row: (outputs(row), joined(row)))


def figure(rows: Sequence[Row], kind: Kind = PRUNED):
    """Draws one panel per number of outputs: MiB over rows, both logarithmic."""
    plt = pyplot()
    lines = {
        UPSTREAM: (kind.upstream, "o-"),
        FASTASR: ("fastasr", "o-"),
        pruned_transducer.AGAIN: ("fastasr, keep_logits=False", "o:"),
    }
    classes = sorted({outputs(row) for row in rows})
    picture, axes = plt.subplots(
        1, len(classes), figsize=(3.6 * len(classes), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, v in zip(axes.flat, classes, strict=True):
        for name, (label, line) in lines.items():
            points = [
                (joined(r), r.peak_bytes / 2**20)
                for r in rows
                if outputs(r) == v and r.implementation == name
            ]
            if points:
                colour = COLOURS.get(name, COLOURS[FASTASR])
                panel.plot(*zip(*points, strict=True), line, ms=3, color=colour, label=label)
        panel.set_title(f"V = {v}", fontsize=9, loc="left")
        panel.set_xlabel(kind.rows, fontsize=8)
        panel.set_xscale("log")
        panel.set_yscale("log")
        sizes = sorted({joined(r) for r in rows if outputs(r) == v})
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        panel.set_xticks([], minor=True)  # labels of a logarithmic axis overlap within a decade
        plain(panel)
    axes[0, 0].set_ylabel("MiB", fontsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False)
    picture.suptitle(kind.title, fontsize=10)
    return picture


def table(rows: Sequence[Row]) -> str:
    """Returns the TDT's picture, where it has rows, and a Markdown table of its peak memory: a size per line."""
    own = [row for row in rows if row.name == TDT.name and row.peak_bytes]
    picture = f"![{TDT.title}](plots/{TDT.out})\n\n" if memory_rows(own, TDT) else ""
    return picture + by_machine(own, "B×T×U×D, V", "transformers | fastasr | share", _line)


def _line(unit: Unit) -> list[list[str]]:
    bytes_ = [row.peak_bytes if (row := unit.row(name)) else 0 for name in (UPSTREAM, FASTASR)]
    share = bytes_[1] / bytes_[0] if all(bytes_) else None
    return [[unit.first.shape, *(f"{n / 2**20:.1f} MiB" for n in bytes_), percent(share)]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastasr.benchmarks.studies.transducer_memory", description=__doc__
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tdt", action="store_true", help="the memory of a TDT")
    parser.add_argument("--out", type=Path, help="the picture; by default in docs/plots")
    options = parser.parse_args(arguments)
    kind = TDT if options.tdt else PRUNED
    out = options.out or ROOT / "docs" / "plots" / kind.out
    rows = memory_rows(read_all(sorted(options.results.glob("*.jsonl"))), kind)
    if not rows:
        print(f"no rows of {kind.name}, {kind.case}, in {options.results}", file=sys.stderr)
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, png(figure(rows, kind)))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
