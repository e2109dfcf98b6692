# SPDX-License-Identifier: Apache-2.0
"""Time warping of SpecAugment: it moves one frame and stretches the parts before and after it to fit.

Park et al., "SpecAugment" (2019). ``random`` decides whether to warp and ``numpy.random`` where, as in lhotse and
atdataset, whose function recipes use: a seed gives the same batches here.
"""

import random

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor


def time_warp(
    features: Tensor,
    p: float = 0.9,
    time_warp_factor: int | None = 80,
    supervision_segments: Tensor | None = None,
) -> Tensor:
    """features (batch, time, channels) -> same shape, a copy unless time_warp_factor rules out any warp.

    Args:
        p: the probability that a segment is warped.
        time_warp_factor: the most frames that the centre moves; None or a value below 1 turns warping off.
        supervision_segments: ints (segments, 3): sequence, first frame, number of frames. None: whole sequences.
    """
    if time_warp_factor is None or time_warp_factor < 1:
        return features
    if features.ndim != 3:
        raise ValueError(
            f"time_warp: features must be (batch, time, channels), got shape {tuple(features.shape)}"
        )
    if supervision_segments is None:
        segments = [(n, 0, features.shape[1]) for n in range(features.shape[0])]
    else:
        segments = supervision_segments.tolist()
    features = features.clone()
    for sequence, first, frames in segments:
        if random.random() <= p:
            part = features[sequence, first : first + frames]
            features[sequence, first : first + frames] = _warped(part, time_warp_factor)
    return features


def _warped(x: Tensor, factor: int) -> Tensor:
    frames = x.shape[0]
    if frames <= 2 * factor + 1:
        return x
    centre = numpy.random.randint(factor + 1, frames - factor)
    moved = numpy.random.randint(centre - factor, centre + factor + 1)
    if moved == centre:
        return x
    return torch.cat([_stretched(x[:centre], moved), _stretched(x[centre:], frames - moved)])


def _stretched(x: Tensor, frames: int) -> Tensor:
    """(time, channels) -> (frames, channels), by cubic interpolation along time."""
    size = (frames, x.shape[1])
    return F.interpolate(x[None, None], size=size, mode="bicubic", align_corners=False)[0, 0]
