# SPDX-License-Identifier: Apache-2.0
"""Whole models on a GPU, dry: the units of stage M with calls recorded on tapes, ``fastasr bench``, and the tables."""

from pathlib import Path

import pytest
import torch

from fastasr.benchmarks import runner
from fastasr.benchmarks.device import units as device_units
from fastasr.benchmarks.device import verdict, whole_models
from fastasr.benchmarks.device.machine import DryRun
from fastasr.benchmarks.device.whole_models import Workload
from fastasr.benchmarks.isolate import Outcome
from fastasr.benchmarks.rows import read
from fastasr.graphs.recording import Recorder, Unrecordable
from fastasr.testing.tape import TapeRecorder

pytest.importorskip("triton")
pytest.importorskip("transformers.models.parakeet")

NAME = "fast_conformer_110m"
RAGGED = Workload(True, 48, None)
COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "whole_models.json"


def told(unit, *arguments, machine=None):
    """Returns the messages of a unit, and the result of its check."""
    messages = []
    unit(messages.append, machine or DryRun(), NAME, *arguments)
    return messages, messages[-1]["found"]


def ways(messages):
    """Returns the implementations of the rows that were told, by case."""
    found = {}
    for row in whole_models.rows_of([{"messages": messages}]):
        found.setdefault(row.case, []).append(row.implementation)
    return found


@pytest.mark.parametrize("workload", [Workload(False, 48, None), RAGGED, Workload(True, 20, 30)])
def test_a_model_is_timed_in_every_way(workload):
    messages, how = told(whole_models.time_whole, workload)
    assert how == "right", messages[-1]
    last = ["row"] if workload.seconds is None else []
    assert ways(messages) == {workload.case: ["upstream", "fastasr", "recorded", *last]}
    kinds = [kind for m in messages for kinds in m.get("graphs", {}).values() for kind in kinds]
    assert [kind["recorded"] for kind in kinds if kind["replayed"]] == [1] * (1 + len(last))
    off = next(m for m in messages if "recorded_off" in m)
    assert off["recorded_off"] == 0.0  # to the bit


def test_a_sweep_goes_over_the_batch():
    messages, how = told(whole_models.sweep, None)
    assert how == "right", messages[-1]
    every = ["upstream", "fastasr", "recorded", "row"]
    assert ways(messages) == {f"sweep, training, {n} LibriSpeech-like": every for n in (1, 2)}
    text = whole_models.details([*verdict.records(COMMITTED), {"messages": messages}])
    assert "| speech per second and memory | upstream | fastasr | **fastasr, recorded** |" in text
    assert "| FastConformer 110M, training, 2 LibriSpeech-like |" in text


class Full(TapeRecorder):
    """A GPU whose memory does not suffice for a recording."""

    def record(self, function, recording):
        raise torch.OutOfMemoryError("CUDA out of memory")


class Refusing(Full):
    def record(self, function, recording):
        raise Unrecordable("the moon is full")


@pytest.mark.parametrize("recorder", [Full, Refusing])
def test_what_is_not_replayed_is_no_row(recorder: type[Recorder]):
    """A call that memory does not suffice to record runs unrecorded, and its time is not that of a recorded one."""
    machine = DryRun()
    machine.recorder = recorder
    for unit, arguments in (
        (whole_models.time_whole, (RAGGED,)),
        (whole_models.sweep, (30,)),
        (whole_models.profile, (Workload(True, 20, 30),)),
    ):
        messages, how = told(unit, *arguments, machine=machine)
        assert how == "right", messages[-1]
        assert all(found == ["upstream", "fastasr"] for found in ways(messages).values())
        left = [m for m in messages if "left_out" in m]
        assert {m["left_out"] for m in left} == (
            {"recorded", "row"} if arguments[0] == RAGGED else {"recorded"}
        )
        for m in left:
            assert ("out of memory" if recorder is Full else "the moon is full") in m["message"]


def test_a_way_that_fails_costs_itself_alone(monkeypatch):
    own, workload = whole_models._made, Workload(False, 1, 10)

    def breaks(*_):
        raise RuntimeError("the driver is gone")

    def made(machine, shipped, key, *more):
        model, call, why_not = own(machine, shipped, key, *more)
        return model, breaks if key == "recorded" else call, why_not

    with monkeypatch.context() as patch:
        patch.setattr(whole_models, "_made", made)
        messages, how = told(whole_models.time_whole, workload)
        assert how == "wrong"
        assert messages[-1]["message"] == "AssertionError: recorded: RuntimeError: the driver is gone"
        assert ways(messages) == {workload.case: ["upstream", "fastasr"]}
        messages, how = told(whole_models.profile, workload)
        assert how == "wrong"
        assert list(next(m["kernels"] for m in messages if "kernels" in m)) == ["upstream", "fastasr"]
    monkeypatch.setattr(whole_models, "OFF", -1.0)
    messages, how = told(whole_models.time_whole, workload)
    assert (how, messages[-1]["message"]) == (
        "wrong",
        "AssertionError: recorded steps are off by 0.00% of the norm",
    )
    assert ways(messages) == {workload.case: ["upstream", "fastasr", "recorded"]}


def test_rows_are_told_before_the_next_way_begins(monkeypatch):
    messages, found = [], []
    own = whole_models._made

    def made(machine, shipped, key, *more):
        found.append((key, [row.implementation for row in whole_models.rows_of([{"messages": messages}])]))
        return own(machine, shipped, key, *more)

    monkeypatch.setattr(whole_models, "_made", made)
    whole_models.time_whole(messages.append, DryRun(), NAME, Workload(False, 1, 10))
    assert found == [("upstream", []), ("fastasr", ["upstream"]), ("recorded", ["upstream", "fastasr"])]


def test_an_encoder_that_is_not_recorded_is_left_out_with_the_reason():
    machine = DryRun()
    machine.recorder = None  # CUDA graphs
    messages, how = told(whole_models.time_whole, Workload(False, 1, 10), machine=machine)
    assert how == "right", messages[-1]
    left = [(m["left_out"], m["message"]) for m in messages if "left_out" in m]
    assert left == [("recorded", "there is no CUDA device")]


def test_models_run_in_the_chosen_ways():
    chosen = ("recorded", "row")
    units = [u for u in device_units.units(DryRun(), True, chosen) if u.op == NAME and u.stage == "M"]
    for kind in ("whole model", "profile", "sweep"):
        unit = next(u for u in units if u.kind == kind and "LibriSpeech" not in u.name)
        messages, how = told(unit.function, *unit.arguments[1:])
        assert how == "right", messages[-1]
        told_of = ways(messages) or {kind: list(messages[-2]["kernels"])}
        assert all(found == ["recorded"] for found in told_of.values())


def test_the_kernels_of_all_ways_are_one_table(monkeypatch):
    found = iter([[("theirs", 3, 5.0)], [("ours<1>", 2, 2.5), ("ours|2", 1, 0.5)], [("ours<1>", 1, 2.0)]])
    monkeypatch.setattr(DryRun, "kernels_by_time", lambda self, run: next(found))
    messages, how = told(whole_models.profile, Workload(True, 20, 30))
    assert how == "right", messages[-1]
    made = {"device_name": "a card", "commit": "c", "messages": messages}
    assert "\n".join(whole_models.profiles(made)).split("\n\n") == [
        "\nKernels of a step of fast_conformer_110m, training, 20 x 30 s: upstream 5.0 ms in 3 launches; fastasr 3.0 "
        "ms in 3 launches; **fastasr, recorded** 2.0 ms in 1 launches (a card, commit c).",
        "| kernel | upstream, launches | ms | fastasr, launches | ms | **fastasr, recorded**, launches | ms |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n"
        "| `theirs` | 3 | 5.00 | – | – | – | – |\n"
        "| `ours<1>` | – | – | 2 | 2.50 | 1 | 2.00 |\n"
        "| `ours\\|2` | – | – | 1 | 0.50 | – | – |",
    ]


def test_bench_runs_the_units_of_stage_m(tmp_path, monkeypatch):
    def few(machine, compiled):
        every = [u for u in device_units.units(machine, compiled) if u.op == NAME and "20 x 30 s" in u.name]
        assert {u.kind for u in every} == {"whole model", "profile"}
        return every

    def here(function, arguments, limit, heard):
        outcome = Outcome()
        function(outcome.messages.append, *arguments)
        return outcome

    monkeypatch.setattr(runner, "units", few)
    monkeypatch.setattr("fastasr.benchmarks.device.__main__.isolated", here)
    options = {"names": (NAME,), "out": tmp_path / "r.jsonl", "quick": True}
    summary = runner.run(runner.Options(**options))
    assert [row.implementation for row in summary.rows] == ["upstream", "fastasr", "recorded"]
    assert summary.problems == []
    assert read(tmp_path / "r.jsonl") == summary.rows
    assert [r["kind"] for r in verdict.records(tmp_path / NAME / "units.json")] == ["whole model"]
    more = runner.run(runner.Options(**options, profile=True))
    assert (more.resumed, more.rows) == (1, [])
    assert len(verdict.records(tmp_path / NAME / "units.json")) == 2


def test_names_of_whole_models():
    assert runner.Options(names=("models",), device="cuda").select() == list(whole_models.MODELS)
    assert not set(runner.Options(names=("models",)).select()) & whole_models.MODELS.keys()
    said = []
    runner.run(runner.Options(names=(NAME,), patience=0), said.append)
    assert f"{NAME}: measured on a GPU only" in said
    options = runner.Options(names=(NAME,), device="cuda:1")
    assert not [*runner._on_gpu(NAME, options, runner.Summary(), said.append)]
    assert "set CUDA_VISIBLE_DEVICES=1" in said[-1]
