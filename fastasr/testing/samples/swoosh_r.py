# SPDX-License-Identifier: Apache-2.0
"""Samples of swoosh_r, and its benchmark."""

from dataclasses import replace

from fastasr.testing.samples import swoosh_l
from fastasr.testing.speed import BATCH, FRAMES, Case

TABLE = replace(swoosh_l.TABLE, op="swoosh_r", definition=None)


def sized(T: int = 1600, B: int = 4, C: int = 512) -> Case:
    return swoosh_l.measured("swoosh_r", T, B, C)


CASES = (
    swoosh_l.measured("swoosh_r", 4, 1600, 512),
    # the first activations of Zipformer-M's front end: 16 s, after the first convolution
    swoosh_l.measured("swoosh_r", 4, 8, 1598, 80),
)
ON_DEVICE = tuple(swoosh_l.measured("swoosh_r", FRAMES, BATCH, c) for c in (512, 768, 1536))
WATCH = "the same as in swoosh_l"
