# SPDX-License-Identifier: Apache-2.0
"""``fastasr ops`` lists for every op which backends are available, and why the others are not."""

import json
import textwrap

import torch

import fastasr  # noqa: F401 - registers the ops
from fastasr.cli.console import escape, known_ops, mark, out, table
from fastasr.ops import _dispatch

WIDTH = 80  # columns


def run(ops: list[str], as_json: bool) -> None:
    ops = known_ops(ops)
    rows = [row for row in _dispatch.table() if not ops or row["op"] in ops]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif ops:
        for op in ops:
            _print_details(op, [row for row in rows if row["op"] == op])
    else:
        _print_overview(rows)


def _print_overview(rows: list[dict]) -> None:
    """Prints a line per op, and the reasons as numbered notes."""
    backends = sorted({row["backend"] for row in rows}, key=lambda name: (name == "eager", name))
    cells: dict[str, dict[str, str]] = {}
    notes: dict[str, int] = {}
    for row in rows:
        reason = row["reason"]
        note = f" {escape(f'[{notes.setdefault(reason, len(notes) + 1)}]')}" if reason else ""
        cells.setdefault(row["op"], {})[row["backend"]] = mark(row["available"]) + note
    shown = table("op", *backends)
    for op, its in cells.items():
        shown.add_row(op, *(its.get(backend, "-") for backend in backends))
    out().print(shown)
    for reason, number in notes.items():
        _print(f"[{number}] {reason}")
    _print("A call runs the available kernel for its device and dtype; else eager, the formula.")
    _print("`fastasr ops OP` has the devices, dtypes and reasons of an op.")


def _print_details(op: str, rows: list[dict]) -> None:
    out().print(f"[bold]{op}[/]")
    family = next(name for name, family in _dispatch.FAMILIES.items() if op in family.ops)
    for row in rows:
        available = mark(row["available"]) + (f": {escape(row['reason'])}" if row["reason"] else "")
        _print(f"{row['backend']:8}{available}", styled=True)
        _print(f"        devices: {', '.join(row['devices'])}; dtypes: {', '.join(row['dtypes'])}")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        chosen, reason = _dispatch.explain_choice(family, device, torch.float32)
        _print(f"now     {device} tensors of float32 get {chosen}" + (f": {reason}" if reason else ""))


def _print(text: str, styled: bool = False) -> None:
    for line in textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False):
        out().print(line if styled else escape(line), soft_wrap=True)
