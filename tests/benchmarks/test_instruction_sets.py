# SPDX-License-Identifier: Apache-2.0
"""The table of instruction sets whose C++ tests have passed, and the study of many processes."""

import json
from argparse import Namespace

import instruction_sets
import pytest

from fastasr.benchmarks.studies import crowd

pytestmark = pytest.mark.needs("scripts", "benchmarks")
REPORT = """<testsuite>
<testcase name="portable.rows" status="run"/><testcase name="portable.gemm" status="fail"/>
<testcase name="avx2.rows" status="notrun"/><testcase name="avx2.gemm" status="run"/>
</testsuite>"""


def test_rows_of_a_report(tmp_path, monkeypatch):
    (tmp_path / "tests.xml").write_text(REPORT)
    found = instruction_sets.rows(tmp_path / "tests.xml")
    assert found == [
        {"set": "portable", "passed": 1, "failed": 1, "not_run": 0},
        {"set": "avx2", "passed": 1, "failed": 0, "not_run": 1},
    ]
    old, new = ({**found[0], "device_name": "a CPU", "commit": commit} for commit in ("1", "2"))
    (tmp_path / "rows.json").write_text(json.dumps([old, new]))
    monkeypatch.setattr(instruction_sets, "RESULTS", tmp_path / "rows.json")
    assert instruction_sets.table().splitlines()[2:] == ["| `portable` | 1 | 1 | 0 | a CPU | 2 |"]


def test_a_crowd(tmp_path, monkeypatch):
    """Two processes of one thread take turns, alone and together."""
    pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    monkeypatch.setattr(crowd, "RESULTS", tmp_path / "crowd.json")
    options = Namespace(processes=2, threads=1, seconds=0.2, rounds=1, size="tiny", frames=100)
    found = crowd.throughputs(options)
    assert set(found) == {(model, n) for model in crowd.MODELS for n in (1, 2)}
    assert min(found.values()) > 0
    row = {"processes": 8, "threads": 2, "size": "tiny", "frames": 100, "device_name": "a CPU"}
    row |= {"torch": "2.13", "commit": "c", "date": "2026-11-22T10:00:00Z"}
    rows = [
        row | {"model": "upstream", "alone": 10, "crowd": 8},
        row | {"model": "fastasr", "alone": 40, "crowd": 30},
    ]
    (tmp_path / "crowd.json").write_text(json.dumps(rows))
    assert "| fastasr | 40.00 | 30.00 | 75% |" in crowd.table()
    assert "make 3.75 times the calls of upstream's; the share that they keep is 0.94 of" in crowd.table()
