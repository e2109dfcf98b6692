# SPDX-License-Identifier: Apache-2.0
"""The written files of the ops are those that their declarations give."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from opgen import files

from fastasr import ops

ROOT = Path(__file__).parents[2]


def opgen(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "opgen", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_written_files_are_current():
    done = opgen("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_changed_and_deleted_declarations_are_noticed(tmp_path):
    folder = tmp_path / "fastasr" / "ops"
    for path in (ROOT / "fastasr").glob("*"):
        if path.name not in ("ops", "__pycache__"):
            (tmp_path / "fastasr").mkdir(exist_ok=True)
            (tmp_path / "fastasr" / path.name).symlink_to(path.resolve())
    shutil.copytree(ROOT / "fastasr" / "ops", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".clang-format"):
        (tmp_path / name).symlink_to(ROOT / name)
    written = tmp_path / "csrc" / "bindings" / "written"
    shutil.copytree(ROOT / "csrc" / "bindings", written.parent)
    (written / "gone.h").touch()
    (folder / "add_norm.py").unlink()
    bypass = folder / "bypass.py"
    bypass.write_text(
        bypass.read_text().replace('scale: Annotated[Tensor, "..."]', 'scale: Annotated[Tensor, "C"]')
    )

    done = opgen("--check", "--root", tmp_path)
    assert done.returncode == 1
    files = [f"csrc/bindings/written/{name}.h" for name in ("add_norm", "bypass", "gone")]
    files += [f"fastasr/ops/{name}.py" for name in ("__init__", "_written/add_norm", "_written/bypass")]
    assert re.findall(r"differs: (\S+)", done.stdout) == files
    assert "run `make ops`" in done.stdout

    assert opgen("--root", tmp_path).returncode == 0
    assert not (folder / "_written" / "add_norm.py").exists()
    assert not (written / "gone.h").exists()
    assert "scale is not (C)" in (written / "bypass.h").read_text()
    assert "add_norm" not in (folder / "__init__.py").read_text()
    assert opgen("--check", "--root", tmp_path).returncode == 0


def test_an_unknown_op_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(files, "_written", lambda root, folder: {folder / "_written" / "bypass.py": ""})
    assert files.main(["bypas"], False, ROOT) == 2
    assert "no op bypas" in capsys.readouterr().out


@pytest.mark.parametrize(
    "first", ["fastasr.ops.bypass", "fastasr.ops._written.swoosh_l", "fastasr.ops.linear"]
)
def test_the_function_of_an_op_hides_the_module_of_its_name(first):
    code = f"import sys; import {first}; from fastasr import ops; print(*sorted(sys.modules)); "
    code += "assert all(callable(getattr(ops, name)) for name in ops.NAMES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    unread = {"fastasr.testing", "torch._dynamo", "fastasr.testing.declared"}
    assert unread.isdisjoint(done.stdout.split())


def test_every_public_function_has_a_file():
    files = {Path(function.__code__.co_filename) for function in map(ops.__dict__.get, ops.NAMES)}
    assert all(path.exists() and path.parent.name in ("_written", "_wrapped") for path in files)
