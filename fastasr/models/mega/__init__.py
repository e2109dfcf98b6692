# SPDX-License-Identifier: Apache-2.0
"""MEGA, one file per concept. Ma et al., "Mega: Moving average equipped gated attention", ICLR 2023,
https://arxiv.org/abs/2209.10655. ESPnet uses it as a transducer decoder."""

from fastasr.models.mega.damped_ema import MultiHeadDampedEMA
from fastasr.models.mega.decoder import MEGADecoder
from fastasr.models.mega.feed_forward import NormalizedPositionwiseFeedForward
from fastasr.models.mega.gated_attention import MEGA
from fastasr.models.mega.positional_bias import RelativePositionBias, RotaryRelativePositionBias

__all__ = [
    "MEGA",
    "MEGADecoder",
    "MultiHeadDampedEMA",
    "NormalizedPositionwiseFeedForward",
    "RelativePositionBias",
    "RotaryRelativePositionBias",
]
