# SPDX-License-Identifier: Apache-2.0
"""Says whether a call is being recorded, to be replayed later (:mod:`fastasr.graphs`). Code of any layer may ask.

Recorded code reads nothing but tensors whose addresses stay: no value may reach the host, and a number that the host
draws or reads in every call comes from ``recording().numbers``. The host runs it once, so only the device's time counts
in the choice of a kernel.
"""

import contextlib
import threading

_thread = threading.local()


def recording():
    """Returns the :class:`fastasr.graphs.recording.Recording` of this thread's calls, or None. Backward passes run in a
    thread of autograd's, so a node of autograd keeps the recording of its forward pass.
    """
    return getattr(_thread, "recording", None)


def on_host(t):
    """Says whether reading values of ``t`` costs no wait: it lies on the CPU, and nothing records the call."""
    return t.is_cpu and recording() is None


@contextlib.contextmanager
def recorded_by(found):
    """Has ``recording()`` return ``found`` in this thread, inside the block."""
    before, _thread.recording = recording(), found
    try:
        yield
    finally:
        _thread.recording = before
