# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of benchmark rows, and their place between two markers of a page."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastasr import files
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, percent, times, units

COLUMNS = {"eager": "eager", "compile": "`torch.compile`", "upstream": "upstream", "fastasr": "**fastasr**"}
OLD, OLD_NOTE = " †", " †: measured with an earlier version of this code."
NONE_YET = "No measurements yet: `fastasr bench` makes them."
HEADLINES = (  # name, shape, case: the rows of the README's table, if its machine has them
    ("fast_conformer", "110M, 6 of its layers, 4 x 16 s", "encoder"),
    ("fast_conformer", "110M, 6 of its layers, 1 x 120 s", "encoder"),
    ("zipformer", "medium 1x6000x80", "whole model"),
    ("zipformer_training", "medium 4x800x80", "training step"),
    ("streaming_engine", "medium 8 streams, left context 128", "one chunk of 16"),
    ("pruned_transducer", "4x400x60x5x512, V=500", "whole path"),
    ("mega", "default 4x200", "whole model"),
)


def mark(*rows: Row) -> str:
    """Returns the mark of a line of which a row is older than the code that it measures."""
    return OLD if any(row.old for row in rows) else ""


def grid(heads: Sequence[str], lines: Iterable[Sequence[object]], right: int = 0) -> list[str]:
    """Returns the lines of a Markdown table, whose last ``right`` columns are numbers."""

    def line(cells: Sequence[object]) -> str:
        return f"|{'|'.join(f' {cell} ' if cell != '' else ' ' for cell in cells)}|"

    return [line(heads), "|---" * (len(heads) - right) + "|---:" * right + "|", *map(line, lines)]


def _label(unit: Unit) -> str:
    first = unit.first
    if first.suite == "models":
        return f"{first.name} ({first.shape}), {first.case}{_pass(first)}{mark(first)}"
    dtype = "" if first.dtype == "float32" else f", {first.dtype}"
    return f"`{first.name}` {first.case}, {first.pass_}{dtype}{mark(first)}"


def _pass(row: Row) -> str:
    return "" if row.pass_ == "forward" else f", {row.pass_}"


def _limit(unit: Unit) -> str:
    row = unit.row("fastasr")
    return percent(row.fraction_of_limit if row else None)


def _times_lines(found: Sequence[Unit], columns: Sequence[str] = tuple(COLUMNS)) -> list[str]:
    lines = []
    for unit in found:
        gain = times(unit.ratio("upstream") or unit.ratio("eager"))
        lines.append([_label(unit), *(duration(unit.median(name)) for name in columns), gain, _limit(unit)])
    heads = "", *(COLUMNS[name] for name in columns), "gain", "of the machine's limit"
    return grid(heads, lines, len(columns) + 2)


def _linear_lines(found: Sequence[Unit]) -> list[str]:
    """Says how much of a model's gain comes from the linear layers alone."""
    lines = []
    for unit in found:
        alone, both = unit.ratio("upstream", "upstream+linear"), unit.ratio("upstream")
        if unit.first.case == "whole model" and alone and both:
            lines.append(
                f"- {_label(unit)}: {times(both)} over upstream as shipped. Replacing only its linear layers "
                f"brings {times(alone)}; the other kernels bring {times(both / alone)}."
            )
    return ["", *lines] if lines else []


def _dispatch_lines(found: Sequence[Unit]) -> list[str]:
    """Returns a table of microseconds of a call on a tiny tensor: an op per line, a pass per column,
    eager in brackets.
    """
    passes = list(dict.fromkeys(unit.first.pass_ for unit in found))
    by_cell = {(unit.first.name, unit.first.pass_): unit for unit in found}
    lines = []
    for name in dict.fromkeys(unit.first.name for unit in found):
        made = (by_cell.get((name, pass_)) for pass_ in passes)
        cells = (
            f"{duration(u.median('fastasr'))} ({duration(u.median('eager'))})" if u else "–" for u in made
        )
        lines.append([f"`{name}`{mark(*(u.first for u in found if u.first.name == name))}", *cells])
    title = "Cost of a call on a tiny tensor, fastasr (eager formula):"
    return ["", title, "", *grid(("op", *passes), lines)]


def conditions(rows: Sequence[Row]) -> str:
    """Says where and with what the rows of one machine were measured."""
    first = max(rows, key=lambda row: row.date)
    commits = sorted({row.commit for row in rows})
    versions = f"torch {first.torch}" + (f", CUDA {first.cuda}" if first.cuda else "")
    return (
        f"**{first.device_name}**, {first.threads} threads, {versions}, Python {first.python}; "
        f"commit {', '.join(commits)}; {first.date[:10]}. Medians of interleaved repetitions."
        + (OLD_NOTE if mark(*rows) else "")
    )


def by_name(rows: Sequence[Row], field: str = "device_name") -> list[list[Row]]:
    """Returns the rows grouped by a field, by default by machine, in order of appearance."""
    names = dict.fromkeys(getattr(row, field) for row in rows)
    return [[row for row in rows if getattr(row, field) == name] for name in names]


def by_machine(
    rows: Sequence[Row], names: str, figures: str, lines: Callable[[Unit], list[list[str]]], note: str = ""
) -> str:
    """Returns a Markdown table per machine, below the conditions of its rows. ``names`` and ``figures`` are heads of
    columns, separated by " | "; ``lines`` returns the lines of a unit, a text per column; ``note`` stands below."""
    heads, numbers = (text.split(" | ") for text in (names, figures))
    shown = []
    for measured in by_name(rows):
        cells = ([one[0] + mark(u.first), *one[1:]] for u in units(measured) for one in lines(u))
        shown += [conditions(measured), "", *grid(heads + numbers, cells, len(numbers))]
        shown += ["", note, ""] if note else [""]
    return "\n".join(shown).strip() or NONE_YET


def table(rows: Sequence[Row]) -> str:
    """Returns all rows, machine by machine: models and ops, the gain of the linear layers, the cost of a call."""
    blocks = []
    for measured in by_name(rows):
        found = units(measured)
        timed = [unit for suite in ("models", "ops") for unit in found if unit.first.suite == suite]
        dispatched = [unit for unit in found if unit.first.suite == "dispatch"]
        lines = [conditions(measured), ""]
        lines += [*_times_lines(timed), *_linear_lines(timed)] if timed else []
        blocks.append("\n".join(lines + (_dispatch_lines(dispatched) if dispatched else [])))
    return "\n\n".join(blocks) or NONE_YET


def without_padding(rows: Sequence[Row]) -> str:
    """Returns the tables of docs/swap.md: batches of unequal lengths, padded and without padding."""
    padded, ragged = ("upstream", "fastasr"), "fastasr, ragged"

    def lines(unit: Unit) -> list[list[str]]:
        figures = [duration(unit.median(name)) for name in (*padded, ragged)]
        gains = [times(unit.ratio(name, ragged)) for name in padded]
        return [[f"{unit.first.case}, {unit.first.shape}{_pass(unit.first)}", *figures, *gains]]

    figures = "upstream | fastasr, padded | fastasr, ragged | ragged × upstream | ragged × padded"
    return by_machine(rows, "encoder, batch", figures, lines)


def whole_models(rows: Sequence[Row]) -> str:
    """Returns the README's table: ``HEADLINES`` on the machine and the day that have most of them; on a tie, the last.
    A mark shows a row whose code has changed since, on that day too."""
    columns = ("upstream", "compile", "fastasr")

    def headlines(measured: Sequence[Row]) -> list[Unit]:
        found = units(row for row in measured if row.suite == "models")
        return [u for key in HEADLINES for u in found if (u.first.name, u.first.shape, u.first.case) == key]

    measured = (
        [row for row in of_machine if row.date[:10] == day]
        for of_machine in by_name(rows)
        for day in dict.fromkeys(row.date[:10] for row in of_machine)
    )
    shown = max(
        map(headlines, measured),
        key=lambda found: (len(found), max((u.first.date for u in found), default="")),
        default=[],
    )
    if not shown:
        return NONE_YET
    where = conditions([row for unit in shown for row in unit.rows])
    return "\n".join([*_times_lines(shown, columns), "", where])


def marks(name: str = "bench") -> tuple[str, str]:
    """Returns the markers of a block with this name."""
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"


def replaced(text: str, block: str, name: str = "bench") -> str:
    """Returns ``text`` with ``block`` between the markers. Raises ``ValueError`` unless there is exactly one pair of
    them.
    """
    start, end = marks(name)
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"expected one {start} and after it one {end}")
    return f"{text.split(start)[0]}{start}\n{block}\n{end}{text.split(end)[1]}"


def _unmarked(text: str) -> str:
    return text.replace(OLD_NOTE, "").replace(OLD, "")


def put(page: Path, block: str, check: bool, name: str = "bench") -> int:
    """Puts ``block`` between the page's markers; with ``check`` it only compares all but the marks of old rows, which
    every change of code moves. Returns 1, and reports it, when ``check`` finds a difference, and 0 if not. Raises
    ``ValueError`` or ``OSError`` if the page cannot be used.
    """
    text = page.read_text(encoding="utf-8")
    made = replaced(text, block, name)
    if made == text or (check and _unmarked(made) == _unmarked(text)):
        return 0
    if check:
        print(f"{page} is not what the results say; run this without --check", file=sys.stderr)
        return 1
    files.write(page, made)
    return 0
