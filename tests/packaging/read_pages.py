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
    """Returns the lines of ``shown`` that are not among the printed ones. Errors differ from run to run."""

    def without_errors(line: str) -> str:
        return re.sub(r"\S+e-\d\d of \S+e-\d\d$", "", line).rstrip()

    lines = {*map(without_errors, printed.split("\n"))}
    return [line for line in shown.splitlines() if without_errors(line) not in lines]


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
