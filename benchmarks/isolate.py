# SPDX-License-Identifier: Apache-2.0
"""Runs a function in a process of its own: a hang or a crash costs that function alone, and nothing after it."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

START_SECONDS = 120  # A process must begin within this time.
KEPT_OUTPUT = 6000  # this many last characters of a process's output are kept
# Each process is forked from a server that has imported what they need, and that never touches a GPU: a process forked
# from one that did could not use it. torch asks NVML instead of CUDA whether there is a GPU.
PRELOADED = ["torch._dynamo", "fastasr.benchmarks.device.units"]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(PRELOADED)
_running: set[int] = set()


@dataclass
class Outcome:
    """What a process sent, how it ended ("" if its function returned), and the end of what it printed."""

    messages: list[dict] = field(default_factory=list)
    ended: str = ""
    output: str = ""
    seconds: float = 0.0
    out_of_time: bool = False


def isolated(
    function: Callable, arguments: tuple, limit: float, heard: Callable[[dict], None] = lambda message: None
) -> Outcome:
    """Calls ``function(tell, *arguments)`` in a new process, which is killed after ``limit`` seconds.

    ``function`` must be importable. Each ``tell(dict)`` in it adds a message to the outcome at once, so the messages
    before a crash are kept; ``heard`` gets each as it comes.
    """
    outcome, start = Outcome(), time.monotonic()
    with tempfile.NamedTemporaryFile(prefix="fastasr-") as log:
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_child, args=(sender, log.name, limit, function, arguments))
        process.start()
        _running.add(process.pid)
        sender.close()
        finished = False
        try:
            with contextlib.suppress(EOFError):
                if receiver.poll(START_SECONDS):
                    receiver.recv()  # the process has begun; the first one waits for the server
                start = time.monotonic()
                while not finished and receiver.poll(max(0.0, start + limit - time.monotonic())):
                    message = receiver.recv()
                    finished = message is None
                    if not finished:
                        outcome.messages.append(message)
                        heard(message)
            process.join(5 if finished else max(1.0, start + limit - time.monotonic()))
        finally:
            if process.is_alive():
                outcome.out_of_time = not finished
                _kill(process.pid)
                process.join(10)
            _running.discard(process.pid)
        outcome.seconds = round(time.monotonic() - start, 1)
        if outcome.out_of_time:
            outcome.ended = f"hung: killed after {limit:.0f} s"
        elif not finished:
            outcome.ended = f"crashed: {_cause(process.exitcode)}"
        if outcome.ended:
            outcome.output = Path(log.name).read_text(errors="replace")[-KEPT_OUTPUT:]
    return outcome


def kill_all() -> None:
    """Kills every process that is running."""
    for pid in tuple(_running):
        _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # with the processes that it started


def _cause(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _end_with_parent() -> None:
    """Ends this process, and those that it started, when the one that asked for it is gone and can set it no limit."""
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)


def _child(sender, log: str, limit: float, function: Callable, arguments: tuple) -> None:
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(sys.__stderr__)
    faulthandler.dump_traceback_later(0.9 * limit, file=sys.__stderr__)  # prints where the process hangs
    sender.send({})
    function(sender.send, *arguments)
    sys.stdout.flush()
    sender.send(None)
