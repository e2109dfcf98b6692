# SPDX-License-Identifier: Apache-2.0
"""Runs chunks on a GPU as CUDA graphs. A chunk has about 1,400 small kernels, whose launches take longer than they run.

One graph is recorded per batch size, 1, 2, 4, ... up to max_streams, over static buffers: features, slot numbers,
output. It gathers the states of the slots whose numbers are in its buffer and scatters them back at the end, so a
stream joins or leaves by a change of these numbers. Rows that a call does not fill use a scratch slot.
"""

from typing import Any

import torch
from torch import Tensor

from fastasr.asr.streaming.backend import EagerBackend
from fastasr.models.common.graph_capture import capture


class CudaGraphBackend(EagerBackend):
    """An EagerBackend whose chunks are replayed. ``record(function)`` returns a function that repeats ``function``; the
    default captures a graph on the GPU.
    """

    name = "cuda graph"

    def __init__(
        self,
        model: Any,
        chunk_size: int,
        left_context_frames: int,
        weights: str = "fp32",
        max_streams: int = 1,
        threads: int = 1,
        record: bool | None = None,
    ) -> None:
        super().__init__(model, chunk_size, left_context_frames, weights, max_streams, threads, scratch=1)
        self._record = record or capture
        self._scratch = max_streams
        self._sizes = bucket_sizes(max_streams)

    def load(self, model: Any) -> Any:
        self._graphs: dict[int, _Graph] = {}  # a graph reads the weights at their addresses of its recording
        return super().load(model)

    @torch.inference_mode()
    def step(self, features: Tensor, slots: list[int]) -> Tensor:
        n = len(slots)
        size = next(size for size in self._sizes if size >= n)
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = _Graph(self, size, features.shape[2])
        return graph.run(features, slots)

    @property
    def recorded(self) -> list[int]:
        """Returns the batch sizes that have a graph."""
        return sorted(self._graphs)


def bucket_sizes(most: int) -> list[int]:
    """Returns 1, 2, 4, ... and ``most``."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


class _Graph:
    """The recorded chunk of ``size`` slots."""

    def __init__(self, backend: Any, size: int, bins: int) -> None:
        device = backend.device
        self.scratch = backend._scratch
        self.features = torch.zeros(size, backend.frames, bins, device=device, dtype=torch.float32)
        self.slots = torch.full((size,), self.scratch, dtype=torch.int64, device=device)
        self.output: Any = None

        def chunk() -> None:
            with torch.autocast(device.type, enabled=False):
                y = backend._advance(self.features, self.slots)
            if self.output is None:
                self.output = torch.empty_like(y)
            self.output.copy_(y)

        chunk()  # a first run on the scratch slot makes positions, libraries and buffers before the recording
        self.replay = backend._record(chunk)

    def run(self, features: Tensor, slots: list[int]) -> Tensor:
        n = len(slots)
        self.features[:n].copy_(features, non_blocking=True)
        self.slots.copy_(
            torch.tensor([*slots, *[self.scratch] * (len(self.slots) - n)], dtype=torch.int64, device="cpu"),
            non_blocking=True,
        )
        self.replay()
        return self.output[:n].clone()
