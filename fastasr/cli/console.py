# SPDX-License-Identifier: Apache-2.0
"""Output and errors of the commands."""

import os
import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 160  # columns of a pipe or a file, so that rows are not wrapped


def out() -> Console:
    """Returns a console on the current standard output (tests replace it), wide if it is not a terminal."""
    return _console(sys.stdout)


def err() -> Console:
    return _console(sys.stderr)


def _console(file) -> Console:
    width = None if file.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH
    return Console(file=file, width=width, highlight=False, emoji=False)


def fail(message: str, code: int = 2) -> NoReturn:
    """Prints the message to stderr and ends the command without a traceback."""
    err().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def check_device(name: str) -> None:
    """Ends the command with the reason unless torch can use the device here."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        fail(str(error).splitlines()[0])
    if kind == "cuda" and not torch.cuda.is_available():
        fail(f"--device {name}: no CUDA device here")


def escape(text: object) -> str:
    """Returns the text with rich's markup escaped."""
    from rich.markup import escape as rich_escape

    return rich_escape(str(text))


def table(*columns: str, title: str | None = None) -> Table:
    made = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        name, _, side = column.partition(":")
        made.add_column(name, justify="right" if side == "right" else "left", header_style="bold")
    return made


def mark(good: bool) -> str:
    return "[green]yes[/]" if good else "[yellow]no[/]"
