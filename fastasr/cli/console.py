# SPDX-License-Identifier: Apache-2.0
"""What the commands share: where they print, and how they fail."""

import os
import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 160  # of a pipe or a file: rows stay whole


def out() -> Console:
    """Standard output as it is now (tests replace it), wide when it is not a terminal."""
    return _console(sys.stdout)


def err() -> Console:
    return _console(sys.stderr)


def _console(file) -> Console:
    width = None if file.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH
    return Console(file=file, width=width, highlight=False, emoji=False)


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the command: the message on stderr, no traceback."""
    err().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def escape(text: object) -> str:
    """Text in which rich finds no markup."""
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
