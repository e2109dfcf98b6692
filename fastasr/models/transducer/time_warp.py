# SPDX-License-Identifier: Apache-2.0
"""Time warping of SpecAugment: a frame is moved, what is before and after it is stretched to fit.

Park et al., "SpecAugment" (2019). Whether to warp is drawn from ``random``, where from ``numpy.random``: as in the
packages that recipes take it from (lhotse, atdataset), so that a seed gives the same batches.
"""

import random

import numpy
import torch
import torch.nn.functional as F


def time_warp(features, p=0.9, time_warp_factor=80, supervision_segments=None):
    """features (batch, time, channels) -> same shape; a copy unless nothing is to be done.

    Args:
        p: the share of segments that are warped.
        time_warp_factor: frames that the centre moves at most; None or less than 1 for none.
        supervision_segments: (segments, 3) of ints: sequence, first frame, frames. None: whole sequences.
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


def _warped(x, factor):
    frames = x.shape[0]
    if frames <= 2 * factor + 1:
        return x
    centre = numpy.random.randint(factor + 1, frames - factor)
    moved = numpy.random.randint(centre - factor, centre + factor + 1)
    if moved == centre:
        return x
    return torch.cat([_stretched(x[:centre], moved), _stretched(x[centre:], frames - moved)])


def _stretched(x, frames):
    """(time, channels) -> (frames, channels), cubic along time."""
    size = (frames, x.shape[1])
    return F.interpolate(x[None, None], size=size, mode="bicubic", align_corners=False)[0, 0]
