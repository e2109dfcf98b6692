# SPDX-License-Identifier: Apache-2.0
"""Turns samples that arrive piece by piece into the chunks of features that a streaming encoder takes."""

import collections
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastasr.asr.audio.features import HIGH_FREQ, FbankStream
from fastasr.asr.decoding.chunks import RIGHT_CONTEXT, SILENCE, FeatureChunks


class StreamFeatures:
    """Makes the chunks of one stream of samples. ``push`` and ``end`` add to them, ``take`` returns the next one."""

    def __init__(self, rate: int | None, bins: int, chunk_size: int, high_freq: float = HIGH_FREQ) -> None:
        self.rate = rate
        self._computer = FbankStream(rate, bins, high_freq)
        self._chunks = FeatureChunks(chunk_size)
        self._ready: collections.deque[Tensor] = collections.deque()
        self._ended = False

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def ended(self) -> bool:
        return self._ended

    def push(self, samples: Any, rate: int | None = None) -> None:
        """Takes samples (n,): floats in [-1, 1] or 16-bit integers. Raises ValueError for anything else."""
        if self._ended:
            raise ValueError("push: samples after the end of the stream")
        if rate is not None and rate != self.rate:
            raise ValueError(f"push: expected samples at {self.rate} Hz, got {rate} Hz: resample them first")
        samples = as_samples(samples)
        if len(samples):
            self._ready.extend(self._chunks.accept(self._computer.accept(samples)))

    def end(self) -> None:
        """Ends the samples: the rest becomes chunks, padded with silence."""
        if self._ended:
            return
        self._ended = True
        self._ready.extend(self._chunks.accept(self._computer.finish()))
        self._ready.extend(self._chunks.finish())

    def next(self) -> Tensor:
        """Returns the chunk that ``take`` will return."""
        return self._ready[0]

    def take(self) -> Tensor:
        return self._ready.popleft()


def as_samples(samples: Any) -> Tensor:
    """Converts a tensor or array of floats in [-1, 1] or 16-bit integers to float32 (n,)."""
    found = torch.as_tensor(samples, device="cpu")
    if found.ndim != 1:
        raise ValueError(f"push: samples must be (n,), one channel, got {tuple(found.shape)}")
    if found.dtype == torch.int16:
        return found.float() / 32768
    if not found.is_floating_point():
        raise ValueError(f"push: samples must be floats in [-1, 1] or int16, got {found.dtype}")
    samples = torch.as_tensor(samples, dtype=torch.float32, device="cpu")  # a list has no dtype of its own
    if not samples.isfinite().all():
        raise ValueError("push: samples must be finite, got NaN or infinity")
    return samples


def utterance_chunks(features: Tensor, chunk_size: int) -> Iterator[tuple[Tensor, int]]:
    """Cuts features (frames, bins) of a whole utterance for ``StreamingEncoder.step``. Yields (chunk, length): chunk
    (2 chunk_size + 13, bins) is padded with silence, length counts its frames before that.
    """
    step = 2 * chunk_size
    for start in range(0, len(features), step):
        chunk = features[start : start + step + RIGHT_CONTEXT]
        if frames_out(len(chunk), chunk_size):
            yield with_silence(chunk, step + RIGHT_CONTEXT), len(chunk)


def with_silence(features: Tensor, frames: int) -> Tensor:
    """Pads features (..., n, bins) with silence to ``frames`` frames."""
    missing = frames - features.shape[-2]
    return torch.nn.functional.pad(features, (0, 0, 0, missing), value=SILENCE) if missing else features


def frames_out(length: int, chunk_size: int) -> int:
    """Returns how many output frames a chunk with ``length`` frames of features has. Over all chunks of an utterance
    these are as many as the encoder gives for the whole utterance.
    """
    return (min(max((length - 7) // 2, 0), chunk_size) + 1) // 2
