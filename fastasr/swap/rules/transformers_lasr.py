# SPDX-License-Identifier: Apache-2.0
"""Rules for modules of transformers' LASR (google/medasr), which have Parakeet's code."""

import dataclasses

from fastasr.swap.rule import Known
from fastasr.swap.rules import transformers_parakeet as parakeet

_FROM_5_18 = Known("transformers 5.18 to 5.24")

FEED_FORWARD = dataclasses.replace(
    parakeet.FEED_FORWARD,
    name="transformers.lasr_feed_forward",
    class_name="LasrEncoderFeedForward",
    known={"d5c81f0c3302c856dd2cc3f5": _FROM_5_18},
)
CONVOLUTION = dataclasses.replace(
    parakeet.CONVOLUTION,
    name="transformers.lasr_convolution",
    class_name="LasrEncoderConvolutionModule",
    known={"36080375278d33620e96213f": _FROM_5_18},
)
RULES = (FEED_FORWARD, CONVOLUTION)
