# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks.device`` or ``fastasr gpu``: checks and times every kernel on this machine's GPU.

    A  is it right: values and gradients, repeats, CUDA graphs, streams, devices      about 4 minutes
    B  is it fast: bfloat16, beside eager, torch.compile, a copy and the prediction   about 10 minutes
    M  whole models by the wall clock, as users run them, and the kernels of a step by time
    C  float32 and other sizes, compute-sanitizer over all kernels, the GPU tests     as long as they take

Each unit runs in a process of its own with a time limit, so a hang or a crash costs that unit alone. After each unit
the folder has a new verdict.md, units.json (a record per unit) and device.jsonl (benchmark rows). Exit codes:

    0  everything is right, and nothing is slower than eager or torch.compile
    1  something is wrong
    2  there is no usable GPU, or the options are wrong
    3  everything is right, and something is slower
    4  nothing is wrong so far, and time ran out: --resume goes on
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from fastasr import files
from fastasr.benchmarks import rows
from fastasr.benchmarks.device import verdict, whole_models
from fastasr.benchmarks.device.machine import GPU, DryRun
from fastasr.benchmarks.device.units import Unit, units
from fastasr.benchmarks.isolate import Outcome, isolated, kill_all

LEAST = 10  # A unit begins only if this many seconds are left.


class Book:
    """The records of a run in its folder. A resumed run keeps records of the same commit and device."""

    def __init__(self, out: Path, machine: GPU, resume: bool):
        self.out, self.facts = out, machine.facts()
        self.same = {name: self.facts[name] for name in ("commit", "device_name")}
        found = verdict.records(out / "units.json") if resume else []
        self.records = [record for record in found if record.items() >= self.same.items()]
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    def left(self, wanted: Iterable[Unit]) -> list[Unit]:
        done = {record["unit"] for record in self.records if not record.get("under_way")}
        return [unit for unit in wanted if unit.key not in done]

    def add(self, unit: Unit, outcome: Outcome, wanted: Sequence[Unit], under_way: bool = False) -> dict:
        """Writes a unit's record, and the verdict anew. The record of a unit under way is replaced by its next one."""
        about = {"stage": unit.stage, "kind": unit.kind, "name": unit.name, "op": unit.op, "unit": unit.key}
        about["code"] = verdict.code_of(unit.op)
        came = {name: getattr(outcome, name) for name in ("seconds", "ended", "messages", "output")}
        record = self.same | about | came | ({"under_way": True} if under_way else {})
        with self._lock:
            self.records = [r for r in self.records if not (r.get("under_way") and r["unit"] == unit.key)]
            self.records.append(record)
            if measured := whole_models.rows_of([record]):
                rows.merge(self.out / "device.jsonl", measured)
            self.write(wanted)
        return record

    def write(self, wanted: Sequence[Unit]) -> None:
        left = [unit.key for unit in self.left(wanted)]
        files.write(self.out / "units.json", rows.array(self.records))
        files.write(self.out / "verdict.md", verdict.report(self.facts, self.records, left))


def run(wanted: Sequence[Unit], machine: GPU, out: Path, minutes: float, resume: bool = False) -> int:
    """Runs the units that the folder does not hold yet, for at most ``minutes``. Returns the exit code."""
    end = time.monotonic() + 60 * minutes
    book = Book(out, machine, resume)

    def one(unit: Unit) -> None:
        limit = min(unit.limit, end - time.monotonic())
        if limit < min(LEAST, unit.limit):
            return
        so_far = Outcome()

        def heard(message: dict) -> None:
            so_far.messages.append(message)
            if "rows" in message:
                book.add(unit, so_far, wanted, under_way=True)

        pointless = verdict.pointless(book.records, unit.op, unit.kind)
        if pointless:
            outcome = Outcome([{"check": unit.kind, "found": "skipped", "message": pointless}])
        else:
            outcome = isolated(unit.function, (machine, *unit.arguments), limit, heard)
        if outcome.out_of_time and limit < unit.limit:
            return  # The run's time was up, not the unit's: a resumed run begins the unit again.
        found = verdict.findings(book.add(unit, outcome, wanted))
        bad = [f"{how} ({title})" for title, (how, _) in found.items() if how in verdict.BAD]
        print(f"{unit.key}: {', '.join(bad) or 'done'}, {outcome.seconds:.0f} s", flush=True)

    for (_, _, shares), group in groupby(
        book.left(wanted), key=lambda unit: (unit.stage, unit.kind, unit.shares)
    ):
        cores = os.cpu_count() or 1
        jobs = machine.jobs(cores) if shares == "device" or machine.dry else cores if shares else 1
        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(one, group))
            except (KeyboardInterrupt, SystemExit):  # before the pool waits for its threads
                end = 0.0
                kill_all()
                raise
    book.write(wanted)
    left = [unit.key for unit in book.left(wanted)]
    code = verdict.exit_code(book.records, left)
    print(f"{len(book.records)} units, {len(left)} left, exit code {code}: {out / 'verdict.md'}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastasr gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder (default: gpu-report)")
    parser.add_argument("--minutes", type=float, default=120.0, help="end after so many (default: 120)")
    parser.add_argument(
        "--resume", action="store_true", help="keep what the folder has of this commit and device"
    )
    parser.add_argument("--stages", default="ABMC", help="A, B, M, C or several of them (default: ABMC)")
    parser.add_argument("--only", nargs="+", metavar="OP", help="the units of these ops and models alone")
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", help="units of these kinds alone, such as memcheck"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=whole_models.SHOWN,
        help="run whole models in these ways alone (default: all)",
    )
    parser.add_argument(
        "--compile-model", action="store_true", help="sweep models under torch.compile over the batch too"
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: a fake one takes the launches")
    options = parser.parse_args(arguments)
    if not options.stages or set(options.stages) - set("ABMC"):
        parser.error(f"--stages: expected letters of ABMC, got {options.stages!r}")
    machine = DryRun() if options.dry_run else GPU()
    if reason := machine.why_not():
        print(f"fastasr gpu: {reason}", file=sys.stderr)
        return verdict.UNUSABLE
    every = units(machine, options.compile_model, tuple(options.ways or ()))
    wanted = [unit for unit in every if unit.stage in options.stages]
    for option, field in (("only", "op"), ("kinds", "kind")):
        names = getattr(options, option)
        if names:
            if unknown := set(names) - {getattr(unit, field) for unit in wanted}:
                parser.error(f"--{option}: no unit is about {', '.join(sorted(unknown))}")
            wanted = [unit for unit in wanted if getattr(unit, field) in names]
    # As after Ctrl-C, no unit's process stays on the device.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(verdict.UNFINISHED))
    return run(wanted, machine, options.out, options.minutes, options.resume)


if __name__ == "__main__":
    sys.exit(main())
