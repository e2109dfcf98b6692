# SPDX-License-Identifier: Apache-2.0
"""Kernel configurations compile and stay within ``budgets.toml``: those that changed since they were measured, a random
twentieth of the others, and in the long tests all. SEED repeats the choice. Without a section for this Triton, they are
compared with that of the nearest version, in what holds for each version: spills and the device's shared memory.

Compiling needs Triton but no GPU. It runs in a process of its own, where Triton is not in interpreter mode.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.kernels.configurations import CHOSEN_FOR, SHARED

pytest.importorskip("triton")
pytestmark = pytest.mark.needs("kernels", "fastasr", "tests/kernels")

HERE = Path(__file__).parent
SECTIONS = tomllib.loads((HERE / "budgets.toml").read_text())
MOST = ("registers", "spills", "shared", "narrow")  # may not grow
GROWTH = 1.05  # the instruction count may grow by this factor
UPDATE = "run python tests/kernels/update_budgets.py"


@pytest.fixture(scope="module", params=["changed", pytest.param("all", marks=pytest.mark.long)])
def compiled(request) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    seed = os.environ.get("SEED") or str(random.SystemRandom().randrange(10**6))
    which = ["--all"] if request.param == "all" else ["--seed", seed]
    command = [sys.executable, str(HERE / "update_budgets.py"), "--json", *which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"seed": seed}


def _nearest(names: Iterable[str], name: str) -> str:
    """Returns the name of the section whose version is nearest to that of ``name``."""

    def version(name: str) -> int:
        major, minor = map(int, re.findall(r"\d+", name))
        return 100 * major + minor

    return min(names, key=lambda other: abs(version(other) - version(name)))


@pytest.fixture(scope="module")
def section(compiled) -> str:
    """Returns the name of this Triton's section of budgets.toml, or of the nearest version's."""
    return _nearest(SECTIONS, f"triton {compiled['triton']}")


@pytest.fixture(scope="module")
def budgets(section) -> dict:
    return SECTIONS[section]


def _over(values: dict, budget: dict) -> list[str]:
    """Returns the measures that break the budget."""
    over = [key for key in MOST if key in budget and values[key] > budget[key]]
    if values.get("repeated", 1) > budget.get("repeated", 1):
        over.append("repeated")
    if values["wide"] < budget.get("wide", 0):
        over.append("wide")
    if values["instructions"] > budget.get("instructions", math.inf) * GROWTH:
        over.append("instructions")
    return over


def _table(rows: list[tuple[str, dict, dict]]) -> str:
    """Returns measured and budgeted values side by side, offenders marked."""
    lines = []
    for name, values, budget in rows:
        over = _over(values, budget)
        keys = [key for key in values if key != "hash"]
        cells = [f"{k} {values[k]} (budget {budget.get(k, 1)}){' <--' if k in over else ''}" for k in keys]
        lines.append(f"{name}: {', '.join(cells)}")
    return "\n".join(lines)


def test_within_budget(compiled, section, budgets):
    if section != f"triton {compiled['triton']}":  # another version has other registers and instructions
        budgets = {
            name: {
                "spills": row["spills"],
                "shared": SHARED[int(name.rpartition("_")[2])],
                "repeated": math.inf,
            }
            for name, row in budgets.items()
        }
    rows = [(name, values, budgets[name]) for name, values in compiled["measured"].items() if name in budgets]
    assert rows
    broken = [row for row in rows if _over(row[1], row[2])]
    assert not broken, f"\n{_table(broken)}\nSEED={compiled['seed']}. If meant: {UPDATE}"


def test_budgets_cover_every_configuration(compiled, budgets):
    assert set(budgets) == set(compiled["hashes"]), UPDATE


@pytest.mark.parametrize("architecture", CHOSEN_FOR)
def test_budgets_have_no_spills(architecture, budgets):
    rows = {name: row for name, row in budgets.items() if name.endswith(f"sm_{architecture}")}
    spilled = {name: row["spills"] for name, row in rows.items() if row["spills"]}
    assert not spilled, f"bytes of local memory per thread: {spilled}"


@pytest.mark.parametrize("architecture", SHARED)
def test_budgets_fit_shared_memory(architecture, budgets):
    """Capabilities 8.6 and 8.9 run the tiles and need the memory of 8.0, but have less of it."""
    compiled_for = 80 if architecture in (86, 89) else architecture
    rows = {name: row for name, row in budgets.items() if name.endswith(f"sm_{compiled_for}")}
    wide = {name: row["shared"] for name, row in rows.items() if row["shared"] > SHARED[architecture]}
    assert not wide, f"bytes of shared memory: {wide}"


def test_budgets_repeat_no_work(budgets):
    """Warps compute a product or its exponentials twice in these kernels alone; better tiles are not known yet."""
    known = (
        "layer_norm_lstm",  # products of 16 x 16, which one warp of four covers
        "rel_attention statistics, padding, mask",
        "segment_attention queries, memory, dropout",
        *(f"toeplitz_attention {name}" for name in ("forward", "queries", "keys", "values")),
        "zipformer_attention keys",  # the sums over 32 columns alone
        "zipformer_attention_weights queries, penalty",
    )
    found = {name: row["repeated"] for name, row in budgets.items() if "repeated" in row}
    assert {name: work for name, work in found.items() if not name.startswith(known)} == {}


def test_budgets_have_128_bit_accesses(budgets):
    """This holds at sizes that allow it (those with one column or tail elements do not). The joiner's scores and
    rel_attention's statistics read by asynchronous copies alone, which are not counted, and write few numbers per row.
    Rows of a lattice are T + 1 long and start where a boundary says; the joiner's parts are as long as a chunk."""
    others = (
        "one column",
        "C=1,",
        "parts, 16",
        "odd sizes",
        "joiner scores",
        "joiner normalise",
        "statistics",
        "lattice",
    )
    for name, row in budgets.items():
        if not any(word in name for word in others):
            assert row["wide"] > 0, f"{name}: no 128-bit access"
