# SPDX-License-Identifier: Apache-2.0
"""Makes modules of the ops' code: puts imports above it, drops unused assignments, fills long lines, and formats."""

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from fastasr.testing.declared import Declared
from opgen import fragments

WIDTH = 110
HEAD = '''# SPDX-License-Identifier: Apache-2.0
# `make op OP={name}` writes this file from fastasr/ops/{file}: change that one.
"""{summary}"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, promote_types
from torch._C import _are_functorch_transforms_active
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, refuse_unless_batched, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served, widest
from fastasr.ops._layout import as_int64, as_it_is, as_matrix, as_vector, dense_channels, rows
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward
from fastasr.ops._runtime import BOOL, COMPUTE, INT64, INTEGERS, MASKS, NOT_MINE, Like, applied, back, back_in_shape, \\
    is_batched, laid_out, listed, make, node_gradients, not_a_view, operand, promoted, wide
from {module} import {parts}
from {module} import {name} as formula

'''
# the text between two parentheses, with up to two levels of them inside
INSIDE = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"


def write(op: Declared) -> str:
    """Returns an op's module, not yet formatted."""
    module = sys.modules[op.op.definition.__module__]
    head = HEAD.format(
        name=op.name,
        file=Path(module.__file__).name,
        summary=op.op.summary,
        module=module.__name__,
        parts=", ".join(sorted(fragments.parts(op)) or ["__doc__"]),
    )
    imported = re.findall(r"\w+(?=,|$| \\)", "\n".join(re.findall(r"import (.*)", head)))
    if clashes := {a.name for a in (*op.arguments, *op.found)} & {*imported, "op", "family", "formula"}:
        raise ValueError(f"{op.name}: {', '.join(clashes)}: the written file needs this name: take another")
    return head + filled(without_unused(fragments.write(op)))


def without_unused(code: str) -> str:
    """Returns the code without assignments to names that their function never reads."""
    lines, gone = code.split("\n"), set()
    for function in ast.walk(ast.parse(code)):
        if isinstance(function, ast.FunctionDef):
            names = [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
            for node in _unread(function.body, {n.id for n in names}):
                gone |= {*range(node.lineno - 1, node.end_lineno)}
    found = "\n".join(line for i, line in enumerate(lines) if i not in gone)
    return found if found == code else without_unused(found)


def _unread(body: list[ast.stmt], read: set[str]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If):
            below, other = [*_unread(node.body, read)], [*_unread(node.orelse, read)]
            if len(other) == len(node.orelse):
                yield from [node] if len(below) == len(node.body) else below
        elif isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            yield from [node] * (isinstance(node.targets[0], ast.Name) and node.targets[0].id not in read)


def filled(code: str) -> str:
    """Returns the code with long lists of names filled into lines; ruff would put each name on a line of its own."""
    lines = []
    for line in code.split("\n"):
        found = re.fullmatch(rf"( *)((?:return )?(?:[^()\"']* = )?(?:def )?[\w.]+\()({INSIDE})(\):?)", line)
        if len(line) <= WIDTH or not found or '"' in line or len(found[1] + found[3]) + 4 <= WIDTH:
            lines.append(line)
            continue
        margin, begin, names, end = found.groups()
        inside = textwrap.wrap(names.rstrip(", ") + ",", WIDTH - len(margin) - 4, break_long_words=False)
        lines += [margin + begin, *(f"{margin}    {text}" for text in inside), f"{margin}{end}  # fmt: skip"]
    return "\n".join(lines)


def formatted(texts: dict[str, str], configuration: Path) -> dict[str, str]:
    """Returns the files as ruff fixes and formats them, in one run."""
    with TemporaryDirectory() as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        ruff = [sys.executable, "-m", "ruff"]
        options = ["--quiet", "--no-cache", "--config", str(configuration)]
        fixes = ["--select", "E713,E714,F401,I001,RET504,RUF021,SIM", "--fix-only", "--unsafe-fixes"]
        subprocess.run([*ruff, "check", *options, *fixes, folder], check=True)
        tight = ["--config", "format.skip-magic-trailing-comma=true"]
        subprocess.run([*ruff, "format", *options, *tight, folder], check=True)
        return {name: Path(folder, name).read_text(encoding="utf-8") for name in texts}
