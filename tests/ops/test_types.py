# SPDX-License-Identifier: Apache-2.0
"""A type checker knows the ops: a user's file with a call of each is clean, and a wrong argument is found."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import torch

from fastasr import ops

ROOT = Path(__file__).parents[2]
HEAD = "import torch\n\nimport fastasr.ops.bypass\nfrom fastasr import ops\n\nx = torch.zeros(3, 4)\n"
VALUES = {torch.Tensor: "x", int: "1", float: "0.5", bool: "bool(x.dim())", tuple[int, int]: "(1, 1)"}


def _call(name: str, **changed: str) -> str:
    parameters = list(inspect.signature(getattr(ops, name)).parameters.values())
    given = {p.name: "None" if p.default is p.empty else repr(p.default) for p in parameters}
    values = {p.name: VALUES.get(p.annotation, given[p.name]) for p in parameters} | changed
    return f"ops.{name}({', '.join(f'{k}={v}' for k, v in values.items())})"


def _checked(folder: Path, lines: list[str]) -> str:
    file = folder / "user.py"
    file.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", file]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600).stdout


def test_a_call_of_every_op_is_typed(tmp_path):
    flagged = [(name, p) for name in ops.NAMES for p in inspect.signature(getattr(ops, name)).parameters]
    flagged = [(name, p) for name, p in flagged if p.startswith("return_")]
    lines = [f"reveal_type({_call(name)})" for name in ops.NAMES]
    lines += [f"reveal_type({_call(name, **{flag: 'True'})})" for name, flag in flagged]
    wrong = ['ops.bypass(x, x, "scale")', "ops.linear(x)", 'ops.linear_activation(x, x, activation="swish")']
    said = _checked(tmp_path, [*lines, "reveal_type(fastasr.ops.bypass)", *wrong])

    found = re.findall(r"Revealed type is \"(.*)\"", said.replace("torch._tensor.", ""))
    assert all(re.fullmatch(r"Tensor|tuple\[Tensor(, Tensor)+\]|Tensor \| tuple\[.*", t) for t in found[:-1])
    assert all(t.startswith("tuple[Tensor") for t in found[len(ops.NAMES) : -1])
    assert found[-1] == "def (x_orig: Tensor, x: Tensor, scale: Tensor) -> Tensor"
    assert len(found) == len(lines) + 1

    first = HEAD.count("\n") + len(lines) + 2
    errors = [int(line) for line in re.findall(r"user.py:(\d+): error", said)]
    assert errors == [first, first + 1, first + 2], said
