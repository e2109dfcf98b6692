# SPDX-License-Identifier: Apache-2.0
"""Runs the C++ tests of a build folder on every instruction set and keeps a row per set. Without a folder it prints the
sets of the installed library that this machine runs, but for the widest, which serves where FASTASR_SIMD names none.

    scripts/cpp_tests.sh build/cpp-release ""
    python scripts/instruction_sets.py build/cpp-release
    python scripts/instruction_sets.py build/cpp-aarch64 "qemu-user"      # where an emulator runs them

ctest names a test SET.FILE. A file that the processor cannot run counts as not run. docs/testing.md shows
benchmarks/results/instruction_sets.json.
"""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import Counter, defaultdict
from pathlib import Path

from fastasr import files
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.markdown import grid
from fastasr.benchmarks.rows import array

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "instruction_sets.json"


def narrower() -> list[str]:
    """Returns the sets of the installed library that this machine runs, but for the widest, in ascending order."""
    environment = os.environ | {"FASTASR_SIMD": "?"}
    done = subprocess.run(
        [sys.executable, "-c", "import fastasr.ops"], env=environment, capture_output=True, text=True
    )
    if done.returncode == 0:  # Without the native library there are no sets.
        return []
    found = re.search(r"FASTASR_SIMD: expected (.+) \(", done.stderr)
    if not found:
        raise SystemExit(done.stderr)
    return found[1].split(" or ")[:-1]


def rows(report: Path) -> list[dict]:
    """Returns {set, passed, failed, not run} of each set in a report of ctest."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for case in xml.parse(report).iter("testcase"):
        state = {"run": "passed", "fail": "failed"}.get(case.get("status"), "not_run")
        counts[case.get("name").partition(".")[0]][state] += 1
    return [
        {"set": name, **{state: found[state] for state in ("passed", "failed", "not_run")}}
        for name, found in counts.items()
    ]


def table() -> str:
    """Returns the newest row of each set and machine as Markdown."""
    if not RESULTS.exists():
        return "No rows yet: `scripts/instruction_sets.py` writes them."
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    newest = {(row["set"], row["device_name"]): row for row in found}
    columns = "device_name", "commit", "passed", "failed", "not_run"
    lines = ([f"`{row['set']}`", *(row[name] for name in columns)] for row in newest.values())
    heads = "set", "on", "commit", "files of C++ tests passed", "failed", "not run"
    return "\n".join(grid(heads, lines, 3))


def main(folder: str = "", processor: str = "") -> int:
    if not folder:
        print(*narrower())
        return 0
    report = Path(folder).resolve() / "tests.xml"
    done = subprocess.run(["ctest", "--test-dir", folder, "--output-junit", report, "-Q"], check=False)
    where = {key: value for key, value in stamp().items() if key in ("commit", "device_name", "date")}
    where["device_name"] = processor or where["device_name"]
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    files.write(RESULTS, array([*before, *({**row, **where} for row in rows(report))]))
    print(table())
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
