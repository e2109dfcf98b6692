# SPDX-License-Identifier: Apache-2.0
"""Makes modules of the ops' code: imports the names it uses, drops unused assignments, and formats."""

import ast
import builtins
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
# `make op OP={name}` writes this file from {source}: change that one.
"""{summary}"""

'''
IMPORTS = {
    "typing": "Literal NamedTuple overload",
    "torch": "Tensor is_autocast_enabled is_grad_enabled promote_types",
    "torch._C": "_are_functorch_transforms_active",
    "torch.autograd": "Function forward_ad",
    "torch.compiler": "is_compiling is_dynamo_compiling",
    "fastasr._transforms": "by_formula refuse_unless_batched transforms_active",
    "fastasr.kernels": "Unlaunchable",
    "fastasr.ops._dispatch": "FLOATING PLAIN served widest",
    "fastasr.ops._layout": "as_int64 as_it_is as_matrix as_vector dense_channels rows",
    "fastasr.ops._op": "OPS Written",
    "fastasr.ops._operator": "register_op",
    "fastasr.ops._register": "autocast_dtype cast refuse_double_backward",
    "fastasr.ops._runtime": "BOOL COMPUTE INT64 INTEGERS MASKS Like NOT_MINE applied back "
    "gradients_without is_batched listed make not_a_view operand promoted transformed_gradients wide",
}
ORIGINS = {name: module for module, names in IMPORTS.items() for name in names.split()}


def write(op: Declared) -> str:
    """Returns an op's module, not yet formatted."""
    source = sys.modules[op.op.definition.__module__]
    code = wrapped(without_unused(fragments.write(op)))
    imports = "\n".join(sorted(_imports(op, code, source)))
    path = f"fastasr/ops/{Path(source.__file__).name}"
    return f"{HEAD.format(name=op.name, source=path, summary=op.op.summary)}{imports}\n\n{code}"


def _imports(op: Declared, code: str, source) -> Iterator[str]:
    tree = ast.parse(code)
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    bound |= {
        n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)
    }
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - bound - set(dir(builtins))
    clashes = bound & set(ORIGINS) | bound & {"formula", "torch"}
    if clashes:
        raise ValueError(
            f"{op.name}: {', '.join(sorted(clashes))}: the written file needs this name: take another"
        )
    for name in used:
        if name == "torch":
            yield "import torch"
        elif name == "formula":
            yield f"from {source.__name__} import {op.name} as formula"
        elif name in ORIGINS:
            yield f"from {ORIGINS[name]} import {name}"
        elif hasattr(source, name):
            yield f"from {source.__name__} import {name}"
        else:
            raise ValueError(f"{op.name}: {name}: expected a name of {source.__name__}")


def without_unused(code: str) -> str:
    """Returns the code without assignments to names that their function never reads."""
    lines = code.split("\n")
    for function in ast.walk(ast.parse(code)):
        if isinstance(function, ast.FunctionDef):
            read = {
                n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
            }
            for node in _unread(function.body, read):
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    found = "\n".join(lines)
    return found if found == code else without_unused(found)


def _unread(body: list[ast.stmt], read: set[str]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If):
            below = list(_unread(node.body, read)), list(_unread(node.orelse, read))
            if len(below[0]) == len(node.body) and len(below[1]) == len(node.orelse):
                yield node
            elif len(below[1]) == len(node.orelse):
                yield from below[0]
            continue
        simple = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if simple and node.targets[0].id not in read and not isinstance(node.value, ast.Call):
            yield node


def wrapped(code: str) -> str:
    """Returns the code with long lists of names filled into lines; ruff would put each name on a line of its own."""
    lines = []
    for line in code.split("\n"):
        found = re.fullmatch(r"( *)((?:return )?(?:[^()\"']* = )?(?:def )?[\w.]+)\((.*)\)(:?)", line)
        targets = re.fullmatch(r"( *)([\w, ]+) = (.*)", line)
        if len(line) <= WIDTH or (line.startswith("def ") and "->" in line):
            lines.append(line)
        elif targets and len(targets[2]) > WIDTH - 20:  # a list to the left of =, and what is to the right
            right = wrapped(f"{targets[1]}names = {targets[3]}").split("\n")
            lines += right if len(right) > 1 else []
            value = "names" if len(right) > 1 else targets[3]
            lines += _filled(targets[1], "(", targets[2], f") = {value}")
        elif found and '"' not in line and _closed(found[3]) and len(found[1]) + 4 + len(found[3]) > WIDTH:
            lines += _filled(found[1], f"{found[2]}(", found[3], f"){found[4]}")
        else:
            lines.append(line)
    return "\n".join(lines)


def _closed(text: str) -> bool:
    """Says whether every parenthesis that closes in the text was opened in it."""
    depth = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return False
    return True


def _filled(margin: str, begin: str, names: str, end: str) -> list[str]:
    words = names.replace(" ", "\0").replace(",\0", ", ")
    inside = textwrap.wrap(words, WIDTH - len(margin) - 4, break_long_words=False, break_on_hyphens=False)
    lines = [f"{margin}    {text}".replace("\0", " ") for text in inside]
    return [f"{margin}{begin}", *lines[:-1], f"{lines[-1].rstrip(',')},", f"{margin}{end}  # fmt: skip"]


def formatted(texts: dict[str, str], configuration: Path) -> dict[str, str]:
    """Returns the files as ruff formats them, in one run."""
    with TemporaryDirectory() as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        ruff = [sys.executable, "-m", "ruff"]
        options = ["--quiet", "--no-cache", "--config", str(configuration)]
        fixes = ["--select", "E713,E714,I001,RET504,RUF021,SIM", "--fix-only", "--unsafe-fixes"]
        subprocess.run([*ruff, "check", *options, *fixes, folder], check=True)
        tight = ["--config", "format.skip-magic-trailing-comma=true"]
        subprocess.run([*ruff, "format", *options, *tight, folder], check=True)
        return {name: Path(folder, name).read_text(encoding="utf-8") for name in texts}
