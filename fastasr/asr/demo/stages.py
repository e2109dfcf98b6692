# SPDX-License-Identifier: Apache-2.0
"""Prints the progress: a spinner with the elapsed time on a terminal, an occasional line elsewhere."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

EVERY = 20.0  # seconds between two progress lines without a terminal


class Stages:
    """Prints numbered stages on ``console``. Inside a stage, ``alive`` names a long operation."""

    def __init__(self, console: Console, count: int) -> None:
        self.console, self.count, self.number = console, count, 0
        self._running: list[tuple[str, float]] = []  # innermost last: (text, since)

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator["Stages"]:
        """Announces one stage, shows its progress while it runs, and prints its time at the end."""
        self.number += 1
        self.console.print(
            f"[bold cyan]{self.number}/{self.count}[/] [bold]{escape(title)}[/]", soft_wrap=True
        )
        start = time.monotonic()
        with self._pulse(), self.alive(title):
            yield self
        self.console.print(f"    [dim]{time.monotonic() - start:.1f} s[/]")

    def say(self, text: str, style: str = "") -> None:
        self.console.print(f"    {escape(text)}", style=style, soft_wrap=True)

    @contextlib.contextmanager
    def alive(self, text: str) -> Iterator[None]:
        """Shows ``text`` and the elapsed seconds until the block ends."""
        self._running.append((text, time.monotonic()))
        try:
            yield
        finally:
            self._running.pop()

    @contextlib.contextmanager
    def _pulse(self) -> Iterator[None]:
        ended = threading.Event()
        terminal = self.console.is_terminal
        with self.console.status("") if terminal else contextlib.nullcontext() as status:
            pulse = threading.Thread(target=self._beat, args=(ended, status), daemon=True)
            pulse.start()
            try:
                yield
            finally:
                ended.set()
                pulse.join()

    def _beat(self, ended: threading.Event, status: Any) -> None:
        while not ended.wait(0.5 if status is not None else EVERY):
            if not self._running:
                continue
            text, since = self._running[-1]
            seconds = time.monotonic() - since
            if status is not None:
                status.update(f"{escape(text)} [dim]{seconds:.0f} s[/]")
            elif seconds >= EVERY / 2:
                self.say(f"… {text}: {seconds:.0f} s")
