# SPDX-License-Identifier: Apache-2.0
"""Writes the measured tables of docs/ops and of model pages from benchmarks/results, between README.md's markers.

    python scripts/op_tables.py [--check]

``--check`` changes nothing and ends with 1 when a page does not say what the rows say.
"""

import argparse
import sys
from pathlib import Path

from fastasr import ops
from fastasr.benchmarks.models import transcribe
from fastasr.benchmarks.readme_table import put, table
from fastasr.benchmarks.rows import read_all

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "swoosh": ("swoosh_l", "swoosh_r"),
    "residual_norm": ("gated_residual_norm", "residual_norm"),
}  # pages that are not named after their one op
TRANSCRIBED = {"decoding.md": transcribe}
MODEL_PAGES = ("e_branchformer", "emformer", "emformer_rnnt")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    rows = read_all(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    op_pages = sorted((ROOT / "docs" / "ops").glob("*.md"))
    described = [name for page in op_pages for name in PAGES.get(page.stem, (page.stem,))]
    if missing := sorted(set(ops.NAMES) - set(described)):
        print(f"docs/ops has no page for {', '.join(missing)}", file=sys.stderr)
        return 1
    tables = {}
    for page in op_pages:
        names = PAGES.get(page.stem, (page.stem,))
        tables[page] = table([row for row in rows if row.suite == "ops" and row.name in names])
    for name, model in TRANSCRIBED.items():
        tables[ROOT / "docs" / name] = model.table([row for row in rows if row.name == model.NAME])
    for name in MODEL_PAGES:
        tables[ROOT / "docs" / "models" / f"{name}.md"] = table(
            [row for row in rows if row.suite == "models" and row.name == name]
        )
    return max(put(page, block, options.check) for page, block in tables.items())


if __name__ == "__main__":
    sys.exit(main())
