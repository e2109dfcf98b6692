# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page of a set of rows (needs jinja2 and matplotlib, extra ``bench``)."""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastasr import files
from fastasr.benchmarks import plots, table
from fastasr.benchmarks.rows import Row

TEMPLATES = Path(__file__).parent


def environment(folder: Path):
    """Returns the Jinja2 environment for the templates of ``folder``. Raises ``ImportError`` naming the extra."""
    try:
        import jinja2
    except ImportError:
        raise ImportError("the HTML page needs jinja2: pip install 'fastasr[bench]'") from None
    loader = jinja2.FileSystemLoader([str(folder), str(TEMPLATES)])
    made = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(ms=table.duration, times=table.times, percent=table.percent, title=table.title)
    made.filters["mib"] = lambda size: "–" if size is None else f"{size / 2**20:.1f} MiB"
    return made


def embedded(data: bytes) -> str:
    """Returns a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _section(name: str, found: list[table.Unit], picture: bytes) -> dict:
    return {
        "name": name,
        "picture": embedded(picture),
        "columns": table.implementations(found),
        "units": [
            {
                "case": unit.first.case,
                "pass": unit.first.pass_,
                "shape": unit.first.shape,
                "dtype": unit.first.dtype,
                "medians": {row.implementation: row.median_ms for row in unit.rows},
                "memory": {row.implementation: row.peak_bytes for row in unit.rows},
                "limit": unit.first.limit,
                "fraction": row.fraction_of_limit if (row := unit.row("fastasr")) else None,
                "gains": [unit.ratio("upstream"), unit.ratio("eager"), unit.ratio("compile")],
                "load": unit.first.load,
            }
            for unit in found
        ],
    }


def sections(rows: Sequence[Row]) -> list[dict]:
    """Returns the template's sections: per op or model the picture and the units."""
    pictures = plots.pictures(rows)
    return [_section(name, found, pictures[name]) for name, found in plots.sections(rows).items()]


def environments(rows: Sequence[Row]) -> list[dict]:
    """Returns the distinct environments of the rows, newest date of each."""
    keys = ("device_name", "threads", "commit", "torch", "triton", "cuda", "python")
    newest: dict[tuple, str] = {}
    for row in rows:
        stamp = tuple(getattr(row, key) for key in keys)
        newest[stamp] = max(newest.get(stamp, ""), row.date)
    return [{**dict(zip(keys, stamp, strict=True)), "date": date} for stamp, date in newest.items()]


def render(rows: Sequence[Row], title: str = "fastasr benchmarks", notes: Sequence[str] = ()) -> str:
    """Returns the page as text. ``notes`` lists what could not be measured, at the top."""
    return (
        environment(TEMPLATES)
        .get_template("page.html")
        .render(
            title=title,
            notes=notes,
            sections=sections(rows),
            environments=environments(rows),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def write(rows: Sequence[Row], path: Path, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, render(rows, **more))
    return path
