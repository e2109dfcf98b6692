# SPDX-License-Identifier: Apache-2.0
"""FastConformer, one file per concept: the encoder of Parakeet, Canary and Nemotron models. Rekesh et al., "Fast
Conformer with linearly scalable attention for efficient speech recognition", ASRU 2023,
https://arxiv.org/abs/2305.05084. Attributes have the names of transformers' ``ParakeetEncoder``."""

from fastasr.models.fast_conformer.attention import FastConformerAttention
from fastasr.models.fast_conformer.block import FastConformerBlock
from fastasr.models.fast_conformer.convolution import FastConformerConvolution
from fastasr.models.fast_conformer.encoder import FastConformerCTC, FastConformerEncoder
from fastasr.models.fast_conformer.feed_forward import FastConformerFeedForward
from fastasr.models.fast_conformer.positions import FastConformerPositions
from fastasr.models.fast_conformer.subsampling import FastConformerSubsampling
from fastasr.models.fast_conformer.transducer import FastConformerRNNT, FastConformerTDT

__all__ = [
    "FastConformerAttention",
    "FastConformerBlock",
    "FastConformerCTC",
    "FastConformerConvolution",
    "FastConformerEncoder",
    "FastConformerFeedForward",
    "FastConformerPositions",
    "FastConformerRNNT",
    "FastConformerSubsampling",
    "FastConformerTDT",
]
