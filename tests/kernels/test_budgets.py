# SPDX-License-Identifier: Apache-2.0
"""Every kernel configuration compiles for sm_80 and, in the long tests, sm_90 and stays within ``budgets.toml``.

Compiling needs Triton but no GPU. It runs in a process of its own, where Triton is not in interpreter mode.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
MOST = ("registers", "spills", "shared", "narrow")  # may not grow
GROWTH = 1.05  # the instruction count may grow by this factor


@pytest.fixture(scope="module", params=[80, pytest.param(90, marks=pytest.mark.long)], ids="sm_{}".format)
def measured(request) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "update_budgets.py"), "--json", str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"architecture": f"sm_{request.param}"}


@pytest.fixture(scope="module")
def budgets(measured) -> dict:
    sections = tomllib.loads((HERE / "budgets.toml").read_text())
    name = f"triton {measured['triton']}"
    if name not in sections:
        pytest.skip(f"budgets.toml has no section for {name}: run python tests/kernels/update_budgets.py")
    return {name: v for name, v in sections[name].items() if name.endswith(measured["architecture"])}


def _over(values: dict, budget: dict) -> list[str]:
    """Returns the measures that break the budget."""
    over = [key for key in MOST if values[key] > budget[key]]
    if values["wide"] < budget["wide"]:
        over.append("wide")
    if values["instructions"] > budget["instructions"] * GROWTH:
        over.append("instructions")
    return over


def _table(rows: list[tuple[str, dict, dict]]) -> str:
    """Returns measured and budgeted values side by side, offenders marked."""
    lines = []
    for name, values, budget in rows:
        over = _over(values, budget)
        cells = [f"{k} {values[k]} (budget {budget[k]}){' <--' if k in over else ''}" for k in budget]
        lines.append(f"{name}: {', '.join(cells)}")
    return "\n".join(lines)


def test_no_configuration_spills(measured):
    spilled = {name: v["spills"] for name, v in measured["measured"].items() if v["spills"]}
    assert not spilled, f"bytes of local memory per thread: {spilled}"


def test_activations_move_in_128_bits(measured):
    """This holds at sizes that allow it (those with one column or tail elements do not). The joiner's scores and
    rel_attention's statistics read by asynchronous copies alone, which are not counted, and write one number per row.
    Rows of a lattice are T + 1 long and start where a boundary says."""
    others = "one column", "C=1,", "parts, 16", "odd sizes", "joiner scores", "statistics", "lattice"
    for name, values in measured["measured"].items():
        if not any(word in name for word in others):
            assert values["wide"] > 0, f"{name}: no 128-bit access"


def test_within_budget(measured, budgets):
    rows = [(name, values, budgets[name]) for name, values in measured["measured"].items() if name in budgets]
    broken = [row for row in rows if _over(row[1], row[2])]
    assert not broken, "\n" + _table(broken) + "\nIf meant: python tests/kernels/update_budgets.py"


def test_budgets_cover_every_configuration(measured, budgets):
    assert set(budgets) == set(measured["measured"]), "run python tests/kernels/update_budgets.py"
