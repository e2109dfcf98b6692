# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the sizes of every op, processes that are stopped, ratios, the table and the map."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import time

import pytest
import synthetic
import torch

from fastasr import ops
from fastasr.benchmarks import models, rows, sweep
from fastasr.benchmarks.case import Settings
from fastasr.benchmarks.table import units
from fastasr.testing import Make
from fastasr.testing.speed import Unavailable
from fastasr.testing.table import floating

row = functools.partial(synthetic.row, case="16 x 4", suite="sweep", median=1.0)


@pytest.fixture
def made():
    """Two cells: ours is faster than the fastest other in one, slower in the other."""
    cell = [row(), row(implementation="eager", median=3.0), row(implementation="upstream", median=2.0)]
    slower = [row(case="1 x 1"), row(case="1 x 1", implementation="eager", median=0.5)]
    return cell + slower


@pytest.mark.parametrize("name", ops.NAMES)
def test_every_op_has_sizes(name):
    """The arguments grow with both."""

    def values(frames, batch):
        arguments = sweep.subjects()[name](frames, batch).arguments(Make())
        return sum(t.numel() for t in floating(arguments).values())

    assert values(3, 2) > values(3, 1)
    assert values(6, 2) > values(3, 2)


@pytest.mark.parametrize("name", sorted(models.MODULES.keys() & sweep.subjects().keys()))
def test_every_model_runs_at_the_smallest_size(name):
    case = sweep.subjects()[name](1, 1)
    try:
        made = {key: make() for key, make in case.make("cpu", torch.float32).items() if key != "compile"}
    except Unavailable as reason:
        pytest.skip(str(reason))
    wanted = [implementation.differentiable() for implementation in made.values()]
    assert len(made) == 2
    assert len({len(of_one) for of_one in wanted}) == 1
    for implementation, of_one in zip(made.values(), wanted, strict=True):
        assert len(torch.autograd.grad(implementation.call().sum(), of_one)) > 0


def test_the_cells_of_a_sweep(tmp_path):
    options = sweep.Options(("bypass",), tmp_path, frames=(1, 9), batches=(1, 2), threads=(1,))
    cells = options.cells()
    assert [cell.case for cell in cells] == ["1 x 1"] * 2 + ["1 x 2"] * 2 + ["9 x 1"] * 2 + ["9 x 2"] * 2
    assert {cell.dtype for cell in cells} == {"float32", "bfloat16"}
    with pytest.raises(ValueError, match="no sweep is called 'nonsense'"):
        dataclasses.replace(options, names=("nonsense",)).cells()
    assert {cell.name for cell in dataclasses.replace(options, names=("all",)).cells()} >= set(ops.NAMES)


def test_a_cell_is_measured_in_three_passes():
    found = []
    settings = Settings(1, 1, 0.0, compile=False, memory=False, limits=False)
    cell = sweep.Cell("bypass", 3, 2, "bfloat16", 1, memory=2**40)
    sweep._measure(found.append, cell, settings, ("training forward",))
    measured = [message["rows"] for message in found if "rows" in message]
    assert [unit[0].pass_ for unit in measured] == ["forward", "forward+backward"]
    first = measured[0][0]
    assert (first.suite, first.case, first.shape, first.dtype) == ("sweep", "3 x 2", "3x2x192", "bfloat16")
    assert {row.implementation for row in measured[0]} >= {"eager", "fastasr"}
    assert first.fraction_of_limit is None


def sleeps(tell, *_):
    tell({"note": "asleep"})
    time.sleep(60)


def dies(*_):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("what", "said"), [(sleeps, "hung: killed after 1 s"), (dies, "crashed: exit code 3")]
)
def test_a_process_that_does_not_end_well(what, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_measure", what)
    sizes = {"frames": (1,), "batches": (1,), "dtypes": ("float32",), "threads": (1,)}
    notes = []
    sweep.run(sweep.Options(("bypass",), tmp_path / "rows.jsonl", **sizes, seconds=1.0), notes.append)
    assert [note.partition("threads: ")[2] for note in notes] == ["asleep"] * (what is sleeps) + [said]


def test_a_cell_with_two_threads(tmp_path):
    """OpenMP's threads do not survive a fork: whatever the sweep's server computes with them hangs its children."""
    code = (
        "import sys; from pathlib import Path; from fastasr.benchmarks import sweep\n"
        "sizes = {'frames': (1500,), 'batches': (4,), 'dtypes': ('float32',), 'threads': (2,)}\n"
        "options = sweep.Options(('bypass',), Path(sys.argv[1]), **sizes, reps=1, seconds=30.0)\n"
        "if __name__ == '__main__': sweep.run(options, print)"
    )
    out = tmp_path / "rows.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], env=environment, capture_output=True, text=True, check=True
    )
    assert "stopped" not in done.stdout, done.stdout
    assert {row.pass_ for row in rows.read(out)} == set(sweep.PASSES)


def test_sizes_beyond_the_memory_are_left_out(tmp_path):
    notes = []
    options = sweep.Options(
        ("bypass",), tmp_path / "rows.jsonl", frames=(90000,), batches=(40,), memory=2**20
    )
    assert sweep.run(options, notes.append) == []
    assert all("left out: it needs more than 0.0 GiB" in note for note in notes)
    assert notes


def test_ratios_and_the_worst_cell(made):
    cells = units(made)
    assert [sweep.ratio(unit) for unit in cells] == [2.0, 0.5]
    text = sweep.worst(cells)
    assert text.startswith("bypass: 1 of 2 cells below 0.97×; the worst: 1 x 1, forward, float32, ")
    assert text.endswith("0.50×: 1 ms beside 0.5 ms of eager")
    assert sweep.ratio(units([row()])[0]) == float("inf")
    assert sweep.ratio(units([row(implementation="eager")])[0]) == 0.0


def test_the_table_and_the_map(made, tmp_path):
    pytest.importorskip("matplotlib")
    made.append(row(case="90000 x 1"))  # only ours ran
    text = sweep.table(made)
    assert re.search(r"\| `bypass` \| 1 x 1, forward, float32, [^|]*\| 0.50× \| 3 \| 2.00× \| 1 \|", text)
    assert "![Sweep of bypass](plots/sweep_bypass.png)" in text
    (path,) = sweep.draw(made, tmp_path)
    assert path.name == "sweep_bypass.png"
    panel = sweep.figure(made).axes[0]
    assert [text.get_text() for text in panel.texts] == ["0.50", "2.00", "only"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["1 x 1", "16 x 4", "90000 x 1"]
