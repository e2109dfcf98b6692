# SPDX-License-Identifier: Apache-2.0
"""Records passes as CUDA graphs."""

from collections.abc import Callable
from typing import TypeVar

import torch

from fastasr._recording import recorded_by
from fastasr.graphs.recording import Recording, Unrecordable

T = TypeVar("T")


class CudaRecorder:
    """Records the passes of one module as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def rehearse(self, function: Callable[[], object]) -> None:
        """Runs ``function()`` on the stream of the captures, with its kernels, and puts torch's generators back."""
        state = torch.get_rng_state(), torch.cuda.get_rng_state()
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)
            torch.set_rng_state(state[0])
            torch.cuda.set_rng_state(state[1])

    def record(self, function: Callable[[], T], recording: Recording) -> tuple[Callable[[], None], T]:
        """Returns a replay of ``function()``, and its result. Nothing has run on the device, and torch's generators
        are where they were.
        """
        graph, state = torch.cuda.CUDAGraph(), torch.get_rng_state()
        capture = torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        )
        with capture, recorded_by(recording if recording.back is not None else None):
            found = function()
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
            raise Unrecordable("it draws from torch's generator of the CPU")
        return graph.replay, found
