# SPDX-License-Identifier: Apache-2.0
"""Records a function as a CUDA graph, and tells code whether it is being recorded.

Recorded code must read nothing but tensors whose addresses stay: no value may reach the host, and a number that the host
draws in every call is asked for by :func:`numbers`. ``recording()`` is then a :class:`Recording`, else None.
"""

import contextlib
import threading

import torch

from fastasr.ops._dispatch import replayed

_local = threading.local()


def recording():
    """Returns what records this thread's calls now, or None."""
    return getattr(_local, "recording", None)


def on_host(t):
    """Says whether reading values of ``t`` costs no wait: it lies on the CPU, and nothing records the call."""
    return t.is_cpu and recording() is None


@contextlib.contextmanager
def recorded_by(recording_):
    """Inside the block ``recording()`` of this thread returns ``recording_``."""
    before, _local.recording = recording(), recording_
    try:
        with replayed(recording_ is not None):
            yield
    finally:
        _local.recording = before


def capture(function):
    """Records ``function``, which works on tensors with fixed addresses, and returns a function that replays it. It is
    called twice before, because libraries allocate memory and choose kernels at their first calls.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
