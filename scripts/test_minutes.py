# SPDX-License-Identifier: Apache-2.0
"""Measures how long a developer's commands take in clones of this checkout's last commit, and keeps the rows.

    python scripts/test_minutes.py FOLDER [CASE...]

FOLDER is empty or from an earlier call: it gets the clones, and a cache of its own in place of the user's; ccache is
off. The cases run in the order below, all of them if none is named; every one needs what "bare" left behind.
Leave the machine idle meanwhile. docs/testing.md shows benchmarks/results/test_minutes.json.
"""

import json
import os
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastasr import files
from fastasr.benchmarks import environment
from fastasr.benchmarks.markdown import NONE_YET
from fastasr.benchmarks.rows import array

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "test_minutes.json"
# case -> what the table calls it, the file that changes by a comment, the command, the clone in which it runs
CASES = {
    "bare": ("a bare clone, nothing cached", None, ".ci/run", "first"),
    "demo": ("a bare clone that is installed: `make demo`", None, "make demo", "first"),
    "demo-bare": ("a bare clone, nothing installed: `make demo`", None, "make demo", "third"),
    "fresh": ("a fresh clone where another has passed", None, "make test", "second"),
    "nothing": ("nothing", None, "make test", "second"),
    "op": ("nothing, `OP=rel_attention`", None, "make test OP=rel_attention", "first"),
    "triton": ("a Triton kernel, {}", "kernels/rel_attention.py", "make test", "second"),
    "cpp": ("a C++ kernel, {}", "csrc/cpu/attention/rel_attention.cpp", "make test", "first"),
    "cpp-fresh": (
        "a C++ kernel, {}, in a clone without C++ tests",
        "csrc/cpu/attention/rel_attention.cpp",
        "make test",
        "second",
    ),
    "python": ("a Python file, {}", "fastasr/models/e_branchformer/attention.py", "make test", "second"),
}


def title(case: str) -> str:
    text, file, *_ = CASES[case]
    return text.format(f"`{file}`")


def table() -> str:
    """Returns the table of the newest row of each case, with the conditions of all."""
    if not RESULTS.exists():
        return NONE_YET
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    newest = {row["case"]: row for row in rows}
    lines = ["| after | command | time |", "|---|---|---:|"]
    for case in (case for case in CASES if case in newest):
        minutes, seconds = divmod(newest[case]["seconds"], 60)
        lines.append(f"| {title(case)} | `{CASES[case][2]}` | {minutes} min {seconds:02} s |")
    if "bare" in newest:
        lines += ["", "| tests of the bare clone | number | seconds |", "|---|---:|---:|"]
        for folder, (count, seconds) in sorted(newest["bare"]["tests"].items(), key=lambda item: -item[1][1]):
            lines.append(f"| `{folder}` | {count:,} | {round(seconds):,} |")
    found = {
        key: ", ".join(sorted({row[key] for row in newest.values()})) for key in ("machine", "commit", "date")
    }
    return "\n".join([*lines, "", f"**{found['machine']}**; commit {found['commit']}; {found['date']}."])


def by_folder(ledger: Path) -> dict[str, tuple[int, float]]:
    """Returns folder of tests -> number and seconds of its tests, of all that the ledger has."""
    found = {}
    with sqlite3.connect(ledger) as base:
        for name, seconds in base.execute("SELECT name, seconds FROM passed"):
            folder = "/".join(name.partition("::")[0].split("/")[:2])
            count, total = found.get(folder, (0, 0.0))
            found[folder] = count + 1, round(total + seconds, 1)
    return found


def measure(folder: Path, case: str) -> dict:
    """Runs one case and returns its row. Raises CalledProcessError if the command fails."""
    _, file, command, name = CASES[case]
    clone = folder / name
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    settings = {"XDG_CACHE_HOME": str(folder / "cache"), "CCACHE_DISABLE": "1", "SEED": "1"}
    if file is not None:
        mark = "#" if file.endswith(".py") else "//"
        (clone / file).write_text((clone / file).read_text() + f"{mark} a comment\n")
    begin = time.monotonic()
    with (folder / f"{case}.log").open("w") as log:
        run = ["bash", "-c", command]
        subprocess.run(run, cwd=clone, env=os.environ | settings, stdout=log, stderr=log, check=True)
    seconds = round(time.monotonic() - begin)
    if file is not None:
        subprocess.run(["git", "-C", clone, "checkout", "--quiet", file], check=True)
    machine = f"{environment.cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}"
    commit = subprocess.run(
        ["git", "-C", clone, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
    )
    date = datetime.now(UTC).date().isoformat()
    row = {
        "case": case,
        "seconds": seconds,
        "commit": commit.stdout.strip(),
        "machine": machine,
        "date": date,
    }
    if case == "bare":
        row["tests"] = by_folder(folder / "cache" / "fastasr" / "tests.sqlite")
    return row


def main(arguments: list[str]) -> int:
    if not arguments or any(case not in CASES for case in arguments[1:]):
        print(__doc__, f"cases: {', '.join(CASES)}", sep="\n", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for case in [c for c in CASES if c in arguments[1:] or not arguments[1:]]:
        row = measure(folder, case)
        print(f"{title(case)}: {row['seconds']} s", flush=True)
        rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
        files.write(RESULTS, array([*rows, row]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
