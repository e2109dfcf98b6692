# SPDX-License-Identifier: Apache-2.0
"""The results of a search, and the checks that all searches share."""

from dataclasses import dataclass

import torch


@dataclass
class Decoded:
    """Per sequence of a batch: tokens, the frame of the encoder's output at which each was decided, and a score.

    A frame is 0.04 s with features every 10 ms. The score is a log-probability: of the best path for greedy searches,
    summed over the paths that were kept for beam searches.
    """

    tokens: list[list[int]]
    timestamps: list[list[int]]
    scores: list[float]


def frames_of(name: str, x: torch.Tensor, lengths: torch.Tensor | None, batch: int) -> list[int]:
    """Returns the lengths (batch,) as a list; None means all frames. Raises ValueError if shapes or lengths do not
    fit, TypeError if lengths are not integers."""
    if x.ndim != 3 or x.shape[0] != batch:
        raise ValueError(
            f"{name}: expected (batch, frames, channels) with a batch of {batch}, got {tuple(x.shape)}"
        )
    if lengths is None:
        return [x.shape[1]] * batch
    frames: list[int] = torch.as_tensor(lengths, device="cpu").tolist()
    if not all(isinstance(count, int) for count in frames):
        raise TypeError(f"{name}: expected integers as lengths, got {frames}")
    if len(frames) != batch or not all(0 <= count <= x.shape[1] for count in frames):
        raise ValueError(f"{name}: expected {batch} lengths of at most {x.shape[1]} frames, got {frames}")
    return frames


def check_beam(name: str, beam: int) -> None:
    if beam < 1:
        raise ValueError(f"{name}: beam must be at least 1, got {beam}")


def check_blank(name: str, blank: int, vocabulary: int) -> None:
    if not 0 <= blank < vocabulary:
        raise ValueError(f"{name}: blank_id must be a token, from 0 to {vocabulary - 1}, got {blank}")
