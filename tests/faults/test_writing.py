# SPDX-License-Identifier: Apache-2.0
"""Files stay whole if the process is killed, if two write at once, and if nothing can be written."""

import ast
import csv
import json
import os
import random
import resource
import tempfile
from dataclasses import asdict
from pathlib import Path

import children
import pytest
import sources
import torch

from fastasr import files
from fastasr.asr.recipe import checkpoints, recogniser
from fastasr.asr.recipe.logs import COLUMNS, Log
from fastasr.benchmarks import rows
from fastasr.ops import _gemm

KILLS = [pytest.param(5, id="5"), pytest.param(200, id="200", marks=pytest.mark.long)]
NATIVE = _gemm._Choice("native", under_load=False, times=1, at=1.8e9)
needs_both = pytest.mark.skipif(bool(_gemm.why_not()), reason=_gemm.why_not())


@pytest.fixture
def draw():
    return random.Random(torch.initial_seed())


def names(folder):
    return {p.name for p in folder.iterdir() if not p.name.startswith(".fastasr-")}


# --------------------------------------------------------------------------- killed
def _choices(folder):
    os.environ["FASTASR_CACHE"], os.environ["FASTASR_GEMM"] = str(folder), "auto"
    _gemm.forget()


def _calibrating(ready, folder, seed):
    draw = random.Random(seed)
    _choices(folder)
    for i in range(1 << 30):
        if i == 2:
            ready()
        m, n, k = (draw.randrange(64, 200) for _ in range(3))
        _gemm.forward(torch.ones(m, k), torch.ones(n, k), None)


def _remembering(ready, folder, seed):
    _choices(folder)
    for i in range(1 << 30):
        if i == 2:
            ready()
        _gemm._remember(f"forward {seed} {i}", NATIVE)


@needs_both
@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("work", [_calibrating, _remembering])
def test_killed_while_choices_are_written(tmp_path, monkeypatch, draw, work, kills):
    """Every choice that was in the file before is in it afterwards, and the next process reads it."""
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    known = {f"weight_grad {i} 12 12 1": asdict(NATIVE) for i in range(1000)}
    files.write(_gemm.cache_file(), json.dumps(known))
    for _ in range(kills):
        children.kill(draw, work, tmp_path, draw.random())
        found = json.loads(_gemm.cache_file().read_text())
        assert known == {key: found[key] for key in known}
        assert len(found) == _gemm.kept()[0], "an entry is not whole"
        known = found
    assert len(known) > 1000
    assert names(tmp_path) == {_gemm.cache_file().name}


def _training(ready, folder, seed):
    """Writes logs and checkpoints as training does."""
    path, step = folder / checkpoints.NAME, 0
    if path.exists():
        step = checkpoints.load(path)["step"]
    log, first = Log(folder / "log.csv", step), step
    while True:
        step += 1
        if step == first + 3:
            ready()
        log.write(**dict.fromkeys(COLUMNS, step / 3) | {"step": step, "epoch": 0})
        state = {"w": torch.full((50_000,), float(step))}
        content = dict.fromkeys(checkpoints.NEEDED, step) | {"model": state, "model_avg": state}
        checkpoints.save(path, content)


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_training_writes(tmp_path, draw, kills):
    """The next start has a whole checkpoint, not older than the last, and the log up to its step."""
    last, path = 1, tmp_path / checkpoints.NAME
    for _ in range(kills):
        children.kill(draw, _training, tmp_path, draw.random())
        found = checkpoints.load(path)
        assert found["step"] > last
        assert bool((found["model"]["w"] == found["step"]).all())
        last = found["step"]
        Log(tmp_path / "log.csv", last).close()
        with (tmp_path / "log.csv").open(newline="") as file:
            written = list(csv.DictReader(file))
        assert [int(row["step"]) for row in written] == list(range(1, last + 1))
        assert all(row[name] for row in written for name in COLUMNS)


def row(number):
    fields = {
        "suite": "ops",
        "name": f"op{number % 50}",
        "case": "x" * 2000,
        "shape": "",
        "dtype": "",
        "device": "",
    }
    times = {"median_ms": float(number), "q1_ms": 1.0, "q3_ms": 1.0, "reps": 1}
    return rows.Row(**fields, pass_="forward", implementation="eager", **times)


def _reporting(ready, folder, seed):
    for i in range(1 << 30):
        if i == 2:
            ready()
        rows.merge(folder / "rows.jsonl", [row(i)])
        files.write(folder / "report.json", json.dumps([i] * 100_000))


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_reports_are_written(tmp_path, draw, kills):
    most = 0
    for _ in range(kills):
        children.kill(draw, _reporting, tmp_path, draw.random())
        found = rows.read(tmp_path / "rows.jsonl")
        assert len(found) >= most
        most = len(found)
        if (tmp_path / "report.json").exists():
            assert len(set(json.loads((tmp_path / "report.json").read_text()))) == 1
    assert most > 1
    assert names(tmp_path) <= {"rows.jsonl", "report.json"}


def test_what_a_killed_process_left_goes_an_hour_later(tmp_path, draw):
    left = []
    for _ in range(50):
        if not left:
            children.kill(draw, _reporting, tmp_path, 0)
            left = list(tmp_path.glob(f".*{files.SUFFIX}"))
    assert left
    files.write(tmp_path / "report.json", "new")
    assert set(tmp_path.glob(".*")) == set(left), "a process may still be writing these"
    now = left[0].stat().st_mtime
    for path in left:
        os.utime(path, (now - 4000, now - 4000))
    files.write(tmp_path / "report.json", "newer")
    assert not list(tmp_path.glob(".*"))


def test_an_export_that_ends_early_does_not_load(tmp_path, monkeypatch):
    """The folder holds another model's files from before: they must not go with the new ones."""
    (tmp_path / recogniser.DESCRIPTION).write_text('{"rate": 8000, "bins": 40}')
    monkeypatch.setattr(
        recogniser, "load", lambda path: recogniser.Recogniser(torch.nn.Identity(), None, 8000, 40)
    )

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastasr.asr.export.export_onnx", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recogniser.export("last.pt", tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"there is no checkpoint"):
        recogniser.load(tmp_path)


def test_a_row_that_was_cut_is_not_read_again(tmp_path):
    """A full disk or a loss of power cuts the log anywhere: what is left of a row is no row."""
    log = Log(tmp_path / "log.csv")
    for step in range(1, 13):
        log.write(**dict.fromkeys(COLUMNS, step / 3) | {"step": step, "epoch": 0})
    log.close()
    whole = (tmp_path / "log.csv").read_bytes()
    for size in range(whole.rindex(b"11,0,"), len(whole)):
        (tmp_path / "log.csv").write_bytes(whole[:size])
        Log(tmp_path / "log.csv", 12).close()
        kept = (tmp_path / "log.csv").read_bytes()
        assert whole.startswith(kept)
        assert kept.endswith(b"\n")


# --------------------------------------------------------------------------- two processes
def _writing(folder, first, count):
    _choices(folder)
    for i in range(count):
        _gemm._remember(f"forward {first} {i}", NATIVE)
        files.write(folder / "report.json", json.dumps([first] * 50_000))
    return True


@needs_both
def test_two_processes_write_one_cache(tmp_path, monkeypatch):
    """Whoever reads in the meantime reads a whole file; afterwards it has choices of both."""
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    processes = [children.CONTEXT.Process(target=_writing, args=(tmp_path, first, 100)) for first in "ab"]
    for process in processes:
        process.start()
    read = 0
    while any(process.is_alive() for process in processes):
        if _gemm.cache_file().exists() and (tmp_path / "report.json").exists():
            found = json.loads(_gemm.cache_file().read_text())
            assert all(entry == asdict(NATIVE) for entry in found.values())
            assert len(set(json.loads((tmp_path / "report.json").read_text()))) == 1
            read += 1
    assert [process.exitcode for process in processes] == [0, 0]
    assert read > 3
    assert {path.name for path in tmp_path.iterdir()} == {_gemm.cache_file().name, "report.json"}


# --------------------------------------------------------------------------- where nothing can be written
def _as_nobody(function, *arguments):
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return function(*arguments)


def _product(folder):
    """Returns the file's choices after a product of a shape class that it does not have."""
    _choices(folder)
    x, w = torch.ones(64, 64), torch.ones(70, 64)
    assert bool((_gemm.forward(x, w, None) == 64).all())
    return json.loads(_gemm.cache_file().read_text()) if _gemm.cache_file().exists() else {}


def _error_of(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _save(path, step=1):
    state = {"w": torch.zeros(1 << 20)}
    checkpoints.save(path, dict.fromkeys(checkpoints.NEEDED, step) | {"model": state})


@pytest.fixture
def read_only():
    """Returns a folder that others than its owner see, with a file in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "kept"
        folder.mkdir()
        (folder / "report.json").write_text("old")
        os.chmod(name, 0o755)
        os.chmod(folder, 0o555)
        yield folder
        os.chmod(folder, 0o755)


def test_a_read_only_folder(read_only):
    """Products are measured and taken; other files end with an error that names them."""
    assert children.run(_as_nobody, _product, read_only) == {}
    assert children.run(_as_nobody, _product, read_only / "inner") == {}
    for write in (files.write, checkpoints.save):
        name, text = children.run(_as_nobody, _error_of, write, read_only / "report.json", "new")
        assert (name, text.endswith("kept/report.json'")) == ("PermissionError", True), text
    assert (read_only / "report.json").read_text() == "old"


def _on_a_full_disk(function, *arguments):
    """Calls the function where no file may grow beyond 4 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return function(*arguments)


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    known = {f"weight_grad {i} 12 12 1": asdict(NATIVE) for i in range(200)}
    files.write(_gemm.cache_file(), json.dumps(known))
    _save(tmp_path / "last.pt")
    rows.write(tmp_path / "rows.jsonl", map(row, range(50)))
    assert children.run(_on_a_full_disk, _product, tmp_path) == known
    for function, *arguments in (
        (_save, tmp_path / "last.pt", 2),
        (rows.merge, tmp_path / "rows.jsonl", [row(7)]),
        (files.write, tmp_path / "rows.jsonl", "x" * 5000),
    ):
        name, text = children.run(_on_a_full_disk, _error_of, function, *arguments)
        assert (name, "File too large" in text or "is the disk full?" in text) == ("OSError", True), (
            function,
            name,
            text,
        )
    assert checkpoints.load(tmp_path / "last.pt")["step"] == 1
    assert len(rows.read(tmp_path / "rows.jsonl")) == 50
    assert {p.name for p in tmp_path.iterdir()} == {_gemm.cache_file().name, "last.pt", "rows.jsonl"}


# --------------------------------------------------------------------------- what is no plain file
def test_links_devices_and_modes(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write(tmp_path / "pipe", "text", durable=False)
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


# --------------------------------------------------------------------------- no other way of writing
WRITERS = {"write_text", "write_bytes", "savez", "savefig"}
ELSEWHERE = {  # what is written to temporary folders, to what is no file, or row by row
    "fastasr/files.py",
    "fastasr/asr/recipe/checkpoints.py",
    "fastasr/asr/recipe/curves.py",
    "fastasr/asr/recipe/logs.py",
    "fastasr/asr/export/onnx_files.py",
    "benchmarks/harness.py",
    "benchmarks/plots.py",
    "benchmarks/studies/int8_peers.py",
    "benchmarks/models/recipe_step.py",
    "benchmarks/models/streaming_peers.py",
}


def writes(path):
    """Says whether a file's code writes files itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        values = [
            a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)
        ]
        if name in WRITERS or (
            name == "open" and {"w", "wb", "x", "a"} & {v for v in values if isinstance(v, str)}
        ):
            return True
        if name in ("save", "dump") and ast.unparse(node.func) in (
            "torch.save",
            "onnx.save",
            "json.dump",
            "numpy.save",
        ):
            return True
    return False


def test_only_one_module_writes_files():
    found = {p for top in ("fastasr", "benchmarks") for p in (sources.ROOT / top).rglob("*.py")}
    found = {p.relative_to(sources.ROOT).as_posix() for p in found if writes(p)}
    assert found == ELSEWHERE
