# SPDX-License-Identifier: Apache-2.0
"""tests/ledger.py skips what has passed with the same files, and nothing else, in sessions on a tree of two ops."""

import os
import re
import shutil
import subprocess
import sys
import zlib

import pytest
from ledger import DRAWN
from sources import ROOT

pytestmark = pytest.mark.needs("tests/ledger.py", "scripts/sources.py", "pyproject.toml")

OP = "@staticmethod\ndef {name}():\n    return True\n"
TEST = "from fastasr import ops\n\ndef test_{name}():\n    assert ops.{name}()\n"
LOADER = """from importlib import import_module
from pkgutil import iter_modules

for module in (m.name for m in iter_modules(__path__) if m.name[0] != "_"):
    globals()[module] = getattr(import_module(f"{__name__}.{module}"), module)
"""
FILES = {
    "fastasr/__init__.py": "",
    "fastasr/ops/__init__.py": LOADER,
    "fastasr/ops/_dispatch.py": "",
    "fastasr/ops/first.py": OP.format(name="first"),
    "fastasr/ops/second.py": OP.format(name="second"),
    "fastasr/testing/samples/__init__.py": "",
    "fastasr/swap/rules/__init__.py": "",
    "benchmarks/__init__.py": "",
    "kernels/__init__.py": "",
    "csrc/bindings/library.cpp": "",
    "csrc/bindings/glibc.cpp": "",
    "csrc/bindings/first.cpp": '{"first_forward("',
    "docs/page.md": "",
    "tests/conftest.py": "from ledger import Ledger\n\ndef pytest_configure(config):\n    import os\n"
    "    config.pluginmanager.register(Ledger(config, os.environ['FASTASR_LEDGER']), 'ledger')\n",
    "tests/unit/test_first.py": TEST.format(name="first"),
    "tests/unit/test_second.py": TEST.format(name="second") + "\ndef test_other(): pass\n",
    "tests/cli/test_command.py": TEST.format(name="first").replace("test_first", "test_command"),
    "tests/unit/test_pages.py": "def test_pages():\n    assert __file__\n",
    "tests/unit/test_marked.py": "import pytest\n\npytestmark = pytest.mark.needs('fastasr/ops/s*.py')\n\n"
    "def test_marked():\n    assert __file__\n",
}
ALL = {"first", "second", "other", "command", "pages", "marked"}


def nothing_drawn() -> str:
    """Returns a seed that draws no file of the tree and none of its tests to run although they have passed."""
    places = {"other": "unit/test_second", "command": "cli/test_command"}
    tests = {n: f"tests/{places.get(n, f'unit/test_{n}')}.py" for n in ALL}
    files = {f"{name} -m ''" for name in tests.values()}
    items = {f"{name}::test_{n}" for n, name in tests.items()}
    for seed in map(str, range(1000)):
        draws = [zlib.crc32(f"{name} {seed}".encode()) for name in (*files, *items)]
        if all(draw % DRAWN for draw in draws[: len(files)]) and all(
            draw % 1000 >= 100 for draw in draws[len(files) :]
        ):
            return seed
    raise AssertionError("no seed draws nothing")


@pytest.fixture
def session(tmp_path):
    """Returns a function that runs a session on the tree and returns the names of the tests that ran."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("tests/ledger.py", "scripts/sources.py", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    seed = nothing_drawn()

    def run(*arguments: str, **environment: str) -> set[str]:
        outer = ("FASTASR_", "PYTEST_", "CI_FULL", "OP")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
        ledger = {"FASTASR_LEDGER": str(tmp_path / "ledger.sqlite"), "SEED": seed, "PYTHONPATH": "."}
        command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *arguments, "tests"]
        done = subprocess.run(
            command, cwd=tmp_path, env=kept | ledger | environment, capture_output=True, text=True
        )
        assert done.returncode in (0, 1, 5), done.stdout + done.stderr
        return set(re.findall(r"::test_(\w+) (?:PASSED|FAILED)", done.stdout))

    run.folder = tmp_path
    return run


def test_what_has_passed_is_skipped_until_what_it_needs_changes(session):
    first = session.folder / "fastasr/ops/first.py"
    before = first.read_text()
    assert session() == ALL
    assert session() == set()
    first.write_text(before + "# a comment\n")
    assert session() == {
        "first",
        "command",
        "pages",
    }  # that of pages has __file__, so it needs the whole tree
    (session.folder / "docs/page.md").write_text("a line\n")
    assert session() == {"pages"}
    (session.folder / "docs/page.md").write_text("")
    first.write_text(before)
    assert session() == set()  # as it was when all passed
    (session.folder / "csrc/bindings/first.cpp").write_text('{"first_forward("  // a comment')
    assert session() == {"first", "pages"}  # that of the command uses the kernel, which others judge
    (session.folder / "fastasr/ops/second.py").write_text(OP.format(name="second") + "# a comment\n")
    assert session() == {"second", "other", "pages", "marked"}
    (session.folder / "setup.py").write_text("")
    assert session() == ALL  # every test needs how the library is built
    assert session(FASTASR_SIMD="portable") == ALL
    assert session(CI_FULL="1") == ALL


def test_what_fails_runs_again(session):
    second = session.folder / "tests/unit/test_second.py"
    assert session() == ALL
    second.write_text(
        second.read_text().replace("other(): pass", "other(): assert not open('fails').close()")
    )
    assert session() == {"second", "other", "pages"}
    assert session() == {"other"}
    (session.folder / "fails").touch()
    assert session() == {"other"}
    assert session() == set()
    (session.folder / "fails").unlink()  # it fails with the same files with which it has passed
    assert session(CI_FULL="1") == ALL
    assert session() == {"other"}


def test_a_choice_keeps_what_it_has_run_alone(session):
    assert session("-k", "other") == {"other"}
    assert session() == ALL - {"other"}
    assert session(OP="first") == {"first"}


def test_a_draw_runs_a_part_of_what_would_be_skipped(session):
    assert session() == ALL
    ran = [session(SEED=str(seed)) for seed in range(12)]
    assert set().union(*ran) != set()
    assert sum(map(len, ran)) < 0.5 * len(ALL) * len(ran)
