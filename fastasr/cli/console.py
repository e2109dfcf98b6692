# SPDX-License-Identifier: Apache-2.0
"""Output and errors of the commands."""

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

from fastasr._nearest import nearest, nearest_or_all

PLAIN_WIDTH = 160  # columns of a pipe or a file, so that rows are not wrapped


def out() -> Console:
    """Returns a console on the current standard output (tests replace it), wide if it is not a terminal."""
    return _console(sys.stdout)


def err() -> Console:
    return _console(sys.stderr)


def _console(file) -> Console:
    """``file`` is None if the stream was closed before Python began; rich then drops what is printed."""
    terminal = file is not None and file.isatty()
    width = None if terminal or os.environ.get("COLUMNS") else PLAIN_WIDTH
    return Console(file=file, width=width, highlight=False, emoji=False)


def fail(message: str, code: int = 2) -> NoReturn:
    """Prints the message to stderr and ends the command without a traceback."""
    err().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def check_folder(option: str, folder: Path) -> None:
    """Makes the folder. It ends the command if nothing can be written there, before the work whose results go there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"{option}: {folder} cannot be written to: {error.strerror}")


def no_gpu() -> str:
    """Says why there is no GPU here and what to do next, or returns ""."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"no GPU here: torch {torch.__version__} is built for the CPU only; to use one, install a torch for CUDA"
    return (
        f"no GPU here: torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no CUDA device; "
        "see whether nvidia-smi lists one, and whether CUDA_VISIBLE_DEVICES or a container hides it"
    )


def check_device(name: str) -> None:
    """Ends the command with the reason, and what to do next, unless torch can use the device here."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError:
        fail(f"--device: expected cpu, cuda or cuda:1, ..., got {name!r}")
    if kind == "cuda" and (reason := no_gpu()):
        fail(f"--device {name}: {reason}, or leave --device out to use the CPU")
    try:
        torch.empty(0, dtype=torch.float32, device=name)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}")


def sizes(text: str) -> dict[str, int]:
    """Returns the sizes of ``--shape T=375,B=16``. It ends the command if the format is wrong."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.isidentifier() and size.isdecimal() for name, _, size in pairs):
        fail(f"--shape: expected sizes as T=375,B=16,C=512, got {text!r}")
    return {name: int(size) for name, _, size in pairs}


def known_ops(ops: list[str]) -> list[str]:
    """Returns the ops without repetitions. It ends the command if a name is unknown."""
    from fastasr.ops import NAMES

    for op in ops:
        if op not in NAMES:
            fail(f"no op is called {op!r}{nearest_or_all(op, NAMES)}")
    return list(dict.fromkeys(ops))


def refuse_without(option: str, **given: object) -> None:
    """Ends the command if an option was given that means nothing without this one."""
    for name, value in given.items():
        if value is not None:
            fail(f"--{name.replace('_', '-')}: it needs {option}")


def check_dtype(name: str, known: Iterable[str]) -> None:
    """Ends the command with the reason unless the dtype is one of those that are known."""
    known = list(known)
    if name not in known:
        fail(f"--dtype: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}")


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
