# SPDX-License-Identifier: Apache-2.0
"""Rules for modules of transformers' LASR (google/medasr), which have Parakeet's code."""

from fastasr.swap.rules import transformers_parakeet as parakeet
from fastasr.swap.rules.conformer import FROM_5_18
from fastasr.swap.rules.torch import CONVOLUTIONS

RULES = (
    parakeet.FEED_FORWARD.like(
        "transformers.lasr_feed_forward", "LasrEncoderFeedForward", {"d5c81f0c3302c856dd2cc3f5": FROM_5_18}
    ),
    parakeet.CONVOLUTION.like(
        "transformers.lasr_convolution",
        "LasrEncoderConvolutionModule",
        {"36080375278d33620e96213f": FROM_5_18},
    ),
    *CONVOLUTIONS,
)
