# SPDX-License-Identifier: Apache-2.0
"""Lets Ctrl-C end a verification only between steps, so that nothing is half done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Yields a function that raises KeyboardInterrupt if there was a Ctrl-C in the block. The end of the block calls
    it. A second Ctrl-C takes effect at once.

    A plain KeyboardInterrupt may come between two lines that undo something together. If the process has no Python
    handler of SIGINT, or outside the main thread, the block changes nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    pressed = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append((number, frame))
        if len(pressed) > 1:
            handler(*pressed.pop())

    def interruption() -> None:
        if pressed:
            handler(*pressed.pop())

    signal.signal(signal.SIGINT, note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, handler)
        interruption()
