# SPDX-License-Identifier: Apache-2.0
"""``fastasr bench`` measures and shows the rows as a table, plots and one HTML page."""

from pathlib import Path

import torch
import typer

from fastasr.cli.console import check_device, check_dtype, check_folder, err, escape, fail, out, sizes, table

DTYPES = ("float32", "bfloat16", "float16")


def _print_table(rows: list) -> None:
    from fastasr.benchmarks import table as rows_table

    found = rows_table.units(rows)
    groups: dict[tuple[str, str], list] = {}
    for unit in found:
        groups.setdefault((unit.first.suite, unit.first.name), []).append(unit)
    for (suite, name), members in groups.items():
        columns = rows_table.implementations(members)
        titles = [f"{rows_table.title(column)}:right" for column in columns]
        heading = f"{name} (cost of a call)" if suite == "dispatch" else name
        shown = table(
            "case", "pass", *titles, "× upstream:right", "× eager:right", "of limit:right", title=heading
        )
        for unit in members:
            ours = unit.row("fastasr")
            shown.add_row(
                escape(unit.first.case),
                escape(unit.first.pass_),
                *(_cell(column, unit.median(column)) for column in columns),
                rows_table.times(unit.ratio("upstream")),
                rows_table.times(unit.ratio("eager")),
                rows_table.percent(ours.fraction_of_limit if ours else None),
            )
        out().print(shown)
        out().print()


def _cell(implementation: str, median: float | None) -> str:
    from fastasr.benchmarks.table import duration

    text = duration(median)
    return f"[bold red]{text}[/]" if implementation == "fastasr" and median is not None else text


def _draw(rows: list, folder: Path, problems: list[str]) -> None:
    try:
        from fastasr.benchmarks import page, plots

        pictures = plots.write(rows, folder)
        written = page.write(rows, folder / "index.html", notes=problems)
    except ImportError as error:
        err().print(f"[yellow]no plots and no page:[/] {escape(error)}", soft_wrap=True)
        return
    err().print(f"{len(pictures)} plots and the page: {escape(written)}", soft_wrap=True)


def run(
    names: list[str],
    folder: Path,
    *,
    shape: str | None,
    quick: bool,
    fresh: bool,
    compile_ops: bool,
    compile_model: bool,
    profile: bool,
    device: str,
    dtype: str,
    reps: int | None,
    patience: float,
    plots: bool,
) -> None:
    from fastasr.benchmarks import rows, runner
    from fastasr.benchmarks.table import line

    check_dtype(dtype, DTYPES)
    check_device(device)
    options = runner.Options(
        names=tuple(names),
        out=folder / "results.jsonl",
        sizes=sizes(shape) if shape is not None else {},
        quick=quick,
        fresh=fresh,
        compile=compile_ops,
        compile_model=compile_model,
        profile=profile,
        device=device,
        dtype=getattr(torch, dtype),
        patience=patience,
        reps=reps,
    )
    try:
        chosen = options.select()
    except ValueError as error:
        fail(str(error).splitlines()[0])
    if profile and not (options.on_gpu or quick):
        fail("--profile: it is of whole models on a GPU: add --device cuda")
    check_folder("--out", folder)
    console = err()
    if quick:
        console.print(f"[yellow]{runner.QUICK}[/]")
    with console.status("measuring") as status:

        def report(message: str) -> None:
            status.update(escape(message))
            if not console.is_terminal or message not in chosen:
                console.print(f"[dim]{escape(message)}[/]", soft_wrap=True)

        def on_rows(unit: list) -> None:
            console.print(escape(line(unit)), soft_wrap=True)

        summary = runner.run(options, report, on_rows)
    found = [row for row in rows.read(options.out) if _wanted(row, chosen, options)]
    _print_table(found)
    console.print(
        f"{len(summary.rows)} rows in {summary.seconds:.0f} s"
        + (
            f", {summary.resumed} units were there already (--fresh measures them again)"
            if summary.resumed
            else ""
        )
        + f": {escape(options.out)}",
        soft_wrap=True,
    )
    if plots and found:
        _draw(found, folder, summary.problems)
    if not found or any("left out" not in problem for problem in summary.problems):
        raise typer.Exit(1)


def run_sweep(
    names: list[str],
    folder: Path,
    given: dict[str, str | None],
    *,
    quick: bool,
    fresh: bool,
    compile_ops: bool,
    device: str,
    reps: int | None,
    seconds: float,
    plots: bool,
) -> None:
    """Measures sweeps into ``folder``, draws their maps and names the worst cell of each. ``given`` are the fields of
    ``sweep.Options`` that the user gave, as text."""
    from fastasr.benchmarks import runner, sweep
    from fastasr.benchmarks.markdown import by_name
    from fastasr.benchmarks.table import line, units

    check_device(device)
    few = {"frames": "1,16", "batches": "1", "threads": "1", "dtypes": "float32"} if quick else {}
    given = few | {name: text for name, text in given.items() if text}
    console = err()
    if quick:
        console.print(f"[yellow]{runner.QUICK}[/]")
    try:
        found = sweep.run(
            sweep.Options(
                names=tuple(names),
                out=folder / "sweep.jsonl",
                device=device,
                compile=compile_ops,
                fresh=fresh,
                reps=reps or (3 if quick else 7),
                seconds=seconds,
                **{name: _values(name, text) for name, text in given.items()},
            ),
            lambda message: console.print(f"[dim]{escape(message)}[/]", soft_wrap=True),
            lambda unit: console.print(escape(f"{line(unit)}, {_where(unit[0])}"), soft_wrap=True),
        )
    except ValueError as error:
        fail(str(error).splitlines()[0])
    for of_name in by_name(found, "name"):
        out().print(escape(sweep.worst(units(of_name))), soft_wrap=True)
    if plots and found:
        try:
            for path in sweep.draw(found, folder):
                console.print(f"the map: {escape(path)}", soft_wrap=True)
        except ImportError as error:
            console.print(f"[yellow]no map:[/] {escape(error)}", soft_wrap=True)


def _where(row) -> str:
    return f"{row.dtype}, {row.threads} threads"


def _values(name: str, text: str) -> tuple:
    """Returns the numbers or dtypes of a list with commas. Raises ``ValueError`` naming the option."""
    values = tuple(text.split(","))
    if name == "dtypes":
        if unknown := [value for value in values if value not in DTYPES]:
            raise ValueError(f"--dtype: expected some of {', '.join(DTYPES)}, got {unknown[0]!r}")
        return values
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise ValueError(f"--{name}: expected positive numbers with commas, got {text!r}")
    return tuple(int(value) for value in values)


def _wanted(row, chosen: list[str], options) -> bool:
    if row.suite == "dispatch":
        return "dispatch" in chosen
    if row.suite == "ops" and (options.sizes or options.quick):
        return row.name in chosen and row.case in {case.name for case in options.cases(row.name)}
    return row.name in chosen
