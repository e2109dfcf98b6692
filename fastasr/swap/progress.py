# SPDX-License-Identifier: Apache-2.0
"""Shows on a terminal how far a verification is, in one line that is rewritten."""

import shutil
import sys
import time

from fastasr.swap.report import shortened

_INTERVAL = 0.1  # seconds between two lines; what ends sooner shows none
_CLEAR = "\r\x1b[K"  # to the first column, and delete the line


class Progress:
    """Writes to standard error if that is a terminal, and deletes the line at the end. ``total``: the number of
    steps."""

    def __init__(self, total):
        self._total, self._done, self._shown = total, 0, False
        self._next = time.monotonic() + _INTERVAL
        self._file = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None

    def __enter__(self):
        return self

    def step(self, path):
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

    def __exit__(self, *_):
        if self._shown:
            self._file.write(_CLEAR)
            self._file.flush()
