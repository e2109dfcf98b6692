# SPDX-License-Identifier: Apache-2.0
"""A limit on calls that compile: an hour of recompilation tells no more than ten minutes of it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Expired(BaseException):
    """Raised when the time is up. It is no Exception, because torch.compile catches those of its backend and compiles
    on.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises ``Expired`` inside after this many seconds. It has no effect where there are no alarms, nor outside the
    main thread, the only one that can have an alarm.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_):
        raise Expired(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
