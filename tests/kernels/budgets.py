# SPDX-License-Identifier: Apache-2.0
"""Reads and writes ``budgets.toml``, which has a section for each Triton series and a line for each configuration.

A section is {configuration: {"hash": its hash, 80: measures, 86: measures, ...}}. Measures are {"registers": number,
...} with the names of ``MEASURES``. The file leaves out the measures of sm_89 where they are those of sm_86.
"""

import json
import re
import tomllib
from pathlib import Path

FILE = Path(__file__).with_suffix(".toml")
MEASURES = ("registers", "spills", "shared", "wide", "narrow", "instructions", "repeated")
LIKE = {89: 86}  # an architecture and the one whose measures it has where the file names none


def read() -> dict[str, dict[str, dict]]:
    """Returns the sections by names such as "triton 3.7"."""

    def row(cells: dict) -> dict:
        found = {int(key[3:]): dict(zip(MEASURES, cells[key], strict=True)) for key in cells if key != "hash"}
        same = {key: found[other] for key, other in LIKE.items() if other in found}
        return {"hash": cells["hash"]} | same | found

    sections = tomllib.loads(FILE.read_text())
    return {section: {name: row(cells) for name, cells in rows.items()} for section, rows in sections.items()}


def write(section: str, rows: dict[str, dict]) -> None:
    """Replaces a section; the head of the file and other sections stay."""
    width = max(map(len, rows)) + 2
    lines = [f'["{section}"]']
    for name, row in rows.items():
        cells = [f'hash = "{row["hash"]}"']
        cells += [
            f"sm_{key} = {[row[key][m] for m in MEASURES]}"
            for key in sorted(row.keys() - {"hash"})
            if row[key] != row.get(LIKE.get(key))
        ]
        lines.append(f"{json.dumps(name):<{width}} = {{ {', '.join(cells)} }}")
    head, *sections = re.split(r"^(?=\[)", FILE.read_text(), flags=re.MULTILINE)
    kept = [s.strip() for s in sections if not s.startswith(lines[0])]
    FILE.write_text("\n\n".join([head.strip(), *sorted([*kept, "\n".join(lines)])]) + "\n")
