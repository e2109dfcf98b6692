# SPDX-License-Identifier: Apache-2.0
"""Reads from the sources which of our modules a Python file imports, and which files a file of csrc includes."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"fastasr": "fastasr", "kernels": "fastasr.kernels", "benchmarks": "fastasr.benchmarks"}


@cache
def modules() -> dict[str, Path]:
    """Returns module name -> its file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


@cache
def imported(path: Path) -> frozenset[str]:
    """Returns the names of those of our modules that a Python file imports, at its head or in a function. Imports for a
    type checker alone do not count: they never run."""
    names = set()
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names} & modules().keys()
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names |= {name if name in modules() else node.module} & modules().keys()
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            constants = (n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant))
            names |= {c for c in constants if isinstance(c, str)} & modules().keys()
    return frozenset(names)


@cache
def included(path: Path) -> frozenset[Path]:
    """Returns the files of csrc that a file of csrc includes."""
    names = re.findall(r'^ *#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    places = (path.parent, ROOT / "csrc")
    return frozenset(f for name in names for f in ((p / name).resolve() for p in places) if f.is_file())
