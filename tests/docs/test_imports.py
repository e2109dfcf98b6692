# SPDX-License-Identifier: Apache-2.0
"""Imports among fastasr's modules go down the layers and never in a circle. Imports inside functions count."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"fastasr": "fastasr", "kernels": "fastasr.kernels", "benchmarks": "fastasr.benchmarks"}
# The layers start with the lowest: a package imports itself and those before it. "fastasr" is the package's own file.
LAYERS = (
    *("kernels", "ops", "rnnt", "compat", "testing", "models", "export", "decoding", "swap", "fastasr"),
    *("audio", "streaming", "recipe", "benchmarks", "demo", "cli"),
)


def modules():
    """Returns module name -> its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path):
    """Returns those of fastasr's modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from [name] if name in MODULES else {node.module} & MODULES.keys()


IMPORTS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def layer(module):
    return LAYERS.index(module.split(".")[1] if "." in module else module)


def test_no_circles():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_imports_go_down():
    wrong = [
        f"{a} imports {b}" for a in IMPORTS for b in IMPORTS[a] if a != "fastasr" and layer(a) < layer(b)
    ]
    assert not wrong, "\n".join(wrong)
