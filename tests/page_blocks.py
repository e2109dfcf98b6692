# SPDX-License-Identifier: Apache-2.0
"""The blocks of code in the pages that a new user reads, and what a test needs to know of them.

Blocks of ``python`` and ``bash`` run as they are written, one after the other, as a reader would run them. The first
line of a block may say otherwise:

- ``# needs: an NVIDIA GPU``: a test cannot run it, and why;
- ``# load.py``: the block is the content of a file, which the page tells the reader to save.

A block of ``text`` shows lines of what the block before it prints.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / name
    for name in (
        "README.md",
        *(f"docs/{stem}.md" for stem in ("index", "install", "swap", "one_op", "numerics", "cli")),
    )
)
FRAMEWORKS = tuple(sorted((ROOT / "docs" / "frameworks").glob("*.md")))
OPS = tuple(sorted((ROOT / "docs" / "ops").glob("*.md")))
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    line: int  # of the page, that of the first line of code
    language: str
    code: str

    @property
    def needs(self) -> str:
        """Returns what a machine must have for this block, or "" if a test runs it."""
        return self._first(r"# needs: (.+)")

    @property
    def file(self) -> str:
        """Returns the name of the file that the block is the content of, or ""."""
        return self._first(r"# (\w+\.py)")

    def _first(self, pattern: str) -> str:
        found = re.fullmatch(pattern, self.code.partition("\n")[0])
        return found[1] if found else ""


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page. Those inside a list lose its indentation."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCED.finditer(text):
        code = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        found.append(Block(text[: match.start(3)].count("\n") + 1, match[2], code))
    return found
