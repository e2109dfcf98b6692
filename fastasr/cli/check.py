# SPDX-License-Identifier: Apache-2.0
"""``fastasr check`` runs every check of every op on this machine."""

import dataclasses
import json

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastasr.cli.console import check_device, check_dtype, err, escape, fail, known_ops, out, sizes, table

SHOWN = 20  # the most failures that are printed in full


def _run(names: list[str], device: str, quiet: bool) -> list:
    from fastasr import testing

    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err(), disable=quiet) as progress:
        for name in names:
            task = progress.add_task(name, total=None)

            def report(done: int, total: int, label: str, task=task) -> None:
                progress.update(task, completed=done, total=total, description=escape(label))

            found = testing.check_op(name, device=device, progress=report)
            failed = sum(not result.passed for result in found)
            words = f"{name}: {failed} of {len(found)} failed" if failed else f"{name}: all passed"
            progress.update(task, completed=len(found), total=len(found), description=words)
            results += found
    return results


def _summary(results: list):
    """Makes a table with one line per op and check, which counts the cases that passed."""
    counts: dict[tuple[str, str], list[int]] = {}
    for result in results:
        passed = counts.setdefault((result.op, result.check), [0, 0])
        passed[0] += result.passed
        passed[1] += 1
    shown = table("op", "check", "passed:right", "cases:right", "")
    previous = None
    for (op, check), (passed, total) in counts.items():
        verdict = "[green]passed[/]" if passed == total else "[bold red]failed[/]"
        shown.add_row("" if op == previous else op, check, str(passed), str(total), verdict)
        previous = op
    return shown


def run_at(ops: list[str], shape: str, dtype: str, device: str, as_json: bool) -> None:
    """Compares values and gradients of the ops at one shape, in one dtype."""
    if not ops:
        fail("--shape: name the op that it is for, as in: fastasr check bypass --shape T=375,B=16,C=512")
    names, given = known_ops(ops), sizes(shape)
    check_dtype(dtype, ("float32", "bfloat16", "float16", "float64"))
    check_device(device)
    import torch

    from fastasr.testing import Make, sized
    from fastasr.testing.gradients import examine

    reports = []
    for name in names:
        try:
            report = examine(name, sized(name, **given).arguments(Make(getattr(torch, dtype), device)))
        except ValueError as error:
            fail(f"--shape: {error}")
        reports.append(report)
        if not as_json:
            out().print(escape(report), soft_wrap=True)
    if as_json:
        print(json.dumps([dataclasses.asdict(report) | {"ok": report.ok} for report in reports], indent=2))
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def run(ops: list[str], device: str, as_json: bool) -> None:
    from fastasr.ops import NAMES

    names = known_ops(ops) or list(NAMES)
    check_device(device)
    results = _run(names, device, quiet=as_json)
    failures = [result for result in results if not result.passed]
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    else:
        out().print(_summary(results))
        for result in failures[:SHOWN]:
            where = f"{result.op}, {result.check}, {result.sample}, {result.dtype}"
            err().print(f"[bold red]failed:[/] {escape(where)}: {escape(result.message)}", soft_wrap=True)
        if len(failures) > SHOWN:
            err().print(f"... and {len(failures) - SHOWN} more; --json prints them all")
    if failures:
        raise typer.Exit(1)
