# SPDX-License-Identifier: Apache-2.0
"""Calls that compile for too long end."""

import signal
import threading
import time

import pytest

from fastasr.benchmarks.models import unit
from fastasr.benchmarks.time_limit import Expired, time_limit


def _compiling(done):
    """Goes on after every exception, as torch.compile does."""
    while True:
        try:
            time.sleep(5)
            done.append(True)
        except Exception:
            continue


def test_the_time_is_up():
    before = signal.getsignal(signal.SIGALRM)
    done = []
    with pytest.raises(Expired, match=r"longer than 0\.1 s"), time_limit(0.1):
        _compiling(done)
    assert not done
    assert signal.getsignal(signal.SIGALRM) is before
    with time_limit(0.05):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_no_limit_off_the_main_thread():
    ended = []

    def work():
        with time_limit(0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


def test_a_compile_that_fails_or_takes_too_long_says_so(monkeypatch):
    monkeypatch.setattr(unit, "COMPILE_SECONDS", 0.1)

    def fails():
        raise RuntimeError("no backend")

    assert not unit.why_not_compiled(lambda: None)
    assert unit.why_not_compiled(lambda: _compiling([])) == "Expired: longer than 0.1 s"
    assert unit.why_not_compiled(fails) == "RuntimeError: no backend"
