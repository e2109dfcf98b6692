# SPDX-License-Identifier: Apache-2.0
"""Turns the records of a run into verdict.md, the table of docs/gpu-queue.md, and the exit code."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastasr.benchmarks.device import whole_models
from fastasr.benchmarks.device.checks import CHECKS
from fastasr.benchmarks.device.machine import kernels, to_watch
from fastasr.benchmarks.device.timing import MODELS
from fastasr.benchmarks.device.units import SANITIZERS
from fastasr.benchmarks.environment import code
from fastasr.benchmarks.markdown import OLD, OLD_NOTE, grid, mark
from fastasr.benchmarks.table import Unit, units

RIGHT, WRONG, UNUSABLE, SLOW, UNFINISHED = range(5)  # exit codes
SLOWER = 1.05  # An op is called slower from this many times the time of eager or torch.compile on.
COLUMNS = (*CHECKS, *SANITIZERS, "tests")
BAD = ("wrong", "hung", "crashed")


def records(file: Path) -> list[dict]:
    """Returns the records of a file units.json, none where it is absent."""
    return json.loads(file.read_text()) if file.exists() else []


def code_of(op: str) -> str:
    """Returns the hash of the present GPU code of an op or a model, "" where it is not known."""
    return code("models" if op in MODELS else "ops", op, "cuda") if op else ""


def findings(record: dict) -> dict[str, tuple[str, str]]:
    """Returns check -> (right, wrong, skipped, hung or crashed; message) of a unit's record."""
    found = {}
    for message in record["messages"]:
        if "check" in message:
            found[message["check"]] = message["found"], message.get("message", "")
    if record["ended"]:
        # The check that began last was under way.
        under_way = [title for title, (how, _) in found.items() if how == "started"][-1:] or ["process"]
        found[under_way[0]] = record["ended"].partition(":")[0], record["ended"]
    return {title: finding for title, finding in found.items() if finding[0] != "started"}


def pointless(records: Iterable[dict], op: str, kind: str) -> str:
    """Says why not to run another unit of an op: it hung, or it crashed and would be timed. Returns "" otherwise."""
    ended = [r["ended"] for r in records if op and r["op"] == op and r["ended"]]
    return next((why for why in ended if why.startswith("hung") or kind == "time"), "")


def rivals(unit: Unit) -> dict[str, float]:
    """Returns eager and torch.compile -> how many times fastasr's time theirs is."""
    ratios = {name: unit.ratio(name) for name in ("eager", "compile")}
    return {name.replace("compile", "torch.compile"): r for name, r in ratios.items() if r}


@dataclass
class Subject:
    """The results of an op or a model: ``found`` by column, and its timings."""

    found: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # one for each failure
    reason: str = ""  # why it was left out
    old: set[str] = field(default_factory=set)  # checks that ran on other code than the present
    timed: list[Unit] = field(default_factory=list)

    @property
    def bad(self) -> list[str]:
        return [column for column, how in self.found.items() if how in BAD]

    @property
    def slow(self) -> list[str]:
        return [
            f"slower than {name} {unit.first.pass_} ({1 / ratio:.2f}×, {unit.first.case}, {unit.first.dtype})"
            for unit in self.timed
            for name, ratio in rivals(unit).items()
            if ratio * SLOWER < 1
        ]

    @property
    def words(self) -> str:
        """Returns the verdict."""
        if self.bad:
            return "**" + "; ".join(f"{self.found[column]}: {column}" for column in self.bad) + "**"
        if self.reason:
            return f"left out: {self.reason}"
        if not self.found:
            return "not run"
        right = any(self.found.get(column) == "right" for column in COLUMNS)
        return ", ".join(["right"] * right + [self.speed] * bool(self.timed)) or "left out"

    @property
    def speed(self) -> str:
        least = min((ratio for unit in self.timed for ratio in rivals(unit).values()), default=1.0)
        return "; ".join(self.slow) or (f"faster ({least:.2f}× at least)" if least > SLOWER else "as fast")


def _line(message: str) -> str:
    """Returns the message as it may stand in a list or a table of Markdown."""
    return " ".join(message.split()).replace("|", "\\|")


def subjects(records: Sequence[dict]) -> dict[str, Subject]:
    """Returns the results of every op, model and folder of tests."""
    made = {name: Subject() for name in (*kernels(), *MODELS)}
    for record in records:
        subject = made.setdefault(record["op"] or f"{record['kind']}: {record['name']}", Subject())
        old = record.get("code", "") != code_of(record["op"])
        for title, (how, message) in findings(record).items():
            if title == "kernels" and how == "right":
                continue
            if title == "kernels" and how == "skipped":
                subject.reason = _line(message)
            kept = subject.found.get(title)
            subject.found[title] = kept if kept in BAD else how
            if old:
                subject.old.add(title)
            if how in BAD:
                where = f"{record['stage']}, {record['kind']} {record['name']}, {title}"
                subject.messages.append(f"{where}: {_line(message)}")
        subject.timed += units(whole_models.rows_of([record]))
    return made


def _table(*given) -> str:
    return "\n".join(grid(*given))


def checks_table(found: dict[str, Subject]) -> str:
    """Returns the table of correctness: a line per op, a column per check. The mark of other code stands at the op if
    all its checks have it, and at each such check if not.
    """
    named = {name: s for name, s in found.items() if name not in MODELS and (name in kernels() or s.found)}
    lines = []
    for name, s in named.items():
        every = bool(s.old) and s.old >= s.found.keys()
        cells = (s.found.get(column, "–") + OLD * (column in s.old and not every) for column in COLUMNS)
        lines.append((name + OLD * every, *cells))
    return _table(("op", *COLUMNS), lines)


def _us(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "–"
    return f"{milliseconds * 1e3:.3g}" if milliseconds < 1 else f"{milliseconds * 1e3:.0f}"


def times_table(found: dict[str, Subject]) -> str:
    """Returns the table of microseconds: on the device, on the host, and of the others."""
    lines = []
    for name, subject in found.items():
        for unit in subject.timed:
            first, ours = unit.first, unit.row("fastasr")
            if ours is None:
                continue
            others = (unit.median(other) for other in ("eager", "compile", "copy"))
            times = (ours.median_ms, ours.host_ms, *others)
            lines.append((name + mark(first), first.case, first.dtype, first.pass_, *map(_us, times)))
    head = ("", "case", "dtype", "pass", "**fastasr**", "host", "eager", "`torch.compile`", "copy")
    return _table(head, lines, 5) if lines else "No times yet."


def sentence(records: Sequence[dict]) -> str:
    """Returns the README's sentence on the checks of ops on a device."""
    if not records:
        return "No GPU has run the GPU kernels yet."
    found = subjects(records)
    checked = {op: found[op].bad for op in kernels() if found[op].found}
    wrong = [f"`{op}` ({', '.join(bad)})" for op, bad in checked.items() if bad]
    passed, waiting = len(checked) - len(wrong), len(kernels()) - len(checked)
    right = f"{passed} ops with GPU kernels passed every check that ran"
    right += f", and {waiting} have not run yet" if waiting else ""
    where = f"On one {records[0]['device_name']}, {right}{'; wrong: ' * bool(wrong)}{', '.join(wrong)}"
    return f"{where} ([what was found](docs/gpu-queue.md#what-has-been-seen-on-hardware))."


def tables(records: Sequence[dict]) -> str:
    """Returns the part of docs/gpu-queue.md on the records of one device."""
    found = subjects(records)
    where = "No GPU has run any of this yet."
    if records:
        commits = dict.fromkeys(record["commit"] for record in records)
        where = f"Records of {records[0]['device_name']}, {'commits' if len(commits) > 1 else 'commit'} "
        where += f"{', '.join(commits)}."
        timed = [unit.first for subject in found.values() for unit in subject.timed]
        where += OLD_NOTE if any(subject.old for subject in found.values()) or mark(*timed) else ""
    watch = _table(("op", "what to look at"), ((f"`{op}`", to_watch(op) or "–") for op in kernels()))
    parts = where, checks_table(found), times_table(found), watch
    return "\n\n".join(part for part in parts if part)


def exit_code(records: Sequence[dict], left: Sequence[str]) -> int:
    """Returns the exit code of the first that holds: something is wrong, units are left, something is slower, all is
    well."""
    found = subjects(records).values()
    if any(subject.bad for subject in found):
        return WRONG
    if left:
        return UNFINISHED
    return SLOW if any(subject.slow for subject in found) else RIGHT


def report(facts: dict, records: Sequence[dict], left: Sequence[str]) -> str:
    """Returns verdict.md."""
    found = subjects(records)
    bad = {name: subject for name, subject in found.items() if subject.bad}
    slow = {name: subject for name, subject in found.items() if subject.slow}
    words = [f"{len(bad)} wrong: {', '.join(bad)}" if bad else "nothing is wrong"]
    words += [f"{len(slow)} slower than eager or torch.compile: {', '.join(slow)}"] if slow else []
    words += [f"{len(left)} left: run the same command with --resume"] if left else []
    parts = [
        "# Verdict",
        f"**{'; '.join(words)}.** Exit code {exit_code(records, left)}.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "## Per op",
        _table(("", "verdict"), ((name, subject.words) for name, subject in found.items())),
        "## Right or wrong",
        checks_table(found),
        "## Times in microseconds",
        "Device time of fastasr, the time until a call returns on the host, device time of the others. "
        "A training step's time includes the gaps between its kernels.",
        times_table(found),
    ]
    profiles = [line for r in records for line in whole_models.profiles(r)]
    parts += ["\n".join(profiles).strip()] if profiles else []
    left_out = [f"- {m}" for r in records for m in notes(r)]
    parts += ["## Left out", "\n".join(left_out)] if left_out else []
    parts += ["## Not reached", "\n".join(f"- {key}" for key in left)] if left else []
    parts += ["## What to report"]
    if not bad and not slow:
        parts += ["If this is a device that docs/gpu-queue.md does not list, send this file and units.json."]
    else:
        parts += ["Open an issue with this file and units.json, which holds what each unit printed."]
    for name, subject in (bad | slow).items():
        watch = f"- look at: {to_watch(name)}" if name in kernels() and to_watch(name) else ""
        lines = (*(f"- {m}" for m in subject.messages), *(f"- {s}" for s in subject.slow), watch)
        parts += [f"### {name}", "\n".join(line for line in lines if line)]
    for record in records:
        if record["output"]:
            parts += [
                f"### Output of {record['stage']} {record['kind']}: {record['name']}",
                f"```\n{record['output']}\n```",
            ]
    return "\n\n".join(parts) + "\n"


def notes(record: dict) -> Iterable[str]:
    """Yields the parts left out of a unit, and why; of a training step, the time of its kernels, how far the norm of
    its gradients is from that in float32, and how far a recorded one is from the unrecorded one.
    """
    name = f"{record['kind']} {record['name']}"
    for message in record["messages"]:
        if message.get("found") == "skipped":
            yield f"{name}, {message['check']}: {_line(message['message'])}"
        if "left_out" in message:
            yield f"{name}, {message['pass']}: {message['left_out']}: {_line(message['message'])}"
        if message.get("busy_ms"):
            yield f"{name}: the kernels of {message['of']} take {message['busy_ms']:.1f} ms of a step"
        if message.get("recorded_off") is not None:
            off, equal = message["recorded_off"], f"{message['equal_tensors']} of {message['tensors']}"
            yield f"{name}: recorded, it is {off:.2%} off the norm; {equal} tensors are equal to the bit"
        if "norm_off" in message:
            off, of_eager = message["norm_off"], message["norm_of_eager_off"]
            yield f"{name}: the norm of its gradients is {off:.2%} off that in float32, eager's {of_eager:.2%}"
