# SPDX-License-Identifier: Apache-2.0
"""Says what is going on: a spinner with the elapsed time on a terminal, lines now and then elsewhere."""

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

EVERY = 20.0  # seconds between two signs of life where there is no terminal


class Stages:
    """Numbered stages on ``console``."""

    def __init__(self, console: Console, count: int):
        self.console, self.count, self.number = console, count, 0

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator["Stages"]:
        """One stage: announced, kept alive while it runs, closed with its time."""
        self.number += 1
        self.console.print(
            f"[bold cyan]{self.number}/{self.count}[/] [bold]{escape(title)}[/]", soft_wrap=True
        )
        start = time.monotonic()
        with self.alive(title):
            yield self
        self.console.print(f"    [dim]{time.monotonic() - start:.1f} s[/]")

    def say(self, text: str, style: str = "") -> None:
        self.console.print(f"    {escape(text)}", style=style, soft_wrap=True)

    @contextlib.contextmanager
    def alive(self, text: str) -> Iterator[None]:
        """Shows ``text`` and the seconds since it began until the block ends."""
        start, ended = time.monotonic(), threading.Event()
        terminal = self.console.is_terminal
        status = self.console.status(escape(text)) if terminal else contextlib.nullcontext()

        def beat(shown) -> None:
            while not ended.wait(1.0 if terminal else EVERY):
                seconds = time.monotonic() - start
                if terminal:
                    shown.update(f"{escape(text)} [dim]{seconds:.0f} s[/]")
                else:
                    self.say(f"… {text}: {seconds:.0f} s")

        with status as shown:
            pulse = threading.Thread(target=beat, args=(shown,), daemon=True)
            pulse.start()
            try:
                yield
            finally:
                ended.set()
                pulse.join()
