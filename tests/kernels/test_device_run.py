# SPDX-License-Identifier: Apache-2.0
"""The verdict on a GPU, without one: a dry run of the whole program, units that fail in every way, and what it says."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fastasr import ops
from fastasr.benchmarks import upstream
from fastasr.benchmarks.device import machine, timing, verdict
from fastasr.benchmarks.device import units as device_units
from fastasr.benchmarks.device.__main__ import main, run
from fastasr.benchmarks.device.checks import CHECKS, check_op, reported
from fastasr.benchmarks.device.compilation import PARTS, compile_kernels, launches
from fastasr.benchmarks.device.machine import GPU, DryRun, kernels, to_watch
from fastasr.benchmarks.device.units import SANITIZERS, Unit, run_tests, sanitize, units
from fastasr.benchmarks.isolate import PRELOADED, isolated
from fastasr.benchmarks.rows import Row, read
from fastasr.testing import Make
from fastasr.testing.seeds import seeded
from fastasr.testing.table import floating, table

triton = pytest.importorskip("triton")

COMMAND = [sys.executable, "-m", "fastasr.benchmarks.device"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--stages", "AD"), "--stages: expected letters of ABMC, got 'AD'"),
        (("--only", "x"), "--only: no unit is about x"),
        (("--kinds", "x", "check"), "--kinds: no unit is about x"),
    ],
)
def test_wrong_options(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--dry-run", "--out", str(tmp_path), *arguments])
    assert ended.value.code == verdict.UNUSABLE
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path):
    done = subprocess.run([*COMMAND, "--out", tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == verdict.UNUSABLE
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [3, pytest.param(len(kernels()), marks=pytest.mark.long)])
def test_a_dry_run_walks_every_unit_of_the_stages_a_and_b(tmp_path, count):
    chosen = (*Random(seeded("dry run")).sample(sorted(kernels()), count), *timing.MODELS)
    command = [*COMMAND, "--dry-run", "--stages", "AB", "--out", tmp_path, "--only", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    assert done.returncode == verdict.RIGHT, done.stdout + done.stderr
    records = verdict.records(tmp_path / "units.json")
    expected = (u.key for u in units(DryRun()) if u.stage in "AB" and u.op in chosen)
    assert sorted(r["unit"] for r in records) == sorted(expected)
    found = verdict.subjects(records)
    for op in chosen[:count]:
        assert {check: found[op].found[check] for check in CHECKS} == dict.fromkeys(CHECKS, "right"), op
        assert f"| {op} | right, as fast |" in (tmp_path / "verdict.md").read_text()
    timed = {(row.name, row.implementation) for row in read(tmp_path / "device.jsonl")}
    assert timed == {(op, way) for op in chosen[:count] for way in ("fastasr", "eager", "copy")} | {
        (model, way) for model in timing.MODELS for way in ("fastasr", "eager")
    }


# --- units that fail: each costs itself alone


def hangs(tell, machine) -> None:
    reported(tell, "CUDA graph", lambda: time.sleep(600))


def crashes(tell, machine) -> None:
    reported(tell, "three repeats", lambda: ctypes.string_at(0))


def aborts(tell, machine) -> None:
    reported(tell, "small shapes", lambda: "the first check is right")
    reported(tell, "training shape", os.abort)


def is_wrong(tell, machine) -> None:
    right = ops.bypass
    with mock.patch.object(ops, "bypass", lambda **arguments: right(**arguments) * 1.01):
        check_op(tell, machine, "bypass")


def is_right(tell, machine) -> None:
    reported(tell, "small shapes", lambda: None)


def unit(function, limit=60.0, shares="") -> Unit:
    name = function.__name__
    return Unit("A", "check", name, function, (), limit, name, shares)


FAILING = (
    unit(hangs, 2, "device"),
    unit(crashes, shares="device"),
    unit(aborts),
    unit(is_wrong),
    unit(is_right),
)


def test_what_fails_costs_itself_alone(tmp_path):
    assert run(FAILING, DryRun(), tmp_path, 5) == verdict.WRONG
    records = {r["name"]: r for r in verdict.records(tmp_path / "units.json")}
    found = {name: subject.found for name, subject in verdict.subjects(list(records.values())).items()}
    assert found["hangs"] == {"CUDA graph": "hung"}
    assert found["crashes"] == {"three repeats": "crashed"}
    assert found["aborts"] == {"small shapes": "right", "training shape": "crashed"}
    assert found["is_wrong"]["small shapes"] == "wrong"
    assert found["is_right"] == {"small shapes": "right"}
    assert (records["crashes"]["ended"], records["aborts"]["ended"]) == (
        "crashed: SIGSEGV",
        "crashed: SIGABRT",
    )
    assert "in hangs" in records["hangs"]["output"]  # where it hung
    text = (tmp_path / "verdict.md").read_text()
    assert "4 wrong" in text
    for line in (
        "| hangs | **hung: CUDA graph** |",
        "| crashes | **crashed: three repeats** |",
        "| aborts | **crashed: training shape** |",
        "| is_right | right |",
        "killed after 2 s",
        "small shapes: AssertionError",
    ):
        assert line in text, line


def test_after_a_hang_or_a_crash_an_op_costs_no_more(tmp_path):
    """What hung is left alone. What crashed is not timed, but compute-sanitizer may find why."""

    def again(stage: str, kind: str, name: str) -> Unit:
        return Unit(stage, kind, name, is_right, (), 60, name)

    more = [again("B", "time", name) for name in ("hangs", "crashes")]
    more += [again("C", "memcheck", name) for name in ("hangs", "crashes")]
    assert run((*FAILING[:2], *more), DryRun(), tmp_path, 5) == verdict.WRONG
    records = verdict.records(tmp_path / "units.json")
    found = {r["unit"]: r["messages"][-1] for r in records if r["stage"] != "A"}
    assert {unit: m["found"] for unit, m in found.items()} == {
        "B time: hangs": "skipped",
        "B time: crashes": "skipped",
        "C memcheck: hangs": "skipped",
        "C memcheck: crashes": "right",
    }
    assert found["B time: crashes"]["message"] == "crashed: SIGSEGV"


def test_a_hang_takes_what_it_started_with_it():
    outcome = isolated(starts_a_process, (), 2)
    pid = outcome.messages[0]["pid"]
    assert outcome.ended == "hung: killed after 2 s"
    status, end = Path(f"/proc/{pid}/status"), time.monotonic() + 10
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < end, "the process is still there"
        time.sleep(0.1)


def starts_a_process(tell) -> None:
    tell({"pid": subprocess.Popen(["sleep", "600"]).pid})
    time.sleep(600)


# --- --resume and --minutes


def counts(tell, machine, folder: str, name: str) -> None:
    with open(f"{folder}/{name}", "a") as file:
        file.write("x")
    reported(tell, "small shapes", lambda: None)


def lasts(tell, machine) -> None:
    reported(tell, "small shapes", lambda: time.sleep(20))


def test_resume_runs_what_is_left_and_what_another_commit_or_device_left(tmp_path):
    out, marks = tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    two = [Unit("A", "check", name, counts, (str(marks), name), 60, name) for name in ("one", "two")]

    def runs() -> dict[str, int]:
        return {file.name: len(file.read_text()) for file in marks.iterdir()}

    assert run(two[:1], DryRun(), out, 5) == verdict.RIGHT
    assert run(two, DryRun(), out, 5, resume=True) == verdict.RIGHT
    assert runs() == {"one": 1, "two": 1}
    records = verdict.records(out / "units.json")
    for field in ("commit", "device_name"):
        (out / "units.json").write_text(json.dumps([records[0], records[1] | {field: "another"}]))
        assert run(two, DryRun(), out, 5, resume=True) == verdict.RIGHT
    assert runs() == {"one": 1, "two": 3}
    assert run(two, DryRun(), out, 5) == verdict.RIGHT
    assert runs() == {"one": 2, "two": 4}


class OneAtATime(DryRun):
    def jobs(self, cores: int) -> int:
        return 1


def test_when_the_minutes_are_over_the_rest_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("fastasr.benchmarks.device.__main__.LEAST", 1)
    three = (unit(is_right), unit(lasts), Unit("A", "check", "later", is_right, (), 60))
    assert run(three, OneAtATime(), tmp_path, 5 / 60) == verdict.UNFINISHED
    assert [r["name"] for r in verdict.records(tmp_path / "units.json")] == ["is_right"]
    text = (tmp_path / "verdict.md").read_text()
    assert "2 left: run the same command with --resume" in text
    assert "- A check: lasts\n- A check: later" in text


def tells_a_row(tell, machine, seconds: float) -> None:
    told = Row("models", "m", "c", "1", "bfloat16", "cpu", "forward", "upstream", 1.0 + seconds, 1.0, 1.0, 1)
    tell({"check": "timing", "found": "started"})
    tell({"rows": [told.to_dict()]})
    time.sleep(seconds)
    tell({"check": "timing", "found": "right"})


def test_a_unit_that_the_end_cuts_off_leaves_its_rows(tmp_path, monkeypatch):
    """The folder has them at once, so that even a kill leaves them; a resumed run measures them again."""
    monkeypatch.setattr("fastasr.benchmarks.device.__main__.LEAST", 1)
    for seconds, minutes, expected in ((20, 5 / 60, verdict.UNFINISHED), (0, 5, verdict.RIGHT)):
        one = [Unit("M", "whole model", "m", tells_a_row, (seconds,), 60, "m")]
        assert run(one, DryRun(), tmp_path, minutes, resume=True) == expected
        (record,) = verdict.records(tmp_path / "units.json")
        assert (record["ended"], record.get("under_way", False)) == ("", bool(seconds))
        assert [row.median_ms for row in read(tmp_path / "device.jsonl")] == [1.0 + seconds]


def names_its_process(tell, machine, file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def test_a_run_that_is_told_to_end_leaves_no_process(tmp_path, monkeypatch):
    file = tmp_path / "pid"
    unit = Unit("A", "check", "one", names_its_process, (str(file),), 600)
    monkeypatch.setattr("fastasr.benchmarks.device.__main__.units", lambda *_: [unit])

    def end() -> None:
        wait_for(lambda: file.exists() and file.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    try:
        threading.Thread(target=end, daemon=True).start()
        with pytest.raises(SystemExit) as ended:
            main(["--dry-run", "--out", str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == verdict.UNFINISHED
    assert not _runs(int(file.read_text()))


def test_a_run_that_is_killed_leaves_no_process(tmp_path):
    file = tmp_path / "pid"
    call = f"import test_device_run as t; t.isolated(t.names_its_process, (None, {str(file)!r}), 600)"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen([sys.executable, "-c", call], env=ONE_THREAD | {"PYTHONPATH": path})
    wait_for(lambda: file.exists() and file.read_text())
    process.kill()
    process.wait()
    wait_for(lambda: not _runs(int(file.read_text())))


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it took more than a minute"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "(zombie)" not in status.read_text()


def test_a_model_whose_package_is_missing_is_left_out():
    def build() -> None:
        upstream.module("zipformer.modules.absent")

    messages = []
    reported(messages.append, "timing", build)
    assert messages[-1]["found"] == "skipped"
    assert "upstream's package zipformer cannot be imported" in messages[-1]["message"]


# --- what a real device goes through, with torch.cuda in the hands of the test


class Emulated(GPU):
    """The code for a GPU on CPU tensors, beside a torch.cuda that does nothing."""

    device = "cpu"

    def serving(self, op):
        return contextlib.nullcontext()

    def cases(self, op):
        return DryRun().cases(op)


@pytest.fixture
def cuda(monkeypatch):
    """Replaces what the program uses of torch.cuda, all of which this torch must have."""
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 * 10**9)
    returned = {"device_count": 1, "get_device_properties": properties, "get_device_capability": (9, 0)}
    returned |= {"is_available": True, "get_device_name": "NVIDIA H100 80GB HBM3"}
    made = {name: mock.MagicMock(return_value=value) for name, value in returned.items()}
    for name in (
        "Stream",
        "Event",
        "CUDAGraph",
        "graph",
        "stream",
        "current_stream",
        "synchronize",
        "_sleep",
    ):
        made[name] = mock.MagicMock()
    made["Event"].return_value.elapsed_time.return_value = 0.25
    for name, value in made.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(machine, "FLUSHED_BYTES", 1)
    return SimpleNamespace(**made)


def test_the_checks_of_a_gpu(cuda):
    """A graph whose replay writes nothing is wrong, and one device is no second one."""
    messages = []
    check_op(messages.append, Emulated(), "bypass")
    found = {title: how for title, (how, _) in verdict.findings({"messages": messages, "ended": ""}).items()}
    assert found == {"kernels": "right"} | dict.fromkeys(CHECKS, "right") | {
        "CUDA graph": "wrong",
        "second device": "skipped",
    }
    assert cuda.graph.call_count == 1
    assert cuda.Stream.return_value.wait_stream.called


def test_what_is_compiled_ahead_is_what_a_launch_finds(tmp_path, monkeypatch):
    """Triton compiles nothing of an op's small samples after the units that compile its kernels."""
    from triton.backends.compiler import GPUTarget

    from fastasr.kernels._launch import PRECISE

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(GPU, "stand_in", DryRun.stand_in)
    for part in range(PARTS):
        compile_kernels(print, GPU(), "swoosh_r", part)
    kept = set(tmp_path.rglob("*.cubin"))
    names = {launch.name for launch in launches(DryRun(), "swoosh_r")}
    assert names == {file.stem for file in kept}
    target = GPUTarget("cuda", 90, 32)
    for launch in launches(GPU(), "swoosh_r"):
        options = PRECISE | {"num_warps": launch.options["num_warps"]}  # as a launcher gives them
        triton.compile(launch.source, target, options)
    assert set(tmp_path.rglob("*.cubin")) == kept


def test_after_a_cuda_error_an_op_is_left_alone(monkeypatch):
    def breaks(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    messages = []
    monkeypatch.setitem(CHECKS, "training shape", breaks)
    check_op(messages.append, DryRun(), "bypass")
    found = verdict.findings({"messages": messages, "ended": ""})
    assert [title for title in found if title in CHECKS] == ["small shapes", "training shape"]
    assert found["training shape"][0] == "wrong"


def test_the_times_of_a_gpu(cuda, monkeypatch):
    messages = []
    timing.time_op(messages.append, Emulated(), "bypass", 0, torch.bfloat16)
    assert messages[-1] == {"check": "timing", "found": "right"}
    found = {
        row["implementation"]: row for m in messages for row in m.get("rows", ()) if row["pass"] == "forward"
    }
    assert set(found) == {"fastasr", "eager", "copy"}
    assert found["fastasr"]["median_ms"] == 0.25
    assert found["eager"]["host_ms"] > 0
    assert cuda._sleep.call_count >= 3 * timing.ROUNDS * timing.CALLS


def test_the_facts_of_a_gpu(cuda):
    facts = GPU().facts()
    assert facts["device_name"] == "NVIDIA H100 80GB HBM3"
    assert (facts["capability"], facts["multiprocessors"]) == ("9.0", 132)
    assert (GPU().jobs(16), GPU().jobs(2)) == (6, 1)
    cuda.get_device_capability.return_value = 7, 5
    assert "compute capability 8.0" in GPU().why_not()


@pytest.mark.parametrize(("code", "how"), [(0, "right"), (3, "wrong"), (1, "skipped")])
def test_what_compute_sanitizer_says(tmp_path, monkeypatch, code, how):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho $1 says so\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    messages = []
    sanitize(messages.append, Emulated(), "racecheck", "bypass")
    assert messages[-1]["found"] == how
    assert how == "right" or "--tool=racecheck says so" in messages[-1]["message"]


def test_without_compute_sanitizer_or_tests_these_are_left_out(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(device_units.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(device_units, "ROOT", tmp_path)
    sanitize(messages.append, Emulated(), "memcheck", "bypass")
    run_tests(messages.append, Emulated(), "tests/kernels")
    assert [m["message"] for m in messages if m["found"] == "skipped"] == [
        "compute-sanitizer is not installed",
        "the tests are in a clone of the repository, not in the installed package",
    ]


@pytest.mark.parametrize(("body", "how"), [("pass", "right"), ("assert 1 == 2", "wrong")])
def test_what_the_gpu_tests_say(tmp_path, monkeypatch, body, how):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(f"def test_one():\n    {body}\n")
    monkeypatch.setattr(device_units, "ROOT", tmp_path)
    messages = []
    run_tests(messages.append, Emulated(), "tests")
    assert messages[-1]["found"] == how
    assert how == "right" or "assert 1 == 2" in messages[-1]["message"]


# --- what it says


def test_the_server_of_processes_never_asks_cuda():
    """What is forked from a process that has called CUDA cannot use it."""
    program = f"""
import torch
def refuse(*_):
    raise SystemExit("CUDA was asked")
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
for name in {PRELOADED!r}:
    __import__(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def record(op: str, stage="A", kind="check", ended="", **found: str) -> dict:
    messages = [{"check": k.replace("_", " "), "found": v, "message": "why"} for k, v in found.items()]
    about = {"unit": f"{stage} {kind}: {op}", "stage": stage, "kind": kind, "name": op, "op": op}
    about |= {"code": verdict.code_of(op), "commit": "c", "device_name": "d"}
    return about | {"messages": messages, "ended": ended, "output": ""}


def timed(op: str, **milliseconds: float) -> dict:
    common = {
        "suite": "ops",
        "name": op,
        "case": "8x8",
        "shape": "8x8",
        "dtype": "bfloat16",
        "device": "cuda",
        "code": verdict.code_of(op),  # as a row of a run has it
    }
    rows = [
        Row(**common, pass_="forward", implementation=name, median_ms=ms, q1_ms=ms, q3_ms=ms, reps=1).to_dict()
        for name, ms in milliseconds.items()
    ]  # fmt: skip
    made = record(op, "B", "time", timing="right")
    made["messages"].append({"rows": rows})
    return made


def test_exit_codes():
    right, fast, slow = record("bypass", small_shapes="right"), {"eager": 1.0}, {"eager": 1.0, "compile": 0.5}
    wrong = record("bypass", "C", "racecheck", racecheck="wrong")
    assert verdict.exit_code([right, timed("bypass", fastasr=0.5, **fast)], []) == verdict.RIGHT
    assert verdict.exit_code([right, timed("bypass", fastasr=0.7, **slow)], []) == verdict.SLOW
    assert verdict.exit_code([right, timed("bypass", fastasr=0.7, **slow)], ["unit"]) == verdict.UNFINISHED
    assert verdict.exit_code([wrong, timed("bypass", fastasr=0.5, **fast)], ["unit"]) == verdict.WRONG
    crashed = record("bypass", small_shapes="right", training_shape="started", ended="crashed: SIGSEGV")
    assert verdict.findings(crashed)["training shape"] == ("crashed", "crashed: SIGSEGV")
    assert verdict.exit_code([crashed], []) == verdict.WRONG


def test_a_check_of_other_code_than_the_present_is_marked():
    present, old = record("bypass", small_shapes="right"), record("swoosh_l", small_shapes="right")
    old["code"] = "0123456789ab"
    lines = verdict.checks_table(verdict.subjects([present, old])).splitlines()
    assert any(line.startswith("| bypass | right |") for line in lines)
    assert any(line.startswith("| swoosh_l † | right |") for line in lines)
    assert "† |" not in verdict.tables([present]).partition("ema_scan")[0]
    assert "with an earlier version" in verdict.tables([old])
    later = record("swoosh_l", "C", "memcheck", memcheck="right")
    mixed = verdict.checks_table(verdict.subjects([old, later]))
    assert "| swoosh_l | right † | – | – | – | – | – | right |" in mixed


def test_the_report_says_what_is_wrong_slow_and_left_out():
    records = [
        record("bypass", small_shapes="right", CUDA_graph="wrong"),
        record("bypass", "C", "memcheck", memcheck="skipped"),
        record("swoosh_l", small_shapes="right"),
        timed("swoosh_l", fastasr=0.05, eager=0.04, compile=0.06, copy=0.02),
        record("ema_scan", kernels="skipped"),
    ]
    text = verdict.report({"commit": "c"}, records, ["C memcheck: swoosh_l"])
    for line in (
        "1 wrong: bypass; 1 slower than eager or torch.compile: swoosh_l; 1 left",
        "| bypass | **wrong: CUDA graph** |",
        "| swoosh_l | right, slower than eager forward (1.25×, 8x8, bfloat16) |",
        "| ema_scan | left out: why |",
        "| toeplitz_attention | not run |",
        "| swoosh_l | 8x8 | bfloat16 | forward | 50 | – | 40 | 60 | 20 |",
        "- A, check bypass, CUDA graph: why",
        f"- look at: {to_watch('bypass')}",
        "- memcheck bypass, memcheck: why",
        "## Not reached\n\n- C memcheck: swoosh_l",
    ):
        assert line in text, line
    assert "| bypass | right | – | – | wrong |" in verdict.tables(records)


class MakeElsewhere(Make):
    """Makes tensors without numbers on a device that is not the CPU."""

    def normal(self, *shape, **_):
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    uniform = normal

    def values(self, *numbers):
        return self.normal(len(numbers))


@pytest.mark.parametrize("op", kernels())
def test_calls_can_be_made_and_run_on_another_device(op):
    """No tensor of a sample stays on the CPU, and ops take the arguments at sizes of training."""
    own, cases = table(op), GPU().cases(op)
    for call in (*own.samples, *cases):
        try:
            arguments = call.arguments(MakeElsewhere(device="meta"))
        except RuntimeError as error:
            if "item() cannot be called on meta tensors" in str(error):
                continue  # it reads the numbers
            raise
        tensors = {name: v for name, v in arguments.items() if isinstance(v, torch.Tensor)}
        assert {v.device.type for v in tensors.values()} == {"meta"}, call.name
        if call in cases:
            arguments |= {name: t.requires_grad_() for name, t in floating(arguments).items()}
            assert own.call_registered(arguments).requires_grad  # a gradient refuses later


def test_every_op_has_its_units_and_its_note():
    assert all(map(to_watch, kernels()))
    found = list(units(GPU()))
    assert len({one.key for one in found}) == len(found)
    checks = [one.op for one in found if (one.stage, one.kind) == ("A", "check")]
    assert checks == list(kernels())
    assert checks[-1] == "layer_norm_lstm"
    assert not [
        one for one in found if one.op == "layer_norm_lstm" and one.stage == "A" and one.shares == "device"
    ]
    for op in kernels():
        assert {one.kind for one in found if one.op == op} == {
            "compile",
            "check",
            "time",
            "tests",
            *SANITIZERS,
        }
        cases = GPU().cases(op)
        assert all(case.arguments is not None for case in cases)
        assert len({case.name for case in cases}) == len(cases)
