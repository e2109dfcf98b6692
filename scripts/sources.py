# SPDX-License-Identifier: Apache-2.0
"""The source files and what each of them needs: what it imports or includes, and the kernels of the ops that it names.

    python scripts/sources.py FILE...   # prints every file that these need, themselves included

What a file needs is read from its text alone. Names join what no import shows: an op ``swoosh`` has its kernels in
``kernels/swoosh.py`` and in the file of ``csrc/bindings`` that registers ``swoosh_forward``; whoever mentions an
operator of ``csrc/bindings`` needs the file that registers it; a header of ``csrc/cpu`` has its code in the files
beside it whose names start with its own.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"fastasr": "fastasr", "kernels": "fastasr.kernels", "benchmarks": "fastasr.benchmarks"}
SWAP = {
    "accelerate",
    "explain",
    "verify",
    "restore",
    "eager_mode",
    "SwapReport",
}  # fastasr loads them when asked


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
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Returns the names of those of our modules that a Python file imports, at its head or in a function."""
    names = set()
    for node in ast.walk(_tree(path)):
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


@cache
def words(path: Path) -> frozenset[str]:
    """Returns the identifiers of a Python file and the words in its strings, docstrings left out."""
    found, texts = set(), set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            texts |= {first.value} if isinstance(first, ast.Expr) else set()
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= set(node.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
            found |= set(re.findall(r"\w+", node.value))
    return frozenset(found)


@cache
def ops() -> dict[str, Path]:
    """Returns name -> the file that declares it, of every op and of every file of ops."""
    found = {}
    for path in (ROOT / "fastasr/ops").glob("[!_]*.py"):
        for node in _tree(path).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                if any(ast.unparse(d) != "cache" for d in node.decorator_list):
                    found[node.name] = path
            elif isinstance(node, ast.Assign) and "op(" in ast.unparse(node.value):
                found |= {target.id: path for target in node.targets if isinstance(target, ast.Name)}
        found[path.stem] = path
    return found


@cache
def operators() -> dict[str, Path]:
    """Returns name -> the file that registers it, of every operator of csrc/bindings."""
    return {
        name: path
        for path in (ROOT / "csrc/bindings").glob("*.cpp")
        for name in re.findall(r'\{\s*"(\w+)\(', path.read_text(encoding="utf-8"))
    }


def _native(path: Path) -> set[Path]:
    """Returns what a file of csrc needs: what it includes, and the code of the headers of csrc/cpu among that."""
    found = set(included(path))
    if path.suffix == ".h":
        found |= {p for p in path.parent.glob(f"{path.name.split('.')[0]}*.cpp") if "cpu" in path.parts}
    return found


def _python(path: Path) -> set[Path]:
    names, mentioned = imported(path), words(path)
    found = {modules()[name] for name in names}
    if path.is_relative_to(ROOT / "tests"):
        found |= {p for f in {path.parent, ROOT / "tests"} for p in f.glob("*.py") if p.stem in mentioned}
        found |= {p for folder in path.parents for p in [folder / "conftest.py"] if p.exists()}
    if "fastasr" in names and path != modules()["fastasr"]:  # which loads these when they are asked for
        found |= {modules()[n] for word in mentioned if (n := f"fastasr.{word}") in modules()}
        found |= {modules()["fastasr.swap"]} if SWAP & mentioned else set()
    if path == modules()["fastasr.ops"]:
        return found
    if "iter_modules" in mentioned:
        found |= set(path.parent.glob("*.py"))
    if path.parent == ROOT / "fastasr/ops":
        mine = {name for name, file in ops().items() if file == path}
        found |= {p for p in (ROOT / "kernels" / f"{word}.py" for word in mine | mentioned) if p.exists()}
        found |= {p for name, p in operators().items() if any(name.startswith(f"{op}_") for op in mine)}
    elif not path.is_relative_to(ROOT / "kernels"):
        found |= {ops()[word] for word in mentioned & ops().keys()}
    return found | {operators()[word] for word in mentioned & operators().keys()}


@cache
def needs(path: Path) -> frozenset[Path]:
    """Returns the files that a source file needs itself."""
    return frozenset((_python(path) if path.suffix == ".py" else _native(path)) - {path})


def closure(*paths: Path, without: Path | None = None) -> set[Path]:
    """Returns these files and all that they need, but those below the folder ``without`` and what only they need."""
    found, left = set(), list(paths)
    while left:
        path = left.pop()
        if path not in found and not (without and path.is_relative_to(without)):
            found.add(path)
            left += needs(path)
    return found


if __name__ == "__main__":
    print(*sorted(p.relative_to(ROOT) for p in closure(*(Path(a).resolve() for a in sys.argv[1:]))), sep="\n")
