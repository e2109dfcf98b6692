# SPDX-License-Identifier: Apache-2.0
"""Code of studies whose results are a JSON file and tables on a page: their options, the file, the page."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from fastasr import files
from fastasr.benchmarks.markdown import put

ROOT = Path(__file__).resolve().parents[2]


def parser(study: str, doc: str, page: str, page_only: str = "--page-only") -> argparse.ArgumentParser:
    """Returns a parser with the options of every such study; ``page`` is its page below docs."""
    made = argparse.ArgumentParser(
        prog=f"python -m fastasr.benchmarks.studies.{study}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--results", type=Path, default=ROOT / f"benchmarks/results/{study}.json")
    made.add_argument("--page", type=Path, default=ROOT / "docs" / page)
    made.add_argument(page_only, action="store_true", dest="page_only", help="make the page from the results")
    made.add_argument("--check", action="store_true", help="only compare the page with the results")
    return made


def run(
    options: argparse.Namespace,
    measure: Callable[[dict], dict] | None,
    blocks: Callable[[dict], dict[str, str]],
) -> int:
    """Measures, unless the options say otherwise or ``measure`` is None, and puts the tables on the page.
    ``measure(found)`` gets the file's contents and returns the new ones; ``blocks(found)`` returns the tables by
    the names of their markers.

    Returns the exit code: 0, 1 when ``--check`` finds a difference, or 2 when a file or package is missing.
    """
    try:
        if measure and not (options.page_only or options.check):
            known = options.results.exists()
            found = measure(json.loads(options.results.read_text(encoding="utf-8")) if known else {})
            files.write(options.results, json.dumps(found) + "\n")
        elif options.check and not options.results.exists():
            return 0
        found = json.loads(options.results.read_text(encoding="utf-8"))
        made = blocks(found).items()
        return max((put(options.page, text, options.check, name) for name, text in made), default=0)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
