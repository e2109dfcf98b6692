# SPDX-License-Identifier: Apache-2.0
"""Time and memory over the length of the input, from the rows whose case is called "length …", and for a model from
those of one size of it. It also draws the maps of sweeps.

``python -m fastasr.benchmarks.studies.curves [--results DIR] [--out DIR]`` writes one picture per op or model
with such rows, and one per sweep.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fastasr import files
from fastasr.benchmarks import sweep
from fastasr.benchmarks.plots import COLOURS, OTHER_COLOUR, plain, png, pyplot
from fastasr.benchmarks.rows import Row, read_all
from fastasr.benchmarks.studies.results import ROOT
from fastasr.benchmarks.table import title

PREFIX = "length "
# the part of a row's shape that varies
MODELS = {"fast_conformer": re.compile(r"(110M, 2 of its layers, 1 x )(\d+)( s)")}


def lengths(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns op or model -> its rows over the length, shortest first, with the newest measurement of each."""
    newest: dict[tuple, Row] = {}
    for row in sorted((row for row in rows if length(row) is not None), key=lambda row: row.date):
        newest[row.name, length(row), row.pass_, row.implementation] = row
    found = defaultdict(list)
    for row in sorted(newest.values(), key=length):
        found[row.name].append(row)
    return dict(found)


def length(row: Row) -> int | None:
    """Returns the length of a row that belongs to a picture, else None."""
    if row.case.startswith(PREFIX):
        return int(row.case.removeprefix(PREFIX).split()[0])
    found = row.name in MODELS and MODELS[row.name].fullmatch(row.shape)
    return int(found[2]) if found else None


def figure(name: str, rows: Sequence[Row]):
    """Draws, on log-log axes, milliseconds per pass and the peak memory of the last pass, one line per
    implementation.
    """
    plt = pyplot()
    passes = list(dict.fromkeys(row.pass_ for row in rows))
    picture, axes = plt.subplots(
        1, len(passes) + 1, figsize=(4.2 * (len(passes) + 1), 3.6), layout="constrained"
    )
    for panel, pass_ in zip(axes, passes, strict=False):
        _lines(panel, [row for row in rows if row.pass_ == pass_], lambda row: row.median_ms)
        panel.set_title(f"{pass_}, ms", fontsize=9, loc="left")
    remembered = [row for row in rows if row.pass_ == passes[-1] and row.peak_bytes]
    _lines(axes[-1], remembered, lambda row: row.peak_bytes / 2**20)
    axes[-1].set_title(f"peak memory of {passes[-1]}, MiB", fontsize=9, loc="left")
    axes[0].legend(fontsize=8, frameon=False)
    if name in MODELS:
        shape = MODELS[name].sub(r"\1L\3", rows[0].shape)
    else:
        shape = "×".join(["L", *rows[0].shape.split("x")[1:]])
    picture.suptitle(
        f"{name} over the length, {shape}, {rows[0].device_name}", fontsize=10, x=0.01, ha="left"
    )
    return picture


def _lines(axes, rows: Sequence[Row], value) -> None:
    for name in dict.fromkeys(row.implementation for row in rows if row.implementation != "copy"):
        points = [(length(row), value(row)) for row in rows if row.implementation == name]
        axes.plot(
            *zip(*points, strict=True), "o-", ms=3, color=COLOURS.get(name, OTHER_COLOUR), label=title(name)
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("L", fontsize=8)
    plain(axes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastasr.benchmarks.studies.curves", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plots")
    options = parser.parse_args(arguments)
    rows = read_all(sorted(options.results.glob("*.jsonl")))
    found, maps = lengths(rows), sweep.draw(rows, options.out)
    if not found and not maps:
        print(f"no rows over the length in {options.results}", file=sys.stderr)
        return 1
    for name, rows in found.items():
        path = options.out / f"{name}_length.png"
        files.write(path, png(figure(name, rows)))
        maps.append(path)
    print(*maps, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
