# SPDX-License-Identifier: Apache-2.0
"""Bar charts of rows (needs matplotlib, extra ``bench``): one picture per op or model, one panel per unit."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from fastasr import files
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, implementations, title, units

COLOURS = {
    "eager": "#b8bec8",
    "compile": "#8a94a6",
    "upstream": "#5b6678",
    "upstream+linear": "#e0a458",
    "operator": "#e0a458",
    "fastasr": "#c8374a",
}
OTHER_COLOUR = "#7a8ea8"
COLUMNS = 3


def pyplot():
    """Returns matplotlib's figure factory without a display. Raises ``ImportError`` naming the extra."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'fastasr[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def bars(
    axes, values: dict[str, float], spread: dict[str, tuple[float, float]], colours: dict[str, str] = COLOURS
) -> None:
    """Draws horizontal bars in milliseconds, each with its figure; ``spread`` draws quartiles as whiskers."""
    names = list(values)[::-1]
    heights = [values[name] for name in names]
    filled = [colours.get(name, OTHER_COLOUR) for name in names]
    axes.barh(range(len(names)), heights, color=filled, height=0.66)
    for position, name in enumerate(names):
        end = values[name]
        if name in spread:
            lower, upper = spread[name][0], min(spread[name][1], 1.1 * max(heights))
            axes.plot([lower, upper], [position, position], color="#20242c", linewidth=1)
            end = max(end, upper)
        axes.annotate(
            duration(values[name]),
            (end, position),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(names)), [title(name) for name in names], fontsize=8)
    axes.set_xlim(0, max(heights) * 1.28)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)


def _panel(axes, unit: Unit) -> None:
    names = [name for name in implementations([unit]) if name != "copy"]
    found = {name: unit.row(name) for name in names}
    bars(
        axes,
        {name: row.median_ms for name, row in found.items()},
        {name: (row.q1_ms, row.q3_ms) for name, row in found.items()},
    )
    limit = unit.median("copy")
    if limit:
        axes.axvline(limit, color="#20242c", linewidth=1, linestyle=(0, (4, 3)))
        place = {"xy": (limit, 1), "xycoords": ("data", "axes fraction")}
        place.update(xytext=(3, -2), textcoords="offset points")
        axes.annotate(f"copy {duration(limit)}", **place, va="bottom", fontsize=7)
    first = unit.first
    axes.set_title(f"{first.case}, {first.pass_}", fontsize=9, loc="left", pad=14 if limit else 8)


def figure(name: str, found: Sequence[Unit]):
    """Draws one panel per unit of ``name``."""
    plt = pyplot()
    columns = min(COLUMNS, len(found))
    lines = math.ceil(len(found) / columns)
    most = max(len(unit.rows) for unit in found)
    size = (4.6 * columns, (0.75 + 0.27 * most) * lines + 0.5)
    picture, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(axes.flat)
    for panel, unit in zip(panels, found, strict=False):
        _panel(panel, unit)
    for panel in panels[len(found) :]:
        panel.set_visible(False)
    picture.suptitle(f"{name}: time of one call, median and quartiles", fontsize=10, x=0.01, ha="left")
    return picture


def plain(axes) -> None:
    """Gives a panel of lines small labels, a grid and two spines."""
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#e6e8ec", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def png(picture) -> bytes:
    """Returns the picture as PNG and closes the figure."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=130, facecolor="white")
    pyplot().close(picture)
    return buffer.getvalue()


def sections(rows: Sequence[Row]) -> dict[str, list[Unit]]:
    """Returns the units by name of op or model; the cost of a call is under "dispatch <op>"."""
    groups: dict[str, list[Unit]] = {}
    for unit in units(rows):
        name = unit.first.name
        groups.setdefault(f"dispatch {name}" if unit.first.suite == "dispatch" else name, []).append(unit)
    return groups


def pictures(rows: Sequence[Row]) -> dict[str, bytes]:
    """Returns a PNG for each section."""
    return {name: png(figure(name, found)) for name, found in sections(rows).items()}


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes one PNG per picture; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, data in pictures(rows).items():
        path = folder / f"{name.replace(' ', '_')}.png"
        files.write(path, data)
        paths.append(path)
    return paths
