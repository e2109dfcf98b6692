# SPDX-License-Identifier: Apache-2.0
"""Rules for Zipformer: the ``zipformer`` package and the icefall recipe folders that carry the same classes.

Fingerprints come from ``fastasr.swap.source_hash``; ``docs/swap.md`` says how to compute one.
"""

from fastasr.swap.rules.zipformer.activations import ACTIVATION_DROPOUT_AND_LINEAR, SWOOSH_L, SWOOSH_R
from fastasr.swap.rules.zipformer.asr_model import ASR_MODEL, ICEFALL_MODEL
from fastasr.swap.rules.zipformer.attention import ATTENTION_WEIGHTS, NONLIN_ATTENTION, SELF_ATTENTION
from fastasr.swap.rules.zipformer.convolution import CONVOLUTION
from fastasr.swap.rules.zipformer.encoder import CAUSAL_ENCODER, CAUSAL_ZIPFORMER2, ENCODER, ZIPFORMER2
from fastasr.swap.rules.zipformer.front_end import CONV2D_SUBSAMPLING, CONVNEXT
from fastasr.swap.rules.zipformer.layer import BIAS_NORM, BYPASS, ENCODER_LAYER, ZIPFORMER2_ENCODER_LAYER
from fastasr.swap.rules.zipformer.regularisers import BALANCER, WHITEN

RULES = (
    ASR_MODEL,
    ICEFALL_MODEL,
    CAUSAL_ENCODER,
    CAUSAL_ZIPFORMER2,
    ENCODER,
    ZIPFORMER2,
    ENCODER_LAYER,
    ZIPFORMER2_ENCODER_LAYER,
    SELF_ATTENTION,
    NONLIN_ATTENTION,
    SWOOSH_L,
    SWOOSH_R,
    ACTIVATION_DROPOUT_AND_LINEAR,
    BIAS_NORM,
    BYPASS,
    BALANCER,
    WHITEN,
    CONVNEXT,
    CONV2D_SUBSAMPLING,
    CONVOLUTION,
    ATTENTION_WEIGHTS,
)
