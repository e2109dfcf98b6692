# SPDX-License-Identifier: Apache-2.0
"""Skips tests that have passed on this machine with the same files, and runs the longest first.

A test's key is the hash of its name, of every file that it needs (scripts/sources.py), of the installed packages, the
processor and the settings. A file of tests that starts processes or reads files needs the whole tree, unless it says
``pytestmark = pytest.mark.needs("docs", "examples/*.py")``: what a folder holds, or files with all that they need
themselves. Tests marked ``inner`` or ``always`` are never skipped. A file of which every test has passed with what it
needs is not even imported. Of what would be skipped a tenth runs all the same (of tests of more than half a second
fewer), drawn by the run's seed: a tenth of such files, and a tenth of the tests in the others.

FASTASR_LEDGER   the file of passed tests; without it nothing is skipped or kept
CI_FULL=1        skips nothing
OP=<op>          runs what concerns one op, and skips nothing of it
"""

import hashlib
import os
import platform
import re
import sqlite3
import time
import zlib
from collections import defaultdict
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import sources
from sources import ROOT

TREE = ("fastasr", "kernels", "benchmarks", "csrc", "docs", "examples", "scripts", "tests")
BUILD = ("CMakeLists.txt", "setup.py", "pyproject.toml")  # every test needs them
OF_A_RUN = ("FASTASR_LEDGER", "FASTASR_CACHE", "FASTASR_GEMM")
LOOKS_ELSEWHERE = {"subprocess", "__file__", "ROOT"}
KERNELS = ROOT / "kernels"
NATIVE = (ROOT / "csrc/cpu", ROOT / "csrc/bindings")
# What the tests of a folder use and the tests of other folders judge: C++ kernels are judged by the C++ tests and by
# those of ops, models and swaps, and the models of a wheel are those of the tree.
JUDGED_ELSEWHERE = {
    **dict.fromkeys(("benchmarks", "cli", "docs", "examples", "faults", "kernels", "recipe"), NATIVE),
    "packaging": (*NATIVE, ROOT / "fastasr/models"),
}
DRAWN = 10  # one file in so many is drawn, and all of its tests: imports cost most
INTERPRETER = "tests/kernels/interpreter"  # how kernels are interpreted


@cache
def packages() -> list[str]:
    return sorted({f"{d.name} {d.version}" for d in metadata.distributions()})


@cache
def settings(**environment: str) -> str:
    """Returns what beside the files decides results: packages, processor, settings."""
    cpu = Path("/proc/cpuinfo")
    flags = re.findall(r"^flags.*|^Features.*", cpu.read_text(), re.MULTILINE)[:1] if cpu.exists() else []
    named = sorted(
        f"{k}={v}"
        for k, v in (os.environ | environment).items()
        if k.startswith(("FASTASR_", "TRITON_")) and not k.startswith(OF_A_RUN)
    )
    return "\n".join([platform.python_version(), platform.machine(), *flags, *packages(), *named])


@cache
def tree(*names: str) -> frozenset[Path]:
    """Returns the files below folders of the project, or the files of these names."""
    found = [p for n in names for p in ([ROOT / n] if (ROOT / n).is_file() else (ROOT / n).rglob("*"))]
    return frozenset(p for p in found if p.is_file() and p.suffix not in (".pyc", ".so"))


@cache
def files(path: Path, test: str, ops: tuple[str, ...], names: tuple[str, ...]) -> frozenset[Path]:
    """Returns what the tests of a name need, or those of a file, for ``ops``. ``names`` are folders, or files that are
    needed with all that they need."""
    ours = [
        f for op in ops for f in (sources.ops()[op], ROOT / f"fastasr/testing/samples/{op}.py") if f.exists()
    ]
    # Triton's kernels run where they are interpreted or imported, and nowhere else. Where they are interpreted, the
    # native library is not tested: it may even be missing.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    triton = interpreted or "kernels" in sources.words(path) | {*path.parts}
    judged_elsewhere = NATIVE if interpreted else JUDGED_ELSEWHERE.get(path.parent.name, ())
    others = (*([] if triton else [KERNELS]), *judged_elsewhere)
    found = sources.closure(path, *ours, without=others, test=test)
    named = {p for name in names for p in ROOT.glob(name) if p.is_file()}
    python = {p for p in named if p.suffix == ".py"}
    found |= sources.closure(*python, without=others) | sources.closure(*named - python)
    folders = [name for name in names if (ROOT / name).is_dir()]
    return frozenset(found | tree(*BUILD, *folders, *([INTERPRETER] if interpreted else [])))


@cache
def state(needed: frozenset[Path], **environment: str) -> str:
    return sources.digest(needed, settings(**environment))


@cache
def listing() -> str:
    """Returns a hash of the names of the project's files: a new file may bring new tests to others."""
    return hashlib.sha256("\n".join(sorted(map(str, tree(*TREE)))).encode()).hexdigest()


def key(item: pytest.Item) -> str:
    return hashlib.sha256(f"{item.nodeid}\n{state(needed(item))}".encode()).hexdigest()


@cache
def looks_elsewhere(path: Path) -> bool:
    """Says whether a file of tests, or a file beside it that it uses, starts processes or reads files."""
    beside = (p for p in sources.closure(path, without=(ROOT / "fastasr",)) if p.parent == path.parent)
    return any(LOOKS_ELSEWHERE & sources.words(p) for p in beside)


def test(item: pytest.Item) -> str:
    """Returns the name of a test that imports something itself, "others" for the others of its file, or ""."""
    names = sources.tests_with_imports(item.path)
    return item.originalname if item.originalname in names else "others" if names else ""


def ops_of(item: pytest.Item) -> tuple[str, ...]:
    """Returns the ops that a test is for: of a file that goes through all of them, those that the test's name has, or
    those of the file that it is named after."""
    if not sources.goes_through_ops(item.path, test(item)):
        return ()
    named = sources.ops().keys() & set(re.findall(r"\w+", item.name.partition("[")[2]))
    declared = sources.ops().get(item.path.stem.removeprefix("test_"))
    return tuple(sorted(named or {n for n, p in sources.ops().items() if declared in (p, None)}))


def needed(item: pytest.Item) -> frozenset[Path]:
    marked = item.get_closest_marker("needs")
    names = marked.args if marked else TREE if looks_elsewhere(item.path) else ()
    return files(item.path, test(item), ops_of(item), names)


def concerns(item: pytest.Item, op: str) -> bool:
    """Says whether a test is run for one op: it names the op, or its file does, or it compares a model that has it."""
    declared = sources.ops()
    if mine := ops_of(item):
        return any(declared[name] == declared[op] for name in mine) and len(mine) < len(declared)
    return item.get_closest_marker("inner") is not None or file_concerns(item.path, op)


def file_concerns(path: Path, op: str) -> bool:
    """Says whether a file is named after an op, or compares a model that has it."""
    declared = sources.ops()[op]
    return (
        op in path.stem
        or declared.stem in path.stem
        or ("parity" in path.parts and declared in sources.closure(path))
    )


@cache
def may_concern(path: Path, op: str) -> bool:
    """Says whether a file may hold tests that are run for one op: of others not even the imports are paid for."""
    return sources.goes_through_ops(path) or "inner" in sources.words(path) or file_concerns(path, op)


def runs_always(item: pytest.Item) -> bool:
    return any(map(item.get_closest_marker, ("always", "inner")))


def other_half(name: str) -> str:
    """Returns a test's name with bfloat16 for float16, or the reverse: of some pairs each run has one, by its seed."""
    return re.sub("b?float16", lambda m: "float16" if m[0][0] == "b" else "bfloat16", name)


class Ledger:
    def __init__(self, config: pytest.Config, path: str) -> None:
        packages()  # before a test imports setuptools, which brings packages of its own
        self.keys: dict[str, str] = {}
        self.known: dict[str, float] = {}
        self.failed: set[str] = set()
        self.seconds: dict[str, float] = defaultdict(float)
        self.passed: set[str] = set()
        self.collected: dict[Path, list[pytest.Item]] = defaultdict(list)
        # Processes of one session must find the same tests: what is written after the first has begun does not count.
        self.began = float(os.environ.setdefault("FASTASR_LEDGER_BEGAN", str(time.time())))
        self.seed, self.op = os.environ["SEED"], os.environ.get("OP")
        if self.op and self.op not in sources.ops():
            raise pytest.UsageError(f"OP: expected one of {', '.join(sorted(sources.ops()))}, got {self.op}")
        self.chosen = config.option.markexpr
        self.whole = not (self.op or config.option.keyword or any("::" in name for name in config.args))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.base = sqlite3.connect(path, timeout=60, isolation_level=None)
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS passed (key TEXT PRIMARY KEY, name TEXT, at REAL, seconds REAL)"
        )
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS files (name TEXT, listing TEXT, state TEXT, needed TEXT, at REAL, "
            "PRIMARY KEY (name, state))"
        )
        self.done, self.skipped = self.files()

    def name(self, path: Path) -> str:
        return f"{path.relative_to(ROOT)} -m {self.chosen!r}"

    def files(self, **environment: str) -> tuple[set[str], set[str]]:
        """Returns the files of which every test has passed with what it needs, and those of them not drawn to run."""
        if self.op or os.environ.get("CI_FULL") == "1":
            return set(), set()
        rows = self.base.execute(
            "SELECT name, state, needed FROM files WHERE at < ? AND listing = ? ORDER BY at DESC LIMIT 500",
            [self.began, listing()],
        )
        done = {
            name
            for name, known, needed in rows
            if state(frozenset(ROOT / n for n in needed.split("\n")), **environment) == known
        }
        # a session of its own is drawn as a whole, since its start costs most
        unit = {name: INTERPRETER if name.startswith(INTERPRETER) else name for name in done}
        return done, {name for name in done if zlib.crc32(f"{unit[name]} {self.seed}".encode()) % DRAWN}

    def has_nothing_in(self, *paths: Path, **environment: str) -> bool:
        """Says whether a session of these files in this environment would skip all of them."""
        return {self.name(path) for path in paths} <= self.files(**environment)[1]

    def pytest_ignore_collect(self, collection_path):
        is_file = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
        if self.op and is_file and not may_concern(collection_path, self.op):
            return True
        return True if self.name(collection_path) in self.skipped else None

    def skips(self, item: pytest.Item, known: dict[str, float]) -> bool:
        if runs_always(item) or self.keys[item.nodeid] not in known:
            return False
        share = 1000 if self.name(item.path) in self.done else 100
        return zlib.crc32(f"{item.nodeid} {self.seed}".encode()) % 1000 >= share * min(
            1.0, 0.5 / max(known[self.keys[item.nodeid]], 0.1)
        )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        if self.op:
            concerned = [item for item in items if concerns(item, self.op)]
            config.hook.pytest_deselected(items=list(set(items) - set(concerned)))
            items[:] = concerned
        every = list(items)
        yield
        self.keys = {item.nodeid: key(item) for item in every}
        chosen = {item.nodeid for item in items}
        for item in every:
            if item.nodeid in chosen or other_half(item.nodeid) in chosen:
                self.collected[item.path].append(item)
        rows = self.base.execute(
            "SELECT key, name, seconds FROM passed WHERE at < ? ORDER BY at", [self.began]
        ).fetchall()
        self.known, last = {k: s for k, _, s in rows}, {n: s for _, n, s in rows}
        left, kept = [], []
        for item in items:
            always = self.op or os.environ.get("CI_FULL") == "1"
            (kept if always or not self.skips(item, self.known) else left).append(item)
        config.hook.pytest_deselected(items=left)
        files = defaultdict(float)
        for item in kept:
            files[item.path] += last.get(item.nodeid, 100.0 if item.get_closest_marker("inner") else 0.1)
        items[:] = sorted(kept, key=lambda item: -files[item.path])

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        keys = {n: self.keys[n] for n in self.passed - self.failed if n in self.keys}
        rows = [(k, n, time.time(), self.seconds[n]) for n, k in keys.items()]
        self.base.executemany("INSERT OR REPLACE INTO passed VALUES (?, ?, ?, ?)", rows)
        forgotten = {n: self.keys[n] for n in self.failed if n in self.keys}
        self.base.executemany("DELETE FROM passed WHERE key = ?", [[k] for k in forgotten.values()])
        passed = {*keys.values(), *self.known} - {*forgotten.values()}
        for path, items in self.collected.items():
            if any(item.nodeid in self.failed for item in items):
                self.base.execute("DELETE FROM files WHERE name = ?", [self.name(path)])
            elif self.whole and all(self.keys[i.nodeid] in passed and not runs_always(i) for i in items):
                union = frozenset().union(*{needed(item) for item in items})
                names = "\n".join(sorted(str(p.relative_to(ROOT)) for p in union))
                row = (self.name(path), listing(), state(union), names, time.time())
                self.base.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", row)
