# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table of measurements from ``benchmarks/results/*.jsonl``, between its two markers.

``python -m fastasr.benchmarks.readme_table [README.md] [--results DIR] [--check]``; ``--check`` changes
nothing and ends with 1 when the README does not say what the rows say.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastasr.benchmarks import curves
from fastasr.benchmarks.rows import Row, read_all
from fastasr.benchmarks.table import Unit, duration, percent, times, units

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("eager", "compile", "upstream", "fastasr")
_HEADLINES = (
    "first call",
    "second call",
    "whole model",
    "whole model, autocast(bfloat16)",
    "training step",
    "whole path",
    "layer",
    "predictor",
    "segment 16, right 4",
)
NONE_YET = "No measurements yet: `make bench` writes them."
TITLES = ("eager", "`torch.compile`", "upstream", "**fastasr**")


def _label(unit: Unit) -> str:
    first = unit.first
    if first.suite == "models":
        pass_ = "" if first.pass_ == "forward" else f", {first.pass_}"
        return f"{first.name} ({first.shape}), {first.case}{pass_}"
    dtype = "" if first.dtype == "float32" else f", {first.dtype}"
    return f"`{first.name}` {first.case}, {first.pass_}{dtype}"


def _dispatch_lines(found: Sequence[Unit]) -> list[str]:
    """Microseconds of a call on a tiny tensor: an op per line, a pass per column, eager in brackets."""
    passes = list(dict.fromkeys(unit.first.pass_ for unit in found))
    lines = [
        "",
        "Cost of a call on a tiny tensor, fastasr (eager formula):",
        "",
        "| op | " + " | ".join(passes) + " |",
        "|---" * (len(passes) + 1) + "|",
    ]
    for name in dict.fromkeys(unit.first.name for unit in found):
        cells = []
        for pass_ in passes:
            unit = next((u for u in found if (u.first.name, u.first.pass_) == (name, pass_)), None)
            ours, eager = (unit.median("fastasr"), unit.median("eager")) if unit else (None, None)
            cells.append(f"{duration(ours)} ({duration(eager)})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def _limit(unit: Unit) -> str:
    row = unit.row("fastasr")
    return percent(row.fraction_of_limit if row else None)


def _headlines(found: Sequence[Unit]) -> list[Unit]:
    """The whole model, its first call, and of each op its first case: forward and forward + backward, or
    where the gradients are measured apart, those.
    """
    first_case: dict[str, str] = {}
    for unit in found:
        if unit.first.suite == "ops":
            first_case.setdefault(unit.first.name, unit.first.case)
    return [unit for unit in found if _is_headline(unit.first, first_case)]


def _is_headline(row: Row, first_case: dict[str, str]) -> bool:
    if row.suite == "models":
        return row.case in _HEADLINES or row.case.startswith("one chunk")
    return row.case == first_case[row.name] and row.pass_ != "backward"


def _times_lines(found: Sequence[Unit]) -> list[str]:
    lines = [
        "| | " + " | ".join(TITLES) + " | × upstream or eager | of the machine's limit |",
        "|---|" + "---:|" * (len(TITLES) + 2),
    ]
    for unit in found:
        cells = [duration(unit.median(name)) for name in COLUMNS]
        gain = times(unit.ratio("upstream") or unit.ratio("eager"))
        lines.append(f"| {_label(unit)} | " + " | ".join([*cells, gain, _limit(unit)]) + " |")
    return lines


def conditions(rows: Sequence[Row]) -> str:
    """Where and with what the rows of one machine were measured."""
    first = max(rows, key=lambda row: row.date)
    commits = sorted({row.commit for row in rows})
    versions = f"torch {first.torch}" + (f", CUDA {first.cuda}" if first.cuda else "")
    return (
        f"**{first.device_name}**, {first.threads} threads, {versions}, Python {first.python}; "
        f"commit {', '.join(commits)}; {first.date[:10]}. Medians of interleaved repetitions."
    )


def _machine_lines(rows: Sequence[Row]) -> list[str]:
    lines = [conditions(rows), ""]
    found = units(rows)
    # models first: they are what the ops are for
    timed = [unit for suite in ("models", "ops") for unit in found if unit.first.suite == suite]
    shown = _headlines(timed) or timed
    if shown:
        lines += [*_times_lines(shown), *_linear_part(timed)]
    if len(shown) < len(timed):
        rest = [unit for unit in timed if unit not in shown]
        lines += ["", "<details><summary>All other sizes, passes and stacks</summary>", ""]
        lines += [*_times_lines(rest), "", "</details>"]
    dispatched = [unit for unit in found if unit.first.suite == "dispatch"]
    return lines + (_dispatch_lines(dispatched) if dispatched else [])


def _linear_part(found: Sequence[Unit]) -> list[str]:
    """How much of a model's gain the linear layers alone bring."""
    lines = []
    for unit in found:
        alone, both = unit.ratio("upstream", "upstream+linear"), unit.ratio("upstream")
        if unit.first.case == "whole model" and alone and both:
            lines += [
                "",
                f"{unit.first.name}: of the {times(both)} over upstream as shipped, replacing only its "
                f"linear layers brings {times(alone)}; the other kernels {times(both / alone)}.",
            ]
    return lines


def table(rows: Sequence[Row]) -> str:
    """Markdown for all machines in ``rows``."""
    if not rows:
        return NONE_YET
    machines = dict.fromkeys(row.device_name for row in rows)
    blocks = [
        "\n".join(_machine_lines([row for row in rows if row.device_name == name])) for name in machines
    ]
    return "\n\n".join(blocks)


def replaced(text: str, block: str) -> str:
    """``text`` with what stands between the markers replaced. Raises ``ValueError`` without exactly one
    pair.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"expected one {START} and after it one {END}")
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{block}\n{END}{after}"


def put(page: Path, block: str, check: bool) -> int:
    """Puts ``block`` between the page's markers; with ``check`` only compares. The exit code: 1 when ``check`` finds a
    difference, which it prints. Raises ``ValueError`` and ``OSError`` for a page that cannot be used."""
    text = page.read_text(encoding="utf-8")
    made = replaced(text, block)
    if made == text:
        return 0
    if check:
        print(f"{page} is not what the results say; run this without --check", file=sys.stderr)
        return 1
    page.write_text(made, encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 when ``--check`` finds a difference, 2 when a file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m fastasr.benchmarks.readme_table", description=__doc__)
    parser.add_argument("readme", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    try:
        rows = read_all(sorted(options.results.glob("*.jsonl")))
        made = table([row for row in rows if not row.case.startswith(curves.PREFIX)])
        return put(options.readme, made, options.check)
    except (OSError, ValueError) as error:
        print(f"error: {options.readme}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
