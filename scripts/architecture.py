# SPDX-License-Identifier: Apache-2.0
"""Draws docs/architecture.svg: the folders of the source tree, and their includes and imports.

    python scripts/architecture.py [--check]

The picture omits an arrow that follows from others. ``--check`` changes nothing and ends with 1 when the picture is not
current.
"""

import ast
import re
import sys
import textwrap
from html import escape
from pathlib import Path

import sources
from sources import ROOT

PICTURE = ROOT / "docs" / "architecture.svg"
WITHOUT_BOX = (ROOT / "fastasr", ROOT / "fastasr/asr")  # Their __init__ files pass on the boxes' names.
WIDTH, HEIGHT, GAP, RISE = 196, 86, 14, 48  # size of a box; space between boxes and between rows
Graph = dict[str, set[str]]


def folder(path: Path) -> str:
    """Returns the box that a source file belongs to: its package, or its folder in csrc."""
    parts = path.relative_to(ROOT).parts
    depth = {"fastasr": 2, "csrc": 2}.get(parts[0], 1) + (parts[:2] in (("fastasr", "asr"), ("csrc", "cpu")))
    return "/".join(parts[: min(depth, len(parts) - 1)])


def imported(path: Path) -> set[str]:
    """Returns the boxes that a Python file imports from, at its head or in a function."""
    files = {sources.modules()[name] for name in sources.imported(path)}
    native = {"csrc/bindings"} if "libfastasr.so" in path.read_text(encoding="utf-8") else set()
    return native | {folder(file) for file in files if file.parent not in WITHOUT_BOX}


def graph() -> Graph:
    """Returns box -> the boxes that it needs."""
    needs: Graph = {}
    for top in ("fastasr", "kernels", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if path.parent not in WITHOUT_BOX:
                needs.setdefault(folder(path), set()).update(imported(path))
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and "tests" not in path.parts:
            needs.setdefault(folder(path), set()).update({folder(file) for file in sources.included(path)})
    return {box: (others & needs.keys()) - {box} for box, others in needs.items()}


def reachable(needs: Graph, box: str) -> set[str]:
    found, left = set(), list(needs[box])
    while left:
        if (other := left.pop()) not in found:
            found.add(other)
            left += needs[other]
    return found


def reduced(needs: Graph) -> Graph:
    """Returns the graph without the arrows that follow from others. Arrows of a circle stay."""
    far = {box: reachable(needs, box) for box in needs}
    return {
        box: {a for a in others if not any(a in far[b] and b not in far[a] for b in others if b != a)}
        for box, others in needs.items()
    }


def rows(needs: Graph) -> list[list[str]]:
    """Returns the boxes from the top down: each above all that it needs, unless they need each other."""
    far = {box: reachable(needs, box) for box in needs}
    below = {box: {other for other in far[box] if box not in far[other]} for box in needs}
    depth: dict[str, int] = {}
    for box in sorted(needs, key=lambda box: len(below[box])):
        depth[box] = 1 + max((depth[other] for other in below[box]), default=-1)
    made = [sorted(box for box in needs if depth[box] == d) for d in range(max(depth.values()), -1, -1)]
    place = {}
    for row in reversed(made):  # A box lies near the boxes that it needs.
        mean = {box: sum(place.get(o, 0.5) for o in needs[box]) / max(1, len(needs[box])) for box in row}
        row.sort(key=lambda box: (mean[box], box))
        place |= {box: (i + 0.5) / len(row) for i, box in enumerate(row)}
    return made


def contents(box: str) -> list[str]:
    """Returns up to four lines: a box's purpose, and its folders or, without a text, its files."""
    path = ROOT / box
    names = sorted(
        p.name
        for p in path.iterdir()
        if p.is_dir() and not p.name.startswith(("_", "written")) and any(p.glob("*.*"))
    )
    text = ""
    if (path / "__init__.py").exists():
        text = ast.get_docstring(ast.parse((path / "__init__.py").read_text(encoding="utf-8"))) or ""
    elif not names:
        names = sorted({p.name.split(".")[0] for p in path.iterdir() if p.is_file()})
    listed = shortened(" · ".join(names), 4)
    sentence = re.split(r"\.\s", " ".join(text.replace("``", "").split()) + " ")[0]
    return [*shortened(sentence, 4 - len(listed)), *listed]


def shortened(text: str, lines: int, width: int = 31) -> list[str]:
    return textwrap.wrap(text, width, max_lines=lines, placeholder=" …") if lines else []


def draw() -> str:
    needs = graph()
    placed, levels = {}, rows(needs)
    width = max(len(row) for row in levels) * (WIDTH + GAP) + GAP
    for level, row in enumerate(levels):
        left = (width - len(row) * (WIDTH + GAP) + GAP) / 2
        placed |= {
            box: (left + i * (WIDTH + GAP), GAP + level * (HEIGHT + RISE)) for i, box in enumerate(row)
        }
    height = GAP + len(levels) * (HEIGHT + RISE) - RISE + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#888"/></marker>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for box, others in reduced(needs).items():
        for other in sorted(others):
            (x, y), (u, v) = placed[box], placed[other]
            x, y, u = x + WIDTH / 2, y + HEIGHT, u + WIDTH / 2
            bend = y + (v - y) / 2 if v > y else y + RISE
            lines.append(
                f'<path d="M{x:g} {y:g}C{x:g} {bend:g} {u:g} {bend:g} {u:g} {v:g}" fill="none" stroke="#888" '
                'marker-end="url(#a)"/>'
            )
    colours = {"fastasr": "#e8f0fe", "csrc": "#fdefdc", "kernels": "#fdefdc", "benchmarks": "#eee"}
    for box, (x, y) in placed.items():
        colour = colours[box.split("/")[0]]
        lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{colour}" stroke="#888"/>'
        )
        lines.append(
            f'<text x="{x + 8:g}" y="{y + 18:g}" font-size="13" font-weight="bold">{escape(box)}</text>'
        )
        for i, text in enumerate(contents(box)):
            lines.append(
                f'<text x="{x + 8:g}" y="{y + 35 + 14 * i:g}" font-size="10.5">{escape(text)}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


def main(arguments: list[str]) -> int:
    made = draw()
    if "--check" not in arguments:
        PICTURE.write_text(made, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != made:
        print(f"{PICTURE} is not current; run python scripts/architecture.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
