# SPDX-License-Identifier: Apache-2.0
"""Calls that compile for too long are left out."""

import signal
import threading
import time

import pytest

from fastasr.benchmarks.models import zipformer
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


def test_what_compiles_too_long_or_not_at_all_is_left_out(monkeypatch):
    monkeypatch.setattr(zipformer, "COMPILE_LIMIT", 0.1)
    said = []

    def fails():
        raise RuntimeError("no backend")

    assert zipformer._compiles(lambda: None, said.append)
    assert not said
    assert not zipformer._compiles(lambda: _compiling([]), said.append)
    assert not zipformer._compiles(fails, said.append)
    assert [line.split("left out: ")[1] for line in said] == [
        "Expired: longer than 0.1 s",
        "RuntimeError: no backend",
    ]
