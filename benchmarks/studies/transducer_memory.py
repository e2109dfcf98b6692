# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the pruned joiner and its loss over rows and outputs, from the rows of ``pruned_transducer``.

``python -m fastasr.benchmarks.studies.transducer_memory [--results DIR] [--out FILE]`` writes the picture.
"""

import argparse
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

from fastasr.benchmarks.models.pruned_transducer import FASTASR, NAME, PART, UPSTREAM
from fastasr.benchmarks.plots import COLOURS, plain, png, pyplot
from fastasr.benchmarks.rows import Row, read_all

ROOT = Path(__file__).resolve().parents[2]
LABELS = {UPSTREAM: "fast_rnnt and an eager joiner", FASTASR: "fastasr"}


def joined(row: Row) -> int:
    """Returns the rows of the joiner, B T R."""
    batch, frames, _, s_range, _ = row.shape.split(",")[0].split("x")
    return prod(map(int, (batch, frames, s_range)))


def outputs(row: Row) -> int:
    return int(row.shape.split("V=")[1])


def memory_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns the newest measurement of each size and implementation."""
    found = [row for row in rows if (row.name, row.case) == (NAME, PART) and row.peak_bytes]
    newest = {(row.shape, row.implementation): row for row in sorted(found, key=lambda row: row.date)}
    return sorted(newest.values(), key=lambda row: (outputs(row), joined(row)))


def figure(rows: Sequence[Row]):
    """Draws one panel per number of outputs: MiB over rows, both logarithmic."""
    plt = pyplot()
    classes = sorted({outputs(row) for row in rows})
    picture, axes = plt.subplots(
        1, len(classes), figsize=(3.6 * len(classes), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, v in zip(axes.flat, classes, strict=True):
        for name, label in LABELS.items():
            points = [
                (joined(r), r.peak_bytes / 2**20)
                for r in rows
                if outputs(r) == v and r.implementation == name
            ]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", ms=3, color=COLOURS[name], label=label)
        panel.set_title(f"V = {v}", fontsize=9, loc="left")
        panel.set_xlabel("rows B·T·R", fontsize=8)
        panel.set_xscale("log")
        panel.set_yscale("log")
        plain(panel)
    axes[0, 0].set_ylabel("MiB", fontsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False)
    picture.suptitle(
        "Pruned joiner and loss, forward and backward: peak memory besides the inputs", fontsize=10
    )
    return picture


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastasr.benchmarks.studies.transducer_memory", description=__doc__
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plots" / "pruned_transducer_memory.png")
    options = parser.parse_args(arguments)
    rows = memory_rows(read_all(sorted(options.results.glob("*.jsonl"))))
    if not rows:
        print(f"no rows of {NAME}, {PART}, in {options.results}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(png(figure(rows)))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
