# SPDX-License-Identifier: Apache-2.0
"""The table of instruction sets whose C++ tests have passed."""

import json

import instruction_sets

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
    assert instruction_sets.table().splitlines()[2:] == ["| `portable` | a CPU | 2 | 1 | 1 | 0 |"]
