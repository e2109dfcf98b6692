# SPDX-License-Identifier: Apache-2.0
"""Shows the progress of a verification on a terminal, in one line that it rewrites."""

import shutil
import sys
import time
from typing import Self

from fastasr.swap.report import shortened

_INTERVAL = 0.1  # seconds between two lines; a verification that ends sooner shows none
_CLEAR = "\r\x1b[K"  # moves to the first column and deletes the line


class Progress:
    """Writes to standard error if that is a terminal, and deletes the line at the end. ``total``: the number of
    steps."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._shown = total, 0, False
        self._next = time.monotonic() + _INTERVAL
        self._file = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        return self

    def step(self, path: str) -> None:
        """Says that the module at ``path`` is next."""
        self._done += 1
        if self._file is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _INTERVAL
        count = f"verifying {self._done}/{self._total}, module "
        room = shutil.get_terminal_size().columns - len(count) - 1
        self._file.write(_CLEAR + count + shortened(path or "(the model)", room))
        self._file.flush()
        self._shown = True

    def __exit__(self, *_: object) -> None:
        if self._shown and self._file is not None:
            self._file.write(_CLEAR)
            self._file.flush()
