# SPDX-License-Identifier: Apache-2.0
"""Rows side by side: a unit per line, an implementation per column."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastasr.benchmarks.rows import Row

# column order; other implementations follow, and "copy" (the limit) comes last
ORDER = ("eager", "compile", "upstream", "upstream+linear", "operator", "fastasr")
BASELINES = ("upstream", "eager")
TITLES = {"compile": "torch.compile", "upstream+linear": "upstream, linears replaced", "copy": "copy (limit)"}


@dataclass(frozen=True)
class Unit:
    """The rows that were measured together, by implementation."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    def row(self, implementation: str) -> Row | None:
        return next((row for row in self.rows if row.implementation == implementation), None)

    @property
    def medians(self) -> dict[str, float]:
        return {row.implementation: row.median_ms for row in self.rows}

    def median(self, implementation: str) -> float | None:
        row = self.row(implementation)
        return row.median_ms if row else None

    def ratio(self, baseline: str, implementation: str = "fastasr") -> float | None:
        """Returns how many times faster ``implementation`` is than ``baseline``."""
        slow, fast = self.median(baseline), self.median(implementation)
        return slow / fast if slow and fast else None


def fastest_other(medians: Mapping[str, float]) -> str | None:
    """Returns the fastest implementation other than ours, if there is one."""
    return min((name for name in medians if name not in ("fastasr", "copy")), key=medians.get, default=None)


def ratio_to_fastest(medians: Mapping[str, float]) -> float | None:
    """Returns the time of the fastest of the others over ours. It is infinite if only ours could be measured, 0 if
    only others could, and None without either.
    """
    other, ours = fastest_other(medians), medians.get("fastasr")
    if other is None or ours is None:
        return None if other is ours else (0.0 if ours is None else float("inf"))
    return medians[other] / ours


def units(rows: Iterable[Row]) -> list[Unit]:
    """Returns rows grouped by unit, in order of appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.unit, []).append(row)
    return [Unit(tuple(group)) for group in groups.values()]


def implementations(found: Iterable[Unit]) -> list[str]:
    """Returns all implementations of the units, in column order."""
    names = dict.fromkeys(row.implementation for unit in found for row in unit.rows)
    ordered = [name for name in ORDER if name in names]
    others = [name for name in names if name not in ORDER and name != "copy"]
    return ordered + others + (["copy"] if "copy" in names else [])


def title(implementation: str) -> str:
    return TITLES.get(implementation, implementation)


def milliseconds(value: float | None) -> str:
    """Returns three significant digits without exponents: 1231, 13.6, 0.133, 0.00154."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.8f}".rstrip("0")


def duration(value: float | None) -> str:
    """Returns milliseconds with a unit that suits them."""
    if value is None:
        return "–"
    if value < 0.05:
        return f"{milliseconds(value * 1e3)} µs"
    if value >= 10_000:
        return f"{milliseconds(value / 1e3)} s"
    return f"{milliseconds(value)} ms"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.0f} %"


def line(rows: Sequence[Row]) -> str:
    """Returns one unit as one line of plain text."""
    unit = Unit(tuple(rows))
    first = unit.first
    figures = ", ".join(f"{name} {duration(unit.median(name))}" for name in implementations([unit]))
    gain = next((unit.ratio(base) for base in BASELINES if unit.ratio(base)), None)
    label = f"{first.name} {first.case}" + ("" if first.case == first.pass_ else f" {first.pass_}")
    return f"{label}: {figures}" + (f" ({times(gain)})" if gain else "")
