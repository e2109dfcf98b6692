# SPDX-License-Identifier: Apache-2.0
"""Runs the blocks of pages in the current folder, as a reader would: ``python read_pages.py FILE``, where FILE has the
blocks as JSON: [[page, [[line, language, file, code], ...]], ...]. The Python blocks of a page share their names.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path


def run_python(page: str, line: int, code: str, names: dict) -> str:
    """Runs a block, so that tracebacks and torch.compile see the lines of the page; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n" * (line - 1) + code, page, "exec"), names)
    return printed.getvalue()


def run_bash(page: str, line: int, code: str) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{page}:{line}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def missing(shown: str, printed: str) -> list[str]:
    """Returns the lines of ``shown`` that are not among the printed ones. A line counts as printed if one printed line
    has all its cells, which two spaces separate: pages leave out the frame of a table. Errors differ from run to run,
    and "…" stands for the end of a cell.
    """
    lines = printed.split("\n")

    def is_printed(line: str) -> bool:
        cells = [c.rstrip("…") for c in re.split(r"  +", line) if not re.fullmatch(r"\d\.\de-\d\d", c)]
        return any(all(cell in other for cell in cells) for other in lines)

    return [line for line in shown.splitlines() if not is_printed(line)]


def main() -> None:
    for page, blocks in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        names, printed = {"__name__": "__main__"}, ""
        for line, language, file, code in blocks:
            if file:
                Path(file).write_text(code, encoding="utf-8")
            elif language == "python":
                printed = run_python(page, line, code, names)
            elif language == "bash":
                printed = run_bash(page, line, code)
            elif language == "text" and (absent := missing(code, printed)):
                sys.exit(f"{page}:{line}: not printed: {absent}\nprinted:\n{printed}")


if __name__ == "__main__":
    main()
