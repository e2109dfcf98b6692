# SPDX-License-Identifier: Apache-2.0
"""Features as they arrive, cut into the chunks that a streaming encoder takes.

A chunk of ``chunk_size`` encoder frames (of 20 ms) needs 2 chunk_size + 13 frames of features (of 10 ms): the
front end's convolutions consume 7 of them, and its ConvNeXt layer sees 6 of the future. The next chunk begins 2
chunk_size frames later.
"""

import math
from typing import Any

import torch
from torch import Tensor

RIGHT_CONTEXT = 7 + 2 * 3
SILENCE = math.log(1e-10)  # the log-mel feature of silence


class FeatureChunks:
    """Collects features (frames, channels) of one utterance and gives chunks (frames_per_chunk, channels) when full.

    chunks = FeatureChunks(chunk_size=16)
    for features in source:
        for chunk in chunks.accept(features): ...
    for chunk in chunks.finish(): ...
    """

    def __init__(self, chunk_size: int, right_context: int = RIGHT_CONTEXT) -> None:
        if chunk_size < 1:
            raise ValueError(f"FeatureChunks: chunk_size must be at least 1, got {chunk_size}")
        self.step = 2 * chunk_size
        self.frames_per_chunk = self.step + right_context
        self._waiting: Any = None
        self._finished = False

    def accept(self, features: Tensor) -> list[Tensor]:
        """Returns the chunks that these features complete."""
        if self._finished:
            raise ValueError("FeatureChunks: features after finish")
        if features.ndim != 2:
            raise ValueError(
                f"FeatureChunks: features must be (frames, channels), got {tuple(features.shape)}"
            )
        self._waiting = features if self._waiting is None else torch.cat([self._waiting, features])
        return self._complete()

    def finish(self) -> list[Tensor]:
        """Returns the last chunks. Silence is added behind the features, so that every frame is in a chunk itself and
        not only in the future context of one."""
        if self._finished or self._waiting is None:
            self._finished = True
            return []
        self._finished = True
        missing = -(-len(self._waiting) // self.step) * self.step - len(self._waiting)
        silence = self._waiting.new_full(
            (missing + self.frames_per_chunk - self.step, self._waiting.shape[1]), SILENCE
        )
        self._waiting = torch.cat([self._waiting, silence])
        return self._complete()

    def _complete(self) -> list[Tensor]:
        chunks = []
        while len(self._waiting) >= self.frames_per_chunk:
            chunks.append(self._waiting[: self.frames_per_chunk])
            self._waiting = self._waiting[self.step :]
        return chunks
