# SPDX-License-Identifier: Apache-2.0
"""The source files and what each of them needs: what it imports or includes, and the kernels of the ops that it uses.

    python scripts/sources.py FILE...            # prints every file that these need, themselves included
    python scripts/sources.py --hashes FILE...   # prints for each the hash of what it needs, and its name

What a file needs is read from its text alone. Names join what no import shows: an op ``swoosh`` has its kernels in
``kernels/swoosh.py`` and in the file of ``csrc/bindings`` that registers ``swoosh_forward``; whoever mentions an
operator of ``csrc/bindings`` needs the file that registers it; a header of ``csrc`` has its code in the files beside
it whose names start with its own, or that include it first. A file uses an op by its dotted name (``ops.bypass``) or
by a string that is the op's name; where it hands on all ops (``getattr(ops, name)``), every word counts.
``fastasr.ops`` loads every op, and ``fastasr`` what it is asked for: whoever imports them needs the ops and the
packages that it uses alone.
"""

import ast
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"fastasr": "fastasr", "kernels": "fastasr.kernels", "benchmarks": "fastasr.benchmarks"}
HOLDERS = {"fastasr.ops", "torch.ops.fastasr"}  # every op is a name of each of these
# Whoever uses these goes through all ops.
REGISTRIES = {
    *("fastasr.ops.NAMES", "fastasr.ops.OPS", "fastasr.ops._op.OPS"),
    *("fastasr.ops._dispatch.FAMILIES", "fastasr.ops._dispatch.table"),
    *("fastasr.testing.tables", "fastasr.testing.table.tables", "fastasr.testing.table.table"),
}
RULES = ROOT / "fastasr/swap/rules"
# In these no model of upstream's is made that could be swapped.
WITHOUT_UPSTREAM = (
    *(f"fastasr/{name}" for name in ("__init__.py", "swap", "models", "ops", "testing", "rnnt")),
    *(f"fastasr/asr/{name}" for name in ("__init__.py", "recogniser", "decoding", "streaming", "export")),
    *("kernels", "tests/conftest.py"),
)
ENGINE = ("fastasr/ops", "fastasr/testing")  # have the registries, or get from them what they are asked for


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
def _tree(path: Path, test: str = "") -> ast.Module:
    """Returns the syntax tree of a Python file. With ``test`` the other tests that import something themselves are left
    out: they alone need that."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if test:
        tree.body = [n for n in tree.body if getattr(n, "name", test) == test or not _imports_itself(n)]
    return tree


def _imports_itself(node: ast.AST) -> bool:
    is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    return is_test and any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(node))


@cache
def tests_with_imports(path: Path) -> frozenset[str]:
    """Returns the names of the tests in a file that import something themselves."""
    return frozenset(node.name for node in _tree(path).body if _imports_itself(node))


@cache
def imported(path: Path, test: str = "") -> frozenset[str]:
    """Returns the names of those of our modules that a Python file imports, at its head or in a function."""
    names = set()
    for node in ast.walk(_tree(path, test)):
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
def references(path: Path, test: str = "") -> frozenset[str]:
    """Returns the dotted names (``fastasr.ops.bypass``) that a Python file uses, and those that it imports from
    modules."""
    nodes, bound, found = list(ast.walk(_tree(path, test))), defaultdict(set), set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                bound[alias.asname or name].add(name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound[alias.asname or alias.name].add(f"{node.module}.{alias.name}")
    found |= {name for names in bound.values() for name in names} - modules().keys()
    parts = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and node not in parts:
            first, dot, rest = ast.unparse(node).partition(".")
            found |= {name + dot + rest for name in bound[first]}
    return frozenset(found)


@cache
def included(path: Path) -> frozenset[Path]:
    """Returns the files of csrc that a file of csrc includes."""
    names = re.findall(r'^ *#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    places = (path.parent, ROOT / "csrc")
    return frozenset(f for name in names for f in ((p / name).resolve() for p in places) if f.is_file())


@cache
def _own_header(path: Path) -> Path | None:
    """Returns the header beside a file of csrc that it includes before all others."""
    first = re.search(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    header = ROOT / "csrc" / first[1] if first else path
    return header if header.parent == path.parent else None


def _texts(path: Path, test: str = "") -> list[str]:
    """Returns the strings of a Python file, docstrings left out."""
    nodes, first = list(ast.walk(_tree(path, test))), set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first |= {n.value for n in node.body[:1] if isinstance(n, ast.Expr)}
    constants = (n for n in nodes if isinstance(n, ast.Constant) and n not in first)
    return [n.value for n in constants if isinstance(n.value, str)]


@cache
def words(path: Path, test: str = "") -> frozenset[str]:
    """Returns the identifiers of a Python file and the words in its strings, docstrings left out."""
    found = {word for text in _texts(path, test) for word in re.findall(r"\w+", text)}
    for node in ast.walk(_tree(path, test)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= set(node.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            found |= set(node.module.split("."))
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


@cache
def lazy() -> dict[str, str]:
    """Returns dotted name -> package, of what ``fastasr`` shows to a type checker and loads when it is asked for."""
    blocks = (node for node in _tree(modules()["fastasr"]).body if isinstance(node, ast.If))
    imports = (
        n for block in blocks for n in block.body if isinstance(n, ast.ImportFrom) and n.module != "fastasr"
    )
    return {f"fastasr.{a.name}": node.module for node in imports for a in node.names}


@cache
def gathered() -> dict[str, set[Path]]:
    """Returns package -> its modules, of each package of which whatever its folder holds is imported. Who imports the
    package needs the modules that it names, and all of them only if it uses what has been made of them."""
    found = {n: p for n, p in modules().items() if p.name == "__init__.py" and "iter_modules" in words(p)}
    found["fastasr.testing.samples"] = modules()["fastasr.testing.samples"]  # benchmarks/ops.py imports them
    del found["fastasr.ops"]
    return {n: {*p.parent.glob("*.py"), *p.parent.glob("*/__init__.py")} for n, p in found.items()}


def _leads_to(name: str) -> set[Path]:
    """Returns the files of the modules on the way of a dotted name, and of the op that it names."""
    parts = name.split(".")
    places = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    found = {modules()[lazy().get(p, p)] for p in places if lazy().get(p, p) in modules()}
    for folder, name in pairwise(places):
        if folder in gathered() and name not in modules():
            found |= gathered()[folder]
    named = (
        word.removesuffix("_backward") for p, word in zip(places, parts[1:], strict=False) if p in HOLDERS
    )
    return found | {ops()[word] for word in named if word in ops()}


def goes_through_ops(path: Path, test: str = "") -> bool:
    """Says whether a Python file goes through all ops."""
    return not REGISTRIES.isdisjoint(references(path, test))


def _native(path: Path) -> set[Path]:
    """Returns what a file of csrc needs: what it includes, and the code of the headers among that."""
    found = set(included(path))
    if path.suffix == ".h":
        named = path.name.split(".")[0]
        found |= {p for p in path.parent.glob("*.cpp") if p.name.startswith(named) or _own_header(p) == path}
    if path.parent == ROOT / "csrc/bindings":
        found |= {path.with_name(name) for name in ("library.cpp", "glibc.cpp")}
    return found


def _python(path: Path, test: str = "") -> set[Path]:
    if path == modules()["fastasr"]:
        names = "fastasr.ops", "fastasr.ops._dispatch", "fastasr._registration"
        return {modules()[name] for name in names if name in modules()}
    mentioned, used, texts = words(path, test), references(path, test), set(_texts(path, test))
    names = imported(path, test) | used | {text for text in texts if re.fullmatch(r"fastasr(\.\w+)+", text)}
    if "fastasr" in used:
        names |= {f"fastasr.{word}" for word in mentioned}
    found = {file for name in names for file in _leads_to(name)}
    found |= {file for name in used & gathered().keys() for file in gathered()[name]}
    if path.is_relative_to(ROOT / "tests"):
        found |= {p for f in {path.parent, ROOT / "tests"} for p in f.glob("*.py") if p.stem in mentioned}
        found |= {p for folder in path.parents for p in [folder / "conftest.py"] if p.exists()}
    if path == modules()["fastasr.ops"]:
        return found
    if "__file__" in mentioned and not path.is_relative_to(ROOT / "tests"):
        found |= {p for p in path.parent.iterdir() if p.is_file() and p.suffix not in (".py", ".so")}
    if path.parent == ROOT / "fastasr/ops":
        mine = {name for name, file in ops().items() if file == path}
        found |= {p for p in (ROOT / "kernels" / f"{word}.py" for word in mine | mentioned) if p.exists()}
        found |= {p for name, p in operators().items() if any(name.startswith(f"{op}_") for op in mine)}
    elif not path.is_relative_to(ROOT / "kernels"):
        named = mentioned if HOLDERS & used else {text.removeprefix("fastasr::") for text in texts}
        found |= {ops()[word] for word in named & ops().keys()}
        if goes_through_ops(path, test) and not any(
            path.is_relative_to(ROOT / p) for p in (*ENGINE, "tests")
        ):
            found |= {*ops().values(), *(ROOT / "fastasr/testing/samples").glob("*.py")}
    return found | {operators()[word] for word in mentioned & operators().keys()}


@cache
def needs(path: Path, test: str = "") -> frozenset[Path]:
    """Returns the files that a source file needs itself."""
    if path.suffix == ".py":
        return frozenset(_python(path, test) - {path})
    return frozenset(_native(path) - {path} if path.is_relative_to(ROOT / "csrc") else ())


@cache
def _subjects(path: Path) -> frozenset[str]:
    """Returns framework and family, of which a file of fastasr/swap/rules has its name; nothing for the rules of torch,
    and for any other file."""
    name = path.relative_to(RULES).parts[0].removesuffix(".py") if path.is_relative_to(RULES) else ""
    return frozenset(name.split("_")) - {"", "init", "torch", "pycache"}


@cache
def subjects(path: Path, test: str = "") -> frozenset[str]:
    """Returns which of the words that rules are named after a Python file has."""
    if path.suffix != ".py" or any(path.is_relative_to(ROOT / name) for name in WITHOUT_UPSTREAM):
        return frozenset()
    known = frozenset().union(*map(_subjects, RULES.iterdir()))
    return frozenset(name for name in known if any(name in word.lower() for word in words(path, test)))


def closure(*paths: Path, without: tuple[Path, ...] = (), test: str = "") -> set[Path]:
    """Returns these files and all that they need, but the files ``without``, those below such folders, and what only
    they need. With ``test`` the first file is needed for the tests of this name alone.

    Every swap goes through all rules, but a rule binds its forwards to modules of its framework alone: what it needs is
    needed here if the files mention framework and family, as one that may have such a module does.
    """
    found, left, waiting = set(), list(paths), set()
    mentioned = set().union(*map(_subjects, paths))
    while left:
        path = left.pop()
        if path in found or any(map(path.is_relative_to, without)):
            continue
        found.add(path)
        waiting.add(path)
        mentioned |= subjects(path, test if path == paths[0] else "")
        ready = {p for p in waiting if _subjects(p) <= mentioned}
        waiting -= ready
        left += (n for p in ready for n in needs(p, test if p == paths[0] else ""))
    return found


@cache
def _content(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def digest(paths: Iterable[Path], salt: str = "") -> str:
    """Returns a hash of names and contents of files, and of a text."""
    found = hashlib.sha256(salt.encode())
    for path in sorted(paths):
        found.update(str(path.relative_to(ROOT)).encode() + _content(path))
    return found.hexdigest()


if __name__ == "__main__":
    paths = [Path(name).resolve() for name in sys.argv[1:] if name != "--hashes"]
    if "--hashes" not in sys.argv:
        print(*sorted(p.relative_to(ROOT) for p in closure(*paths)), sep="\n")
    for path in paths if "--hashes" in sys.argv else []:
        print(digest(closure(path))[:32], path.relative_to(ROOT))
